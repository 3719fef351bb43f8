"""Draws tokens, and says how likely they were, from logits as the head leaves them: two launches, one pass.

What is computed is the softmax of `Likelihoods`, in its order: exp(logits / temperature - peak) is summed in float32
over blocks of tokens, blocks are added in float64, and a token is found by a search over blocks and one within its
block. No copy of the vocabulary is written, and a row does not depend on the other rows.
"""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....quant.gpu.device import on_own_device
from ..likelihoods import BLOCK

PART = 16  # blocks of one program of the first kernel, which share a peak


@triton.jit
def _scaled(logits_ptr, temperature_ptr, row, ids, vocab, stride):
    """logits / temperature of one row, float32; -inf outside."""
    logits = tl.load(logits_ptr + row.to(tl.int64) * stride + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    return tl.div_rn(logits, tl.zeros_like(logits) + tl.load(temperature_ptr + row))


@triton.jit
def _finite(peak):
    """What is subtracted: 0 where there is nothing but -inf."""
    return tl.where(peak == float("-inf"), 0.0, peak)


@triton.jit
def _sum_kernel(
    logits_ptr,
    temperature_ptr,
    sums_ptr,
    peaks_ptr,
    best_ptr,
    vocab,
    stride,
    num_parts,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    row, part = tl.program_id(0), tl.program_id(1)
    at = tl.arange(0, PART * BLOCK)
    ids = part * PART * BLOCK + at
    scaled = _scaled(logits_ptr, temperature_ptr, row, ids, vocab, stride)
    peak = tl.max(scaled, axis=0)
    weights = tl.exp(scaled - _finite(peak))
    sums = tl.sum(tl.reshape(weights, (PART, BLOCK)), axis=1)
    cell = row * num_parts + part
    tl.store(sums_ptr + cell * PART + tl.arange(0, PART), sums)
    tl.store(peaks_ptr + cell, peak)
    tl.store(best_ptr + cell, part * PART * BLOCK + tl.min(tl.where(scaled == peak, at, PART * BLOCK - 1), axis=0))


@triton.jit
def _search(weights, at, target):
    """Where `target` falls in the cumulative sum of weights, never at or beyond the last positive one's end, and how
    far it goes into what lies there."""
    cdf = tl.cumsum(weights, axis=0)
    last = tl.max(tl.where(weights > 0, at, 0), axis=0)
    found = tl.minimum(tl.sum((cdf <= target).to(tl.int32), axis=0), last)
    before = tl.sum(tl.where(at == found, cdf - weights, 0.0), axis=0)
    return found, tl.maximum(target - before, 0.0)


@triton.jit
def _drawn_id(
    logits_ptr,
    temperature_ptr,
    uniform_ptr,
    best_ptr,
    masses,
    total,
    peaks,
    peak,
    row,
    vocab,
    stride,
    num_parts,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Where the row's number falls among the masses of blocks and within one; the likeliest where it is negative."""
    parts, blocks = tl.arange(0, PARTS), tl.arange(0, PARTS * PART)
    uniform = tl.load(uniform_ptr + row)
    block, rest = _search(masses, blocks, uniform * total)
    ids = tl.arange(0, BLOCK)
    scaled = _scaled(logits_ptr, temperature_ptr, row, block * BLOCK + ids, vocab, stride)
    inner = tl.exp(scaled - peak).to(tl.float64)
    mass = tl.sum(tl.where(blocks == block, masses, 0.0), axis=0)
    within, _ = _search(inner, ids, rest / mass * tl.sum(inner, axis=0))
    part = tl.min(tl.where(peaks == peak, parts, num_parts - 1), axis=0)
    greedy = tl.load(best_ptr + row * num_parts + part)
    return tl.minimum(tl.where(uniform < 0, greedy, block * BLOCK + within), vocab - 1)


@triton.jit
def _draw_kernel(
    logits_ptr,
    temperature_ptr,
    uniform_ptr,
    given_ptr,
    sums_ptr,
    peaks_ptr,
    best_ptr,
    ids_ptr,
    values_ptr,
    num_rows,
    vocab,
    stride,
    num_parts,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    PARTS: tl.constexpr,
    GIVEN: tl.constexpr,
):
    """GIVEN: the ids are, and nothing is drawn."""
    row = tl.program_id(0)
    parts, blocks = tl.arange(0, PARTS), tl.arange(0, PARTS * PART)
    peaks = tl.load(peaks_ptr + row * num_parts + parts, mask=parts < num_parts, other=float("-inf"))
    peak = tl.max(peaks, axis=0)
    sums = tl.load(sums_ptr + row * num_parts * PART + blocks, mask=blocks < num_parts * PART, other=0.0)
    own = tl.load(peaks_ptr + row * num_parts + blocks // PART, mask=blocks < num_parts * PART, other=float("-inf"))
    masses = sums.to(tl.float64) * tl.exp(own - peak).to(tl.float64)  # NaN where a row has no peak
    total = tl.sum(masses, axis=0)

    if GIVEN:
        id = tl.load(given_ptr + row).to(tl.int32)
    else:
        id = _drawn_id(
            logits_ptr, temperature_ptr, uniform_ptr, best_ptr, masses, total, peaks, peak, row, vocab, stride,
            num_parts, BLOCK, PART, PARTS,
        )  # fmt: skip
    chosen = tl.load(logits_ptr + row.to(tl.int64) * stride + id).to(tl.float32)
    logprob = (tl.div_rn(chosen, tl.load(temperature_ptr + row)) - peak).to(tl.float64) - tl.log(total)
    tl.store(ids_ptr + row, id.to(tl.int64))
    tl.store(values_ptr + row, id.to(tl.float64))
    tl.store(values_ptr + num_rows + row, logprob)


@on_own_device
def draw(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw from softmax(logits / temperature): ids int64 [batch], and float64 [2, batch]: the ids, their log-probs.

    logits float32 or BF16 [batch, vocab], rows any stride apart; temperatures float32 [batch]; uniforms float64
    [batch] in [0, 1), or -1 for the likeliest token, the first of equals. NaN or +inf in a row, or nothing but -inf,
    gives NaN.
    """
    return _launch(logits, temperatures, uniforms, None)


@on_own_device
def score(logits: Tensor, temperatures: Tensor, ids: Tensor) -> Tensor:
    """Log-probs float64 [batch] of token ids int64 [batch], the bits that `draw` gives for them."""
    return _launch(logits, temperatures, None, ids)[1][1]


def _launch(
    logits: Tensor, temperatures: Tensor, uniforms: Tensor | None, given: Tensor | None
) -> tuple[Tensor, Tensor]:
    (batch, vocab), device = logits.shape, logits.device
    num_parts = triton.cdiv(vocab, PART * BLOCK)
    sums = torch.empty(batch, num_parts * PART, dtype=torch.float32, device=device)
    peaks = torch.empty(batch, num_parts, dtype=torch.float32, device=device)
    best = torch.empty(batch, num_parts, dtype=torch.int32, device=device)
    ids = torch.empty(batch, dtype=torch.long, device=device)
    values = torch.empty(2, batch, dtype=torch.float64, device=device)
    parts, sizes = (sums, peaks, best), {"BLOCK": BLOCK, "PART": PART}
    shape = (vocab, logits.stride(0), num_parts)
    _sum_kernel[(batch, num_parts)](logits, temperatures, *parts, *shape, **sizes, num_warps=8)
    wanted = (uniforms, ids) if given is None else (given, given)  # what is not read is some pointer
    _draw_kernel[(batch,)](
        logits, temperatures, *wanted, *parts, ids, values, batch, *shape,
        PARTS=triton.next_power_of_2(num_parts), GIVEN=given is not None, **sizes, num_warps=4,
    )  # fmt: skip
    return ids, values
