"""Meters count what numpy counts, and nothing where there is nothing to count."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rollmill.quant import (
    FP8,
    NVFP4,
    AmaxMeter,
    ClippingMeter,
    QuantLinear,
    clipping_shares,
    find_capability,
    reset_clipping,
)
from rollmill.quant.numerics import decode_scale


@pytest.mark.parametrize("code_max", [448.0, 2688.0])
def test_clipping_counts_what_lies_beyond_the_scale(code_max):
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    meter = ClippingMeter(torch.tensor([1.5 / code_max, 2.0 / code_max]), code_max)  # the smaller one counts
    for part in x.split(20):
        meter(part)
    expected = (np.abs(x.float().numpy()) > 1.5).sum()
    assert meter.counts.tolist() == [expected, x.numel()]
    assert 0 < expected < x.numel()
    meter.reset()
    assert meter.counts.tolist() == [0, 0]


@pytest.mark.parametrize("code_max", [448.0, 2688.0])
def test_the_amax_that_a_scale_came_from_is_not_clipped(code_max):
    """For every BF16 number of an octave, though amax / code_max * code_max rounds twice; its successor is."""
    amax = torch.arange(0x3F80, 0x4000, dtype=torch.int16).view(torch.bfloat16)
    following = (amax.view(torch.int16) + 1).view(torch.bfloat16)
    for value, larger in zip(amax, following, strict=True):
        meter = ClippingMeter(decode_scale(value.float(), code_max), code_max)
        meter(torch.stack([value, -value, larger]))
        assert meter.counts.tolist() == [1, 3]


def test_amax_is_the_largest_magnitude():
    meter = AmaxMeter(torch.device("cpu"))
    assert meter.amax == 0
    for part in (torch.tensor([[1.0, -3.0]]), torch.empty(0, 2), torch.tensor([[2.0, 0.0]])):
        meter(part.bfloat16())
    assert meter.amax == 3
    assert meter.amax.dtype == torch.float32


@pytest.mark.parametrize("scheme", [FP8("static"), NVFP4("static")], ids=lambda s: s.name)
def test_a_static_linear_counts_its_input(scheme):
    layer = QuantLinear(["q", "k"], [32, 16], 64, scheme, capability=find_capability("cpu"), dtype=torch.float32)
    stored = scheme.quantize(torch.randn(48, 64).bfloat16(), layer.slot.shape)
    stored["input_scale"] = torch.full((2,), 0.5 / scheme.code_max)
    layer.slot.commit(
        layer.kernel.prepare(stored) | layer.kernel.derive(stored), {"input_scale": stored["input_scale"]}, {}
    )
    x = torch.linspace(-1, 1, 64 * 10).view(10, 64)
    layer(x)
    assert clipping_shares([layer.slot]) == {"q": pytest.approx((abs(x.numpy()) > 0.5).mean())}
    reset_clipping([layer.slot])
    assert clipping_shares([layer.slot]) == {"q": 0.0}


@pytest.mark.parametrize("activation", ["per_token", "per_tensor"])
def test_online_activations_have_no_meter(activation):
    layer = QuantLinear(["q"], [32], 64, FP8(activation), capability=find_capability("cpu"), dtype=torch.float32)
    assert layer.slot.meter is None
    assert clipping_shares([layer.slot]) == {}
