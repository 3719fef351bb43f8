"""What a layer of experts should give, at the rounding points of TensorRT-LLM's kernels: for the self-check."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...quant import Scheme, WeightShape
from ...quant.flashinfer_api.guard import Bench, Trial
from ...quant.flashinfer_api.trials import INPUT_AMAX, SEED, random_input, random_stored
from ...quant.kernels.activation import quantize_activation
from ..activation import silu_and_mul
from ..routing import route

if TYPE_CHECKING:
    from .flashinfer_trtllm import TrtllmRunner

INNER_AMAX = 4.0  # of a static scale for the second product's input
LOGIT_RANGE = 2.0


def make_bench(runner: TrtllmRunner) -> Bench:
    """Random experts, packed as the runner's own are; what makes a layer's product of so many tokens with them."""
    config, scheme, device = runner.config, runner.scheme, runner.capability.device
    stored, packed = [], []
    for packer, amax in ((runner.w13, INPUT_AMAX), (runner.w2, INNER_AMAX)):
        values = random_stored(scheme, packer.shape, device, amax)
        stored.append(values)
        packed.append(packer.prepare(values) | packer.derive(values))

    def trial(tokens: int) -> Trial:
        x, logits = random_input(tokens, config.hidden_size, device), spread_logits(tokens, config.num_experts, device)
        ids, weights = route(logits, config)
        expected = expected_output(x, ids, weights, scheme, (runner.w13.shape, runner.w2.shape), stored)
        return Trial(partial(runner.run_random, x, logits, *packed), expected, error=0.02)

    return trial


def spread_logits(tokens: int, num_experts: int, device: torch.device) -> Tensor:
    """float32 [tokens, num_experts], every token's the same values in another order: no two experts are nearly tied, so
    that a router with other exponentials chooses the same."""
    order = torch.rand(tokens, num_experts, generator=torch.Generator().manual_seed(SEED + tokens)).argsort(-1)
    return torch.linspace(-LOGIT_RANGE, LOGIT_RANGE, num_experts)[order].to(device)


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
    values, scale = quantize_activation(x, scheme, input_scale, torch.float32)
    values = values if scale is None else values * scale
    return values @ scheme.dequantize(stored, shape).t()
