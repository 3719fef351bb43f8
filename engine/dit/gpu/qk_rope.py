"""From the joined q, k, v linear to attention in one launch: RMS norm of every head, rotation, joint rows.

The norm is float32, rounded to BF16 once, as torch's fused one; the rotation is diffusers' `apply_rotary_emb`: pairs of
neighbours, float32, rounded once. A pair is a 32-bit word: low half first.
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
from .streams import Streams, find_row


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
    PAIRS: tl.constexpr,
    HEADS: tl.constexpr,
    COLS: tl.constexpr,
):
    """A program a row and one of q, k, v; [HEADS, COLS] words. v is copied."""
    row, part = tl.program_id(0), tl.program_id(1)
    head, pair = tl.arange(0, HEADS)[:, None], tl.arange(0, COLS)[None, :]
    inside = (head < num_heads) & (pair < PAIRS)
    stream, sample, position = find_row(row, batch, text, image)
    joint = sample * (text + image) + position
    within = (part * num_heads + head) * PAIRS + pair
    row_words = 3 * num_heads * PAIRS
    word = tl.load(qkv_ptr + row.to(tl.int64) * row_words + within, mask=inside, other=0)
    if part < 2:
        if part == 0:
            if stream == 0:
                weight = tl.load(text_q_ptr + pair, mask=pair < PAIRS, other=0)
            else:
                weight = tl.load(image_q_ptr + pair, mask=pair < PAIRS, other=0)
        else:
            if stream == 0:
                weight = tl.load(text_k_ptr + pair, mask=pair < PAIRS, other=0)
            else:
                weight = tl.load(image_k_ptr + pair, mask=pair < PAIRS, other=0)
        cos = tl.load(cos_ptr + position * PAIRS + pair, mask=pair < PAIRS, other=0.0)
        sin = tl.load(sin_ptr + position * PAIRS + pair, mask=pair < PAIRS, other=0.0)
        low, high = _low(word), _high(word)
        inverse = tl.rsqrt(tl.sum(low * low + high * high, axis=1) * share + eps)[:, None]
        low, high = _rounded(low * inverse * _low(weight)), _rounded(high * inverse * _high(weight))
        word = _word(low * cos - high * sin, high * cos + low * sin)
    tl.store(out_ptr + joint.to(tl.int64) * row_words + within, word, mask=inside)


@on_own_device
def qk_norm_rope(
    qkv: Tensor, weights: Sequence[Tensor], cos: Tensor, sin: Tensor, streams: Streams, eps: float
) -> Tensor:
    """BF16 qkv [num_rows, 3 * num_heads * head_dim] -> q and k normed and turned, and v: joint rows of the same width.

    `weights`: BF16 [head_dim], of q and k, or of text q, text k, image q, image k; cos, sin: float32
    [sequence, head_dim / 2]. One stream, whose rows are joint already, is changed in place.
    """
    words = qkv.view(torch.int32)
    in_place = streams.image == 0
    out = qkv if in_place else torch.empty_like(qkv)
    norms = [weight.view(torch.int32) for weight in (*weights, *weights)[:4]]
    pairs = cos.shape[1]
    num_heads = words.shape[1] // (3 * pairs)
    assert qkv.is_contiguous()
    assert all(part.is_contiguous() and len(part) == streams.text + streams.image for part in (cos, sin))
    _qk_rope_kernel[(streams.num_rows, 2 if in_place else 3)](
        words, out.view(torch.int32), *norms, cos, sin, streams.batch, streams.text, streams.image, num_heads,
        1 / (2 * pairs), eps, PAIRS=pairs, HEADS=triton.next_power_of_2(num_heads),
        COLS=triton.next_power_of_2(pairs), num_warps=4,
    )  # fmt: skip
    return out
