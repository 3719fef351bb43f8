"""Experts' matrix products: a program computes some rows of one expert's weight for a block of that expert's tokens.

The weight's rows are the tall side of the tile and the tokens its short one, so that a few tokens still fill the matrix
units, and every weight is read once. Sums run over K in one order: a token's result depends on no other token.

NVFP4 weights are widened in registers: an E2M1 code becomes BF16 by moving its bits (times 2**-126), the block scale
(times 2**118) is multiplied in, exactly, and the epilogue puts back 2**8 and the row's scale.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...quant.gpu.device import on_own_device

GROUP = tl.constexpr(16)  # weights of one block scale
SCALE_EXPONENT = tl.constexpr((127 - 12 + 118) << 7)  # BF16 bits of 2**118 over the bias of a UE5M3 scale
EPILOGUE = tl.constexpr(256.0)  # 2**126 / 2**118


@triton.jit
def _pair_rows(sorted_ptr, block, num_pairs, TOKENS: tl.constexpr):
    """The (token, choice) pairs of one block, and which of them exist."""
    pair = tl.load(sorted_ptr + block * TOKENS + tl.arange(0, TOKENS))
    return pair, pair < num_pairs


@triton.jit
def fp8_gate_up(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    row_scale_ptr,
    out_ptr,
    sorted_ptr,
    expert_ptr,
    num_pairs,
    K,
    inner,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """silu(gate) * up of every pair: codes x [tokens, K], w [experts, 2 inner, K] -> BF16 [pairs, inner]."""
    expert = tl.load(expert_ptr + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    pair, exists = _pair_rows(sorted_ptr, tl.program_id(1), num_pairs, TOKENS)
    token = tl.where(exists, pair // TOP_K, 0)
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    gate_ptr = w_ptr + (expert * 2 * inner + row[:, None]) * K + k[None, :]
    up_ptr = gate_ptr + inner.to(tl.int64) * K
    x_ptr = x_ptr + token.to(tl.int64)[None, :] * K + k[:, None]
    gate, up = tl.zeros((ROWS, TOKENS), tl.float32), tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, K, DEPTH, num_stages=STAGES):
        x = tl.load(x_ptr + step)
        gate = tl.dot(tl.load(gate_ptr + step), x, gate)
        up = tl.dot(tl.load(up_ptr + step), x, up)
    x_scale = tl.load(x_scale_ptr + token)[None, :]
    row_scale_ptr = row_scale_ptr + expert * 2 * inner + row
    gate = gate * tl.load(row_scale_ptr)[:, None] * x_scale
    up = up * tl.load(row_scale_ptr + inner)[:, None] * x_scale
    _store_gated(out_ptr, gate, up, pair, row, exists, inner)


@triton.jit
def _store_gated(out_ptr, gate, up, pair, row, exists, inner):
    """BF16 of gate and up first, as two linears would leave them."""
    gate = gate.to(tl.bfloat16).to(tl.float32)
    up = up.to(tl.bfloat16).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(0.0 - gate))).to(tl.bfloat16).to(tl.float32)
    target = out_ptr + pair.to(tl.int64)[None, :] * inner + row[:, None]
    tl.store(target, (activated * up).to(tl.bfloat16), mask=exists[None, :])


@triton.jit
def fp8_down(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    row_scale_ptr,
    out_ptr,
    sorted_ptr,
    expert_ptr,
    num_pairs,
    K,
    N,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Codes x [pairs, K], w [experts, N, K] -> BF16 [pairs, N]."""
    expert = tl.load(expert_ptr + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    pair, exists = _pair_rows(sorted_ptr, tl.program_id(1), num_pairs, TOKENS)
    source = tl.where(exists, pair, 0).to(tl.int64)
    row, k = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DEPTH)
    w_ptr = w_ptr + (expert * N + row[:, None]) * K + k[None, :]
    x_ptr = x_ptr + source[None, :] * K + k[:, None]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, K, DEPTH, num_stages=STAGES):
        total = tl.dot(tl.load(w_ptr + step), tl.load(x_ptr + step), total)
    x_scale = tl.load(x_scale_ptr + source)[None, :]
    total = total * tl.load(row_scale_ptr + expert * N + row)[:, None] * x_scale
    tl.store(out_ptr + pair.to(tl.int64)[None, :] * N + row[:, None], total.to(tl.bfloat16), mask=exists[None, :])


# NVFP4 weights. A byte holds two codes, of k and k + DEPTH / 2: sign0 sign1 mag1[3] mag0[3].


