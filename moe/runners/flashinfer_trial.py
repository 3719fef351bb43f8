"""What a layer of experts should give, at the rounding points of TensorRT-LLM's kernels: for the self-check."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...quant import NVFP4, Scheme, WeightShape
from ...quant.flashinfer_api.tactics import Trial
from ...quant.flashinfer_api.trials import SEED, random_input, random_stored
from ...quant.kernels.activation import quantize_activation
from ..activation import silu_and_mul
from ..routing import route

if TYPE_CHECKING:
    from .flashinfer_trtllm import FlashInferTrtllmRouted

INNER_AMAX = 4.0  # of a static scale for the second product's input


def make_trial(runner: FlashInferTrtllmRouted, tokens: int) -> Trial:
    """Random experts and tokens, routed at random; a flipped rounding of the second product's input is no fault."""
    config, scheme, device = runner.config, runner.scheme, runner.capability.device
    x = random_input(tokens, config.hidden_size, device)
    amax = {runner.w13: x.abs().max().item(), runner.w2: INNER_AMAX}
    stored, packed = [], []
    for packer in (runner.w13, runner.w2):
        values = random_stored(scheme, packer.shape, device, amax[packer])
        stored.append(values)
        packed.append(packer.prepare(values) | packer.derive(values))
    generator = torch.Generator(device).manual_seed(SEED)
    logits = torch.empty(tokens, config.num_experts, device=device).normal_(generator=generator)
    ids, weights = route(logits, config)
    expected = expected_output(x, ids, weights, scheme, (runner.w13.shape, runner.w2.shape), stored)
    run = partial(runner.run_unguarded, x, logits, ids, weights, *packed)
    return Trial(run, expected, rms=0.02, largest=0.05)


def expected_output(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    scheme: Scheme,
    shapes: tuple[WeightShape, WeightShape],
    stored: list[dict[str, Tensor]],
) -> Tensor:
    """float32 [num_tokens, hidden_size]. The inner activations round to BF16 only where the kernel writes them out:
    before per-token quantization."""
    out = torch.zeros(len(x), shapes[1].num_rows, device=x.device)
    for expert in ids.unique().tolist():
        token, choice = (ids == expert).nonzero(as_tuple=True)
        w13, w2 = ({key: value[expert] for key, value in layer.items()} for layer in stored)
        inner = silu_and_mul(_product(x[token], scheme, shapes[0].unit, w13))
        if scheme.activation == "per_token":
            inner = inner.bfloat16()
        product = _product(inner, scheme, shapes[1].unit, w2).bfloat16().float()
        out.index_add_(0, token, product * weights[token, choice, None].float())
    return out


def _product(x: Tensor, scheme: Scheme, shape: WeightShape, stored: Mapping[str, Tensor]) -> Tensor:
    """float32: quantized activations times dequantized weights."""
    input_scale = stored["input_scale"][0] if "input_scale" in stored else None
    if isinstance(scheme, NVFP4) and x.dtype != torch.bfloat16 and input_scale is None:
        raise AssertionError("per-token activations are BF16")
    values, scale = quantize_activation(x, scheme, input_scale, torch.float32)
    values = values if scale is None else values * scale
    return values @ scheme.dequantize(stored, shape).t()
