"""Two grouped GEMMs with SwiGLU between them, as `MoE::Runner::run` composes them (trtllm_fused_moe_runner.cu).

The activation as KernelRunner.h writes it down: x0 * scaleC * (x1 * scaleGate) * sigmoid(alpha * x1 * scaleGate), with
x0 the "up" rows and x1 the "gate" rows, scaleC = output1_scale_scalar, scaleGate = output1_scale_gate_scalar.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .decoding import decode_e2m1, decode_e4m3, decode_nvfp4, split_gated_rows, unshuffle_rows
from .gemms import matmul
from .quantizers import encode_e4m3, quantize_fp8_per_token, quantize_nvfp4, quantize_nvfp4_per_token

NVFP4_SCALE_INV = 1.0 / (448 * 6)


@dataclass
class Scalars:
    """Per local expert, float32 [E]: `up` and `gate` of the first GEMM, `down` of the second; `alpha` of SwiGLU."""

    up: Tensor
    gate: Tensor
    down: Tensor
    alpha: Tensor | None = None


@dataclass
class Choices:
    """Routing: ids int64 [T, top_k] in the global numbering, weights [T, top_k]; the local experts are
    `offset ... offset + num_local`."""

    ids: Tensor
    weights: Tensor
    offset: int
    num_local: int


def swiglu(x0: Tensor, x1: Tensor, scalars: Scalars, expert: int) -> Tensor:
    gate = x1 * scalars.gate[expert]
    slope = 1.0 if scalars.alpha is None else scalars.alpha[expert]
    return x0 * scalars.up[expert] * (gate * torch.sigmoid(slope * gate))


def finalize(expert_rows: Tensor, choices: Choices) -> Tensor:
    """BF16 [T, top_k, H] -> BF16 [T, H]: a float32 sum in the order of the choices; foreign experts are skipped."""
    local = (choices.ids >= choices.offset) & (choices.ids < choices.offset + choices.num_local)
    total = torch.zeros(expert_rows.shape[0], expert_rows.shape[2])
    for slot in range(expert_rows.shape[1]):
        scale = torch.where(local[:, slot], choices.weights[:, slot].double(), 0.0)[:, None]
        total = (total.double() + scale * expert_rows[:, slot].double()).float()  # one rounding: a fused multiply-add
    return total.bfloat16()


def run_experts(num_tokens: int, width: int, choices: Choices, one: Callable[[int, Tensor], Tensor]) -> Tensor:
    """`one(local expert, token rows) -> [rows, width]`, rounded to BF16 and finalized. Idle experts are not called."""
    rows = torch.zeros(num_tokens, choices.ids.shape[1], width, dtype=torch.bfloat16)
    for expert in range(choices.num_local):
        tokens, slots = (choices.ids == expert + choices.offset).nonzero(as_tuple=True)
        if len(tokens):
            rows[tokens, slots] = one(expert, tokens).bfloat16()
    return finalize(rows, choices)


def nvfp4_moe(
    x: Tensor,
    per_token_scale: Tensor | None,
    w13: tuple[Tensor, Tensor],
    w2: tuple[Tensor, Tensor],
    scalars: Scalars,
    choices: Choices,
) -> Tensor:
    """x [T, H] decoded codes; w13, w2 (codes, scale buffers) per expert -> BF16 [T, H].

    Without `per_token_scale` the activation is quantized from float32 with a global scale of 1 (its 1 / a2 is in
    `scalars.up`); with it, it rounds to BF16 and gets a scale for each row.
    """

    def one(expert: int, tokens: Tensor) -> Tensor:
        x0, x1 = split_gated_rows(decode_nvfp4(w13[0][expert], w13[1][expert], "128x4"))
        up, gate = matmul(x[tokens], x0), matmul(x[tokens], x1)
        if per_token_scale is not None:
            row = per_token_scale[tokens][:, None]
            up, gate = up * row, gate * row
        activation = swiglu(up, gate, scalars, expert)
        down = unshuffle_rows(decode_nvfp4(w2[0][expert], w2[1][expert], "128x4"))
        if per_token_scale is None:
            codes, blocks = quantize_nvfp4(activation, torch.ones(1))
            return matmul(decode_blocks(codes, blocks), down) * scalars.down[expert]
        codes, blocks, row = quantize_nvfp4_per_token(activation.bfloat16(), NVFP4_SCALE_INV)
        return matmul(decode_blocks(codes, blocks), down) * (scalars.down[expert] * row[:, None])

    return run_experts(x.shape[0], w2[0].shape[1], choices, one)


def decode_blocks(codes: Tensor, scale: Tensor) -> Tensor:
    """[M, K / 2] codes and [M, K / 16] scale bytes -> [M, K] float32."""
    return decode_e2m1(codes) * decode_e4m3(scale).repeat_interleave(16, dim=1)


def fp8_moe(x: Tensor, w13: Tensor, w2: Tensor, scalars: Scalars, choices: Choices) -> Tensor:
    """Per tensor: E4M3 x [T, H], w13 [E, 2I, H], w2 [E, H, I]; the activation saturates to E4M3 as it stands."""
    x = decode_e4m3(x)

    def one(expert: int, tokens: Tensor) -> Tensor:
        x0, x1 = split_gated_rows(decode_e4m3(w13[expert]))
        activation = swiglu(matmul(x[tokens], x0), matmul(x[tokens], x1), scalars, expert)
        activation = decode_e4m3(encode_e4m3(activation))
        return matmul(activation, unshuffle_rows(decode_e4m3(w2[expert]))) * scalars.down[expert]

    return run_experts(x.shape[0], w2.shape[1], choices, one)


def fp8_channel_moe(
    x: Tensor,
    x_scale: Tensor,
    w13: tuple[Tensor, Tensor],
    w2: tuple[Tensor, Tensor],
    scalars: Scalars,
    choices: Choices,
) -> Tensor:
    """Per channel: x_scale float32 [T, 1]; w13, w2 (E4M3, float32 scale of each row, in the rows' shuffled order).

    The activation rounds to BF16 and is quantized again with a scale for each row.
    """
    x = decode_e4m3(x)

    def one(expert: int, tokens: Tensor) -> Tensor:
        x0, x1 = split_gated_rows(decode_e4m3(w13[0][expert]))
        s0, s1 = split_gated_rows(w13[1][expert])
        row = x_scale[tokens]
        up, gate = matmul(x[tokens], x0) * row * s0, matmul(x[tokens], x1) * row * s1
        activation, row = quantize_fp8_per_token(swiglu(up, gate, scalars, expert).bfloat16())
        down = matmul(activation, unshuffle_rows(decode_e4m3(w2[0][expert])))
        return down * row * unshuffle_rows(w2[1][expert]) * scalars.down[expert]

    return run_experts(x.shape[0], w2[0].shape[1], choices, one)