@triton.jit
def _first_code(packed, ASSEMBLY: tl.constexpr):
    """uint8 -> BF16 of the first code, times 2**-126."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 p, a, b;
            prmt.b32 p, $2, 0, 0x1404; shr.u32 a, p, 2; and.b32 b, p, 0x80008000; lop3.b32 $0, a, 0x01C001C0, b, 0xEA;
            prmt.b32 p, $2, 0, 0x3424; shr.u32 a, p, 2; and.b32 b, p, 0x80008000; lop3.b32 $1, a, 0x01C001C0, b, 0xEA;
            }""",
            "=&r,=&r,r",
            [packed],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    bits = packed.to(tl.int16)
    return (((bits & 7) << 6) | ((bits & 0x80) << 8)).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _second_code(packed, ASSEMBLY: tl.constexpr):
    """uint8 -> BF16 of the second code, times 2**-126."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 p, a, b;
            prmt.b32 p, $2, 0, 0x1404; shr.u32 a, p, 5; shl.b32 b, p, 1;
            and.b32 b, b, 0x80008000; lop3.b32 $0, a, 0x01C001C0, b, 0xEA;
            prmt.b32 p, $2, 0, 0x3424; shr.u32 a, p, 5; shl.b32 b, p, 1;
            and.b32 b, b, 0x80008000; lop3.b32 $1, a, 0x01C001C0, b, 0xEA;
            }""",
            "=&r,=&r,r",
            [packed],
            dtype=tl.bfloat16,
            is_pure=True,
            pack=4,
        )
    bits = packed.to(tl.int16)
    return (((bits & 0x38) << 3) | ((bits & 0x40) << 9)).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _scaled(codes, scales, ROWS: tl.constexpr, HALF: tl.constexpr, ASSEMBLY: tl.constexpr):
    """codes BF16 [ROWS, HALF] times UE5M3 scales uint8 [ROWS, HALF // 16]: exact, times 2**-8."""
    scale = ((scales.to(tl.int16) << 4) + SCALE_EXPONENT).to(tl.int16).to(tl.bfloat16, bitcast=True)
    spread = tl.broadcast_to(scale[:, :, None], (ROWS, HALF // GROUP, GROUP)).reshape(ROWS, HALF)
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "mul.rn.bf16x2 $0, $1, $2;", "=r,r,r", [codes, spread], dtype=tl.bfloat16, is_pure=True, pack=2
        )
    return (codes.to(tl.float32) * spread.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _nvfp4_step(
    packed, first_scales, second_scales, x0, x1, total, ROWS: tl.constexpr, HALF: tl.constexpr, ASSEMBLY: tl.constexpr
):
    total = tl.dot(_scaled(_first_code(packed, ASSEMBLY), first_scales, ROWS, HALF, ASSEMBLY), x0, total)
    return tl.dot(_scaled(_second_code(packed, ASSEMBLY), second_scales, ROWS, HALF, ASSEMBLY), x1, total)


@triton.jit
def nvfp4_gate_up(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    scale_ptr,
    row_scale_ptr,
    out_ptr,
    sorted_ptr,
    expert_ptr,
    num_pairs,
    K,
    inner,
    TOP_K: tl.constexpr,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """silu(gate) * up of every pair: x BF16 [tokens, K], w packed [experts, 2 inner, K / 2] -> BF16 [pairs, inner].

    SCALED: x are exact products of codes and block scales, and every token has a scale.
    """
    expert = tl.load(expert_ptr + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    HALF: tl.constexpr = DEPTH // 2
    GROUPS: tl.constexpr = HALF // GROUP
    pair, exists = _pair_rows(sorted_ptr, tl.program_id(1), num_pairs, TOKENS)
    token = tl.where(exists, pair // TOP_K, 0)
    row, k, group = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HALF), tl.arange(0, GROUPS)
    gate_ptr = w_ptr + (expert * 2 * inner + row[:, None]) * (K // 2) + k[None, :]
    up_ptr = gate_ptr + inner.to(tl.int64) * (K // 2)
    half_size = 2 * inner * GROUPS  # scales of one half of one step
    gate_scale_ptr = scale_ptr + expert * (K // HALF) * half_size + row[:, None] * GROUPS + group[None, :]
    up_scale_ptr = gate_scale_ptr + inner * GROUPS
    x_ptr = x_ptr + token.to(tl.int64)[None, :] * K + k[:, None]
    gate, up = tl.zeros((ROWS, TOKENS), tl.float32), tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, K // DEPTH, num_stages=STAGES):
        x0, x1 = tl.load(x_ptr + step * DEPTH), tl.load(x_ptr + step * DEPTH + HALF)
        at, scale_at = step * HALF, step * 2 * half_size
        first, second = tl.load(gate_scale_ptr + scale_at), tl.load(gate_scale_ptr + scale_at + half_size)
        gate = _nvfp4_step(tl.load(gate_ptr + at), first, second, x0, x1, gate, ROWS, HALF, ASSEMBLY)
        first, second = tl.load(up_scale_ptr + scale_at), tl.load(up_scale_ptr + scale_at + half_size)
        up = _nvfp4_step(tl.load(up_ptr + at), first, second, x0, x1, up, ROWS, HALF, ASSEMBLY)
    row_scale_ptr = row_scale_ptr + expert * 2 * inner + row
    gate = gate * (tl.load(row_scale_ptr) * EPILOGUE)[:, None]
    up = up * (tl.load(row_scale_ptr + inner) * EPILOGUE)[:, None]
    if SCALED:
        x_scale = tl.load(x_scale_ptr + token)[None, :]
        gate, up = gate * x_scale, up * x_scale
    _store_gated(out_ptr, gate, up, pair, row, exists, inner)


@triton.jit
def nvfp4_down(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    scale_ptr,
    row_scale_ptr,
    out_ptr,
    sorted_ptr,
    expert_ptr,
    num_pairs,
    K,
    N,
    ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
    SCALED: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    """x BF16 [pairs, K], w packed [experts, N, K / 2] -> BF16 [pairs, N]."""
    expert = tl.load(expert_ptr + tl.program_id(1)).to(tl.int64)
    if expert < 0:
        return
    HALF: tl.constexpr = DEPTH // 2
    GROUPS: tl.constexpr = HALF // GROUP
    pair, exists = _pair_rows(sorted_ptr, tl.program_id(1), num_pairs, TOKENS)
    source = tl.where(exists, pair, 0).to(tl.int64)
    row, k, group = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HALF), tl.arange(0, GROUPS)
    w_ptr = w_ptr + (expert * N + row[:, None]) * (K // 2) + k[None, :]
    half_size = N * GROUPS
    scale_ptr = scale_ptr + expert * (K // HALF) * half_size + row[:, None] * GROUPS + group[None, :]
    x_ptr = x_ptr + source[None, :] * K + k[:, None]
    total = tl.zeros((ROWS, TOKENS), tl.float32)
    for step in tl.range(0, K // DEPTH, num_stages=STAGES):
        x0, x1 = tl.load(x_ptr + step * DEPTH), tl.load(x_ptr + step * DEPTH + HALF)
        first = tl.load(scale_ptr + step * 2 * half_size)
        second = tl.load(scale_ptr + step * 2 * half_size + half_size)
        total = _nvfp4_step(tl.load(w_ptr + step * HALF), first, second, x0, x1, total, ROWS, HALF, ASSEMBLY)
    total = total * (tl.load(row_scale_ptr + expert * N + row) * EPILOGUE)[:, None]
    if SCALED:
        total = total * tl.load(x_scale_ptr + source)[None, :]
    tl.store(out_ptr + pair.to(tl.int64)[None, :] * N + row[:, None], total.to(tl.bfloat16), mask=exists[None, :])


@triton.jit
def finalize_kernel(x_ptr, weight_ptr, out_ptr, N, TOP_K: tl.constexpr, COLS: tl.constexpr):
    """Sum over a token's choices, in their order, in float32: BF16 [tokens, TOP_K, N] -> BF16 [tokens, N]."""
    token = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = col < N
    total = tl.zeros((COLS,), tl.float32)
    for choice in range(TOP_K):
        x = tl.load(x_ptr + (token * TOP_K + choice) * N + col, mask=inside, other=0.0).to(tl.float32)
        total += x * tl.load(weight_ptr + token * TOP_K + choice)
    tl.store(out_ptr + token * N + col, total.to(tl.bfloat16), mask=inside)


@on_own_device
def finalize(x: Tensor, weights: Tensor) -> Tensor:
    """BF16 [tokens, top_k, N], float32 [tokens, top_k] -> BF16 [tokens, N]."""
    tokens, top_k, N = x.shape
    out = x.new_empty(tokens, N)
    finalize_kernel[(tokens, -(-N // 1024))](x, weights, out, N, TOP_K=top_k, COLS=1024, num_warps=4)
    return out
