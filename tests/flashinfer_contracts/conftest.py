"""A Blackwell GPU in software: FlashInfer's own Python on CPU tensors, its kernels as tests/kernel_models."""

from __future__ import annotations

import pytest
import torch
from kernel_models.library import ModelLibrary
from torch import Tensor

from rollmill.quant import Capability, Scheme, WeightShape
from rollmill.quant.flashinfer_api import tactics
from rollmill.quant.flashinfer_api.library import describe


@pytest.fixture(autouse=True)
def fresh_guards():
    """No test knows what another one checked."""
    tactics.forget_guards()
    tactics.install_chooser.cache_clear()
    yield
    tactics.forget_guards()
    tactics.install_chooser.cache_clear()


@pytest.fixture
def blackwell(model_library: ModelLibrary) -> Capability:
    """sm100 with the installed FlashInfer, tensors on the CPU."""
    import flashinfer

    return Capability(torch.device("cpu"), 100, ("flashinfer", "triton"), describe(flashinfer))


@pytest.fixture
def stored_weight():
    """Random weights as a scheme stores them, `input_scale` fitting inputs up to `amax`; `unequal` scales of shards."""

    def make(scheme: Scheme, shape: WeightShape, *, amax: float = 4.0, unequal: bool = False) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(11)
        weight = torch.randn(shape.matrix, generator=generator) * 0.05
        stored = scheme.quantize(weight.bfloat16(), shape)
        if unequal:  # as a foreign exporter may leave them: the same codes mean other weights
            scale = stored["weight_scale_2" if "weight_scale_2" in stored else "weight_scale"]
            scale *= 1 + torch.arange(scale.numel()).view(scale.shape) % 3
        if scheme.activation == "static":
            spec = scheme.scales(shape)["input_scale"]
            stored["input_scale"] = torch.full(spec.shape, amax / scheme.code_max)
        return stored

    return make
