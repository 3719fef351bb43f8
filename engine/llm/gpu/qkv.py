"""From the fused q, k, v linear to attention in one launch: norm of every head, rotation, write to the KV cache.

The same roundings as the torch path (`layers/attention.py`): the norm's, then cos and sin in BF16, and BF16 after each
of the rotation's two products and its sum. Only the norm's sum over a head runs in another order (see `norms.py`);
without a norm the results are torch's bits.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....quant.gpu.device import on_own_device
from ....quant.gpu.early import await_inputs, early
from ..layers.norms import NormName
from ..layers.rope import Rotary
from .norms import inverse_rms, normalize

MOST_HEADS = 4  # of a program


@triton.jit
def _load_heads(qkv_ptr, head, col, HEAD_DIM: tl.constexpr):
    offset = head[:, None] * HEAD_DIM + col[None, :]
    return tl.load(qkv_ptr + offset, mask=(col < HEAD_DIM)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _norm_rope(
    qkv_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    head,
    eps,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    COLS: tl.constexpr,
    NORM: tl.constexpr,
):
    """Heads of one token, normed and turned: [heads, COLS].

    A column meets its partner half a rotary_dim away by a second load, in which the whole head is permuted.
    """
    HALF: tl.constexpr = ROTARY_DIM // 2
    col = tl.arange(0, COLS)
    turns = col < ROTARY_DIM
    partner = tl.where(turns, tl.where(col < HALF, col + HALF, col - HALF), col)
    x = _load_heads(qkv_ptr, head, col, HEAD_DIM)
    other = _load_heads(qkv_ptr, head, partner, HEAD_DIM)
    if NORM != "none":
        weight = tl.load(weight_ptr + col, mask=col < HEAD_DIM, other=0.0).to(tl.float32)
        inverse = inverse_rms(x, 1.0 / HEAD_DIM, eps)
        x = normalize(x, inverse, weight[None, :], NORM)
        weight = tl.load(weight_ptr + partner, mask=partner < HEAD_DIM, other=0.0).to(tl.float32)
        other = normalize(other, inverse, weight[None, :], NORM)
    cos = tl.load(cos_ptr + col, mask=turns, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(sin_ptr + col, mask=turns, other=0.0).to(tl.float32)[None, :]
    other = tl.where(col < HALF, other * -1.0, other)
    straight = (x * cos).to(tl.bfloat16).to(tl.float32)
    across = (other * sin).to(tl.bfloat16).to(tl.float32)
    return tl.where(turns[None, :], straight + across, x).to(tl.bfloat16)


@triton.jit
def _as_cached(x, scale_ptr, CACHE: tl.constexpr):
    """BF16 x -> what the cache holds: x, its FP8 codes, or what FP8 gives back of it."""
    if CACHE != "bf16":
        scale = tl.load(scale_ptr)
        values = tl.div_rn(x.to(tl.float32), tl.zeros(x.shape, tl.float32) + scale)
        x = tl.clamp(values, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)
        if CACHE == "rounded":
            x = (x.to(tl.float32) * scale).to(tl.bfloat16)
    return x


@triton.jit
def _qkv_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    q_ptr,
    keys_ptr,
    values_ptr,
    k_scale_ptr,
    v_scale_ptr,
    eps,
    qkv_stride,
    key_stride,
    value_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    COLS: tl.constexpr,
    HEADS: tl.constexpr,
    NORM: tl.constexpr,
    CACHE: tl.constexpr,
    EARLY: tl.constexpr,
):
    """A program for HEADS heads of one token, all of them q's, k's or v's."""
    await_inputs(EARLY)
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * HEADS
    head, col = first + tl.arange(0, HEADS), tl.arange(0, COLS)
    qkv_ptr = qkv_ptr + token * qkv_stride
    cos_ptr = cos_ptr + token * ROTARY_DIM
    sin_ptr = sin_ptr + token * ROTARY_DIM
    exists = (head >= 0)[:, None] & (col < HEAD_DIM)[None, :]
    if first < NUM_HEADS:
        q = _norm_rope(qkv_ptr, q_weight_ptr, cos_ptr, sin_ptr, head, eps, HEAD_DIM, ROTARY_DIM, COLS, NORM)
        tl.store(q_ptr + (token * NUM_HEADS + head)[:, None] * HEAD_DIM + col[None, :], q, mask=exists)
    else:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        exists = exists & (slot >= 0)
        if first < NUM_HEADS + NUM_KV_HEADS:
            k = _norm_rope(qkv_ptr, k_weight_ptr, cos_ptr, sin_ptr, head, eps, HEAD_DIM, ROTARY_DIM, COLS, NORM)
            target = (head - NUM_HEADS)[:, None] * HEAD_DIM + col[None, :]
            tl.store(keys_ptr + slot * key_stride + target, _as_cached(k, k_scale_ptr, CACHE), mask=exists)
        else:
            v = _load_heads(qkv_ptr, head, col, HEAD_DIM).to(tl.bfloat16)
            target = (head - (NUM_HEADS + NUM_KV_HEADS))[:, None] * HEAD_DIM + col[None, :]
            tl.store(values_ptr + slot * value_stride + target, _as_cached(v, v_scale_ptr, CACHE), mask=exists)


