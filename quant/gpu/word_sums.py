"""The sums behind the digests of stored values, for a whole stack of units in one launch."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device import on_own_device


@triton.jit
def _mix(index):
    """splitmix64 of an int64, made odd; arithmetic wraps at 64 bits."""
    x = index * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    return (x ^ (x >> 27)) | 1


@triton.jit
def word_sums_kernel(words_ptr, multipliers_ptr, sums_ptr, num_words, ROW: tl.constexpr):
    row, unit = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    index = tl.arange(0, ROW)
    inside = row * ROW + index < num_words
    words = tl.load(words_ptr + unit * num_words + row * ROW + index, mask=inside, other=0)
    total = tl.sum(words * tl.load(multipliers_ptr + index), axis=0)
    tl.atomic_add(sums_ptr + unit, total * _mix(row + 1))  # integers: any order gives the same sum


@on_own_device
def word_sums(words: Tensor, multipliers: Tensor) -> Tensor:
    """int64 [units, n], multipliers int64 [row, a power of two] -> int64 [units], wrapping at 64 bits.

    Sum over rows j of a unit of mix(j + 1) * (sum over i of multipliers[i] * word[j, i]).
    """
    units, num_words = words.shape
    sums = words.new_zeros(units)
    grid = (-(-num_words // len(multipliers)), units)
    word_sums_kernel[grid](words, multipliers, sums, num_words, ROW=len(multipliers), num_warps=4)
    return sums
