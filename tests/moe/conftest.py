"""Routed experts written out: weights as checkpoints store them, a fake-quantizing loop over tokens and choices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rollmill.moe import RoutedExperts
from rollmill.quant import FP8, NVFP4, Scheme

MIDPOINTS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def round_e4m3(x: Tensor) -> Tensor:
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def round_e2m1(x: Tensor) -> Tensor:
    """Nearest, ties to the even code: an odd midpoint index goes up, an even one down."""
    a = x.abs()
    code = torch.bucketize(a, MIDPOINTS)
    code = torch.where((a == MIDPOINTS[1]) | (a == MIDPOINTS[3]) | (a == MIDPOINTS[5]), code + 1, code)
    return MAGNITUDES[code].copysign(x)


def fake_quantize(x: Tensor, scheme: Scheme, input_scale: Tensor | None) -> Tensor:
    """One token [K], float32, as the GEMM sees it: FP8 over amax / 448; FlashInfer's exact recipe for NVFP4."""
    if scheme.activation == "none":
        return x.double()
    amax = x.abs().amax()
    if isinstance(scheme, FP8):
        scale = amax / 448 if input_scale is None else input_scale
        return round_e4m3(x / scale).double() * scale.double()
    encode = (2688 / amax.double()).float() if input_scale is None else 1 / input_scale
    blocks = x.view(-1, 16)
    block_scale = round_e4m3(blocks.abs().amax(-1) * (encode * torch.tensor(1 / 6)))
    codes = round_e2m1(blocks * (1 / (block_scale * (1 / encode)))[:, None])
    return ((codes * block_scale[:, None]).double() / encode.double()).flatten()


def decode_weight(stored: dict[str, Tensor], rows: tuple[int, ...]) -> Tensor:
    """One expert's stored tensors -> float64 [N, K]; per-tensor scales are one a shard."""
    if "weight_scale_2" in stored:
        codes = torch.stack([stored["weight"] & 15, stored["weight"] >> 4], dim=-1).flatten(-2).long()
        values = MAGNITUDES[codes & 7].double() * (1 - 2 * (codes >> 3))
        values = values * stored["weight_scale"].double().repeat_interleave(16, -1)
        scale = stored["weight_scale_2"]
    elif "weight_scale" in stored:
        values, scale = stored["weight"].double(), stored["weight_scale"]
    else:
        return stored["weight"].double()
    per_row = scale if len(scale) == sum(rows) else torch.cat([s.expand(n) for s, n in zip(scale, rows, strict=True)])
    return values * per_row.double()[:, None]


@pytest.fixture(scope="session")
def expert_loop() -> Callable[..., Tensor]:
    """out[t] = sum over choices of weight * down(silu(gate(x)) * up(x)), token by token.

    Products in float64; what lies between them is rounded to the dtype of x, as an engine in that dtype does.
    """

    def run(x, ids, weights, scheme, w13: dict[str, Tensor], w2: dict[str, Tensor]) -> Tensor:
        out = torch.zeros(x.shape, dtype=torch.float64)
        inner = w13["weight"].shape[1] // 2
        for expert in range(len(w13["weight"])):
            first = {name: tensor[expert] for name, tensor in w13.items()}
            second = {name: tensor[expert] for name, tensor in w2.items()}
            gate_up, down = decode_weight(first, (inner, inner)), decode_weight(second, (x.shape[1],))
            scales = first.get("input_scale", [None, None]), second.get("input_scale", [None])
            for token, choice in (ids == expert).nonzero().tolist():
                gate = gate_up[:inner] @ fake_quantize(x[token].float(), scheme, scales[0][0])
                up = gate_up[inner:] @ fake_quantize(x[token].float(), scheme, scales[0][1])
                hidden = F.silu(gate.to(x.dtype)) * up.to(x.dtype)
                y = down @ fake_quantize(hidden.float(), scheme, scales[1][0])
                out[token] += weights[token, choice].double() * y
        return out

    return run


@pytest.fixture(scope="session")
def bf16_experts() -> Callable[..., tuple[Tensor, Tensor]]:
    """gate_up [E, 2 I, H] and down [E, H, I] in BF16; gate and up of unequal size, experts of unequal size."""

    def make(num_experts: int, inner: int, hidden: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(0)
        size = 1 + torch.arange(num_experts).view(-1, 1, 1) / num_experts
        gate_up = torch.randn(num_experts, 2 * inner, hidden, generator=generator) * size / hidden**0.5
        gate_up[:, inner:] *= 2
        down = torch.randn(num_experts, hidden, inner, generator=generator) * size / inner**0.5
        return gate_up.bfloat16(), down.bfloat16()

    return make


@pytest.fixture(scope="session")
def fill() -> Callable[..., None]:
    """Write stored stacks into the two slots as a session does: prepare, derive, commit."""

    def write(experts: RoutedExperts, *stacks: dict[str, Tensor]) -> None:
        for slot, stored in zip(experts.slots, stacks, strict=True):
            scales = {name: stored[name] for name in slot.scale_specs}
            packed = slot.packer.prepare({name: stored[name] for name in slot.matrices})
            slot.commit({**packed, **slot.packer.derive(scales)}, scales, dict.fromkeys(stored, 1))

    return write


@pytest.fixture(scope="session")
def stored_experts(bf16_experts) -> Callable[..., tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The stacks in a scheme's stored form; quantization itself is held by tests/quant."""

    def make(experts: RoutedExperts, num_experts: int, inner: int, hidden: int):
        stacks = []
        for slot, weight in zip(experts.slots, bf16_experts(num_experts, inner, hidden), strict=True):
            stored = slot.scheme.quantize(weight, slot.shape)
            if slot.scheme.activation == "static":
                limit = 2688 if isinstance(slot.scheme, NVFP4) else 448
                factors = 1 + torch.arange(num_experts * len(slot.shape.rows)).view(num_experts, -1) / 10
                stored["input_scale"] = 3.0 * factors / limit
            stacks.append(stored)
        return tuple(stacks)

    return make