@on_own_device
def norm_rope_write(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    kind: NormName,
    rotary: Rotary,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    num_heads: int,
    kv_scales: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """BF16 qkv [num_tokens, (num_heads + 2 kv_heads) * head_dim] -> q [num_tokens, num_heads, head_dim].

    keys, values: BF16 or E4M3 [num_slots, kv_heads, head_dim], a token's heads side by side; k and v of token i are
    written to slot `slots[i]` (int32 or int64 [num_tokens]), nowhere if that is negative.
    `norms`: weights [head_dim] of q's and k's norm, of this `kind` and `eps`.
    `rotary`: cos and sin [num_tokens, 1, rotary_dim] in BF16, of pairs half a rotary_dim apart; columns of a head
    beyond rotary_dim stay as they are.
    `kv_scales`: float32 decode scales [1] of an FP8 cache, for k and v: an E4M3 cache gets the codes, a BF16 one what
    the codes stand for.
    """
    num_tokens, (kv_heads, head_dim) = len(qkv), keys.shape[1:]
    cos, sin = (part.contiguous() for part in rotary)
    _check(qkv, keys, values, cos, num_heads)
    assert kv_scales is not None or keys.dtype == torch.bfloat16
    q = qkv.new_empty(num_tokens, num_heads, head_dim)
    heads, cols = _heads_together(num_heads, kv_heads), 1 << (head_dim - 1).bit_length()
    q_norm, k_norm = norms or (qkv, qkv)  # pointers that the kernel leaves alone
    k_scale, v_scale = kv_scales or (qkv, qkv)
    if num_tokens:
        _qkv_kernel[(num_tokens, (num_heads + 2 * kv_heads) // heads)](
            qkv, q_norm, k_norm, cos, sin, slots, q, keys, values, k_scale, v_scale,
            eps, qkv.stride(0), keys.stride(0), values.stride(0),
            NUM_HEADS=num_heads, NUM_KV_HEADS=kv_heads, HEAD_DIM=head_dim, ROTARY_DIM=cos.shape[-1],
            COLS=cols, HEADS=heads, NORM="none" if norms is None else kind,
            CACHE="bf16" if kv_scales is None else "rounded" if keys.dtype == torch.bfloat16 else "fp8",
            num_warps=max(1, heads * cols // 256), **early(qkv),
        )  # fmt: skip
    return q


def _heads_together(num_heads: int, kv_heads: int) -> int:
    """The largest power of two, `MOST_HEADS` at the most, that divides both counts."""
    heads = MOST_HEADS
    while num_heads % heads or kv_heads % heads:
        heads //= 2
    return heads


def _check(qkv: Tensor, keys: Tensor, values: Tensor, cos: Tensor, num_heads: int) -> None:
    kv_heads, head_dim = keys.shape[1:]
    assert qkv.dtype == cos.dtype == torch.bfloat16
    assert keys.dtype == values.dtype
    assert keys.dtype in (torch.bfloat16, torch.float8_e4m3fn)
    assert qkv.shape[1] == (num_heads + 2 * kv_heads) * head_dim
    assert qkv.stride(1) == 1
    assert values.shape == keys.shape
    assert keys.stride()[1:] == values.stride()[1:] == (head_dim, 1)
    assert cos.shape[-1] % 2 == 0
    assert cos.shape[-1] <= head_dim
