"""The sums behind the digests of stored values, for every unit of many stacks in one launch."""

# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false
# (to a type checker a kernel is the function that Triton compiles, which takes no launch options)

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import on_own_device

ENTRY = tl.constexpr(5)  # of the table, a stack: address, halves a unit, rows a unit, first sum, constant


@triton.jit
def _mix(index):
    """splitmix64 of an int64, made odd; arithmetic wraps at 64 bits."""
    x = index * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    return (x ^ (x >> 27)) | 1


@triton.jit
def _words(address, halves, index):
    """int64 words of a unit of int32 halves, zeros beyond its end; a unit begins at any multiple of 4 bytes."""
    inside = index < halves // 2
    if address % 8 == 0:
        words = tl.load(address.to(tl.pointer_type(tl.int64)) + index, mask=inside, other=0)
    else:
        start = address.to(tl.pointer_type(tl.int32)) + 2 * index
        low = tl.load(start, mask=inside, other=0).to(tl.int64) & 0xFFFFFFFF
        words = low | (tl.load(start + 1, mask=inside, other=0).to(tl.int64) << 32)
    is_last = (index == halves // 2) & (halves % 2 == 1)
    last = tl.load(address.to(tl.pointer_type(tl.int32)) + 2 * index, mask=is_last, other=0)
    return words | (last.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def word_sums_kernel(table_ptr, multipliers_ptr, sums_ptr, STACKS: tl.constexpr, ROW: tl.constexpr):
    """A program sums one row of one unit; the table's first STACKS numbers say with which program a stack begins."""
    program = tl.program_id(0).to(tl.int64)
    begins = tl.load(table_ptr + tl.arange(0, STACKS))
    which = tl.sum((begins <= program).to(tl.int32), axis=0) - 1
    entry = table_ptr + STACKS + which * ENTRY
    halves, rows = tl.load(entry + 1), tl.load(entry + 2)
    place = program - tl.load(table_ptr + which)
    unit, row = place // rows, place % rows
    index = tl.arange(0, ROW)
    words = _words(tl.load(entry) + unit * halves * 4, halves, row * ROW + index)
    total = tl.sum(words * tl.load(multipliers_ptr + index), axis=0) * _mix(row + 1)
    if row == 0:
        total += tl.load(entry + 4)
    tl.atomic_add(sums_ptr + tl.load(entry + 3) + unit, total)  # integers: any order gives the same sum


def word_sums(stacks: Sequence[Tensor], multipliers: Tensor, constants: Sequence[int]) -> list[Tensor]:
    """Of every stack [units, ...] int64 [units]; bytes of a unit a multiple of 4, stacks contiguous.

    Sum over rows j of a unit of mix(j + 1) * (sum over i of multipliers[i] * word[j, i]) + the stack's constant, words
    int64, the last one filled up with zeros, wrapping at 64 bits; multipliers int64 [row, a power of two].
    """
    begins, entries, program, first = [], [], 0, 0
    counts, row = [stack.shape[0] for stack in stacks], multipliers.shape[0]
    for stack, count, constant in zip(stacks, counts, constants, strict=True):
        halves = stack.nbytes // count // 4
        rows = max(1, -(-halves // (2 * row)))
        begins.append(program)
        entries += [stack.data_ptr(), halves, rows, first, constant]
        program += rows * count
        first += count
    most = triton.next_power_of_2(len(stacks))
    table = torch.tensor([*begins, *[1 << 62] * (most - len(stacks)), *entries])
    sums = torch.zeros(first, dtype=torch.int64, device=multipliers.device)
    if multipliers.is_cuda:
        table = table.pin_memory().to(multipliers.device, non_blocking=True)
    _launch(multipliers, table, sums, program, most)
    return list(sums.split(counts))


@on_own_device
def _launch(multipliers: Tensor, table: Tensor, sums: Tensor, programs: int, most: int) -> None:
    word_sums_kernel[(programs,)](table, multipliers, sums, STACKS=most, ROW=len(multipliers), num_warps=4)
