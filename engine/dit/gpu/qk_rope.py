"""From the joined q, k, v linear to attention in one launch: RMS norm of every head, rotation, joint rows.

The norm is float32, rounded to BF16 once, as torch's fused one; the rotation is diffusers' `apply_rotary_emb`: pairs of
neighbours, float32, rounded once. A pair is a 32-bit word: low half first. For FP8 attention (`fp8_attention.py`) what
was rounded is written as codes, head by head; v has a kernel of its own, which turns its tiles.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....quant.gpu.device import on_own_device
from ....quant.gpu.quantize import fp8_codes
from .. import fp8_attention
from ..fp8_attention import TILE, AttentionCodes, norm_factor
from .streams import Streams, find_row

LEAST_SCALE = tl.constexpr(fp8_attention.LEAST_SCALE)
ROWS, HEADS = 4, 8  # of a program
V_WARPS = 16  # fewer spill


@triton.jit
def _word(low, high):
    """Two float32, rounded to BF16, as one int32."""
    low = low.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = high.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (low | (high << 16)).to(tl.int32, bitcast=True)


@triton.jit
def _low(word):
    return (word << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(word):
    return (word & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _rounded(x):
    return x.to(tl.bfloat16).to(tl.float32)


@triton.jit
def _qk_rope_kernel(
    qkv_ptr,
    out_ptr,
    scales_ptr,
    text_q_ptr,
    text_k_ptr,
    image_q_ptr,
    image_k_ptr,
    cos_ptr,
    sin_ptr,
    batch,
    text,
    image,
    num_heads,
    share,
    eps,
    factor,
    num_rows,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    HEADS: tl.constexpr,
    COLS: tl.constexpr,
    CODES: tl.constexpr,
):
    """A program some rows and heads of one of q, k, v; [HEADS, ROWS, COLS] words. v is copied. CODES: q and k only, to
    out as E4M3 and scales."""
    part = tl.program_id(2)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[None, :, None]
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None, None]
    pair = tl.arange(0, COLS)[None, None, :]
    inside = (row < num_rows) & (head < num_heads) & (pair < PAIRS)
    stream, sample, position = find_row(row, batch, text, image)
    joint = sample * (text + image) + position
    within = (part * num_heads + head) * PAIRS + pair
    row_words = 3 * num_heads * PAIRS
    word = tl.load(qkv_ptr + row.to(tl.int64) * row_words + within, mask=inside, other=0)
    if part < 2:
        if part == 0:
            text_weight = tl.load(text_q_ptr + pair, mask=pair < PAIRS, other=0)
            image_weight = tl.load(image_q_ptr + pair, mask=pair < PAIRS, other=0)
        else:
            text_weight = tl.load(text_k_ptr + pair, mask=pair < PAIRS, other=0)
            image_weight = tl.load(image_k_ptr + pair, mask=pair < PAIRS, other=0)
        weight = tl.where(stream == 0, text_weight, image_weight)
        turned = (row < num_rows) & (pair < PAIRS)
        cos = tl.load(cos_ptr + position * PAIRS + pair, mask=turned, other=0.0)
        sin = tl.load(sin_ptr + position * PAIRS + pair, mask=turned, other=0.0)
        low, high = _low(word), _high(word)
        inverse = tl.rsqrt(tl.sum(low * low + high * high, axis=2, keep_dims=True) * share + eps)
        low, high = _rounded(low * inverse * _low(weight)), _rounded(high * inverse * _high(weight))
        low, high = low * cos - high * sin, high * cos + low * sin
        if CODES:
            scale = _norm_scale(tl.reshape(text_weight, (1, COLS)), tl.reshape(image_weight, (1, COLS)), factor)
            if tl.program_id(0) + tl.program_id(1) == 0:
                tl.store(scales_ptr + part + tl.arange(0, 1), scale)
            # neighbours as they are converted: the assembler loses codes that are put side by side afterwards
            x = tl.reshape(tl.interleave(_rounded(low), _rounded(high)), (HEADS * ROWS, 2 * COLS))
            codes = tl.reshape(fp8_codes(x, scale), (HEADS, ROWS, 2 * COLS))
            col = tl.arange(0, 2 * COLS)[None, None, :]
            place = ((part * batch + sample) * num_heads + head).to(tl.int64) * (text + image) + position
            wanted = (row < num_rows) & (head < num_heads) & (col < 2 * PAIRS)
            tl.store(out_ptr + place * (2 * PAIRS) + col, codes, mask=wanted)
        else:
            word = _word(low, high)
    if not CODES:
        tl.store(out_ptr + joint.to(tl.int64) * row_words + within, word, mask=inside)


@triton.jit
def _norm_scale(text_weight, image_weight, factor):
    """Words [1, COLS] of the norm weights of both streams -> the decode scale [1]."""
    low = tl.maximum(tl.abs(_low(text_weight)), tl.abs(_low(image_weight)))
    high = tl.maximum(tl.abs(_high(text_weight)), tl.abs(_high(image_weight)))
    scale = tl.max(tl.maximum(low, high), axis=1) * factor
    return tl.where(scale > 0, scale, 1.0)


@triton.jit
def _v_kernel(
    v_ptr,
    codes_ptr,
    scales_ptr,
    batch,
    text,
    image,
    num_heads,
    stride,
    head_dim,
    TILE: tl.constexpr,
    COLS: tl.constexpr,
):
    """A program a tile of tokens and a head: codes [COLS, TILE], tokens within 16 in the order of `V_ORDER`."""
    tile, sample, head = tl.program_id(0), tl.program_id(1) // num_heads, tl.program_id(1) % num_heads
    place, col = tl.arange(0, TILE), tl.arange(0, COLS)
    within = place % 16
    position = tile * TILE + place - within + within // 4 * 2 + within % 2 + within // 2 % 2 * 8
    image_row = batch * text + sample * image + position - text
    row = tl.where(position < text, sample * text + position, image_row).to(tl.int64)
    inside = (position < text + image)[:, None] & (col < head_dim)[None, :]
    v = tl.load(v_ptr + row[:, None] * stride + (head * head_dim + col)[None, :], mask=inside, other=0.0).to(tl.float32)
    amax = tl.max(tl.max(tl.abs(v), axis=1), axis=0, keep_dims=True)
    scale = tl.maximum(tl.div_rn(amax, 448.0 + amax * 0), LEAST_SCALE, propagate_nan=tl.PropagateNan.ALL)
    tl.store(scales_ptr + tl.program_id(1) * tl.num_programs(0) + tile + tl.arange(0, 1), scale)
    codes = tl.trans(fp8_codes(v, scale))
    length = tl.num_programs(0) * TILE
    first = (tl.program_id(1) * head_dim).to(tl.int64)
    out = codes_ptr + (first + col)[:, None] * length + (tile * TILE + place)[None, :]
    tl.store(out, codes, mask=(col < head_dim)[:, None])


@on_own_device
def qk_norm_rope(
    qkv: Tensor, weights: Sequence[Tensor], cos: Tensor, sin: Tensor, streams: Streams, eps: float
) -> Tensor:
    """BF16 qkv [num_rows, 3 * num_heads * head_dim] -> q and k normed and turned, and v: joint rows of the same width.

    `weights`: BF16 [head_dim], of q and k, or of text q, text k, image q, image k; cos, sin: float32
    [sequence, head_dim / 2]. One stream, whose rows are joint already, is changed in place.
    """
    out = qkv if streams.image == 0 else torch.empty_like(qkv)
    _launch(qkv, weights, cos, sin, streams, eps, out.view(torch.int32), None)
    return out


@on_own_device
def qkv_codes(
    qkv: Tensor, weights: Sequence[Tensor], cos: Tensor, sin: Tensor, streams: Streams, eps: float
) -> AttentionCodes:
    """What FP8 attention reads, of the same arguments."""
    batch, tokens, head_dim = streams.batch, streams.text + streams.image, 2 * cos.shape[1]
    num_heads, tiles = qkv.shape[1] // (3 * head_dim), triton.cdiv(tokens, TILE)
    qk = qkv.new_empty(2, batch, num_heads, tokens, head_dim, dtype=torch.float8_e4m3fn)
    qk_scales = qkv.new_empty(2, dtype=torch.float32)
    v = qkv.new_empty(batch, num_heads, head_dim, tiles * TILE, dtype=torch.float8_e4m3fn)
    v_scales = qkv.new_empty(batch, num_heads, tiles, dtype=torch.float32)
    _launch(qkv, weights, cos, sin, streams, eps, qk, qk_scales)
    _v_kernel[(tiles, batch * num_heads)](
        qkv[:, 2 * num_heads * head_dim :], v, v_scales, batch, streams.text, streams.image, num_heads, qkv.shape[1],
        head_dim, TILE=TILE, COLS=triton.next_power_of_2(head_dim), num_warps=V_WARPS,
    )  # fmt: skip
    return AttentionCodes(qk[0], qk[1], v, qk_scales, v_scales)


def _launch(
    qkv: Tensor, weights: Sequence[Tensor], cos: Tensor, sin: Tensor, streams: Streams, eps: float, out: Tensor,
    scales: Tensor | None,
) -> None:  # fmt: skip
    """`out`: words as q, k and v come, or codes, where `scales` are wanted."""
    norms = [weight.view(torch.int32) for weight in (*weights, *weights)[:4]]
    pairs = cos.shape[1]
    words = qkv.view(torch.int32)
    num_heads = words.shape[1] // (3 * pairs)
    assert qkv.is_contiguous()
    assert all(part.is_contiguous() and len(part) == streams.text + streams.image for part in (cos, sin))
    parts = 3 if scales is None and out.data_ptr() != qkv.data_ptr() else 2  # v, too
    heads = min(HEADS, triton.next_power_of_2(num_heads))
    _qk_rope_kernel[(triton.cdiv(streams.num_rows, ROWS), triton.cdiv(num_heads, heads), parts)](
        words, out, words if scales is None else scales, *norms, cos, sin, streams.batch, streams.text, streams.image,
        num_heads, 1 / (2 * pairs), eps, norm_factor(2 * pairs), streams.num_rows, PAIRS=pairs, ROWS=ROWS, HEADS=heads,
        COLS=triton.next_power_of_2(pairs), CODES=scales is not None, num_warps=4,
    )  # fmt: skip
