"""Digests of stored values: equal however the tensors came (order, buckets, split or joined), on CPU and GPU."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..quant.scheme import has_kernels

MASK = (1 << 64) - 1
WORDS = 2048  # int64 words a row of the first pass
LENGTH = 0x9E3779B97F4A7C15  # times the bytes of a tensor, so that zeros count


def _mix(index: Tensor) -> Tensor:
    """splitmix64 of an int64 index, made odd: a multiplier a position (arithmetic wraps at 64 bits)."""
    x = index * -7046029254386353131
    x = (x ^ (x >> 30)) * -4658895280553007687
    return (x ^ (x >> 27)) | 1


@cache
def _word_multipliers(device: torch.device) -> Tensor:
    return _mix(torch.arange(1, WORDS + 1, device=device))


def tensor_digest(value: Tensor) -> int:
    """64-bit multilinear hash of a tensor's bytes: sum over rows of m_j * (sum over words of m_i * word_ji)."""
    raw = value.detach().contiguous().view(-1).view(torch.uint8)
    whole = raw.numel() // (WORDS * 8) * (WORDS * 8)
    total = _rows_digest(raw[:whole], 1) if whole else 0
    if whole < raw.numel():
        tail = torch.zeros(WORDS * 8, dtype=torch.uint8, device=raw.device)
        tail[: raw.numel() - whole] = raw[whole:]
        total += _rows_digest(tail, whole // (WORDS * 8) + 1)
    return (total + raw.numel() * LENGTH) & MASK


def unit_digests(stack: Tensor) -> Tensor:
    """`tensor_digest` of every unit of [units, ...] as signed int64 [units]; a GPU computes it while others go on."""
    if not has_kernels(stack):
        return torch.tensor([signed(tensor_digest(unit)) for unit in stack], dtype=torch.int64)
    from ..quant.gpu.word_sums import word_sums

    raw = stack.detach().contiguous().view(len(stack), -1).view(torch.uint8)
    size = raw.shape[1]
    if size % 8 or raw.data_ptr() % 8:
        raw = F.pad(raw, (0, -size % 8)).clone()
    sums = word_sums(raw.view(torch.int64), _word_multipliers(raw.device))
    return sums + signed(size * LENGTH & MASK)


def signed(value: int) -> int:
    """The same 64 bits, as torch's int64 says them."""
    return value - (1 << 64) if value >> 63 else value


def _rows_digest(raw: Tensor, first_row: int) -> int:
    if raw.data_ptr() % 8:
        raw = raw.clone()
    total, rows, step = 0, raw.view(torch.int64).view(-1, WORDS), 64
    if raw.device.type != "cpu":
        step = len(rows)
    for start in range(0, len(rows), step):  # small steps keep the products in a CPU's cache
        sums = (rows[start : start + step] * _word_multipliers(raw.device)).sum(1)
        index = torch.arange(first_row + start, first_row + start + len(sums), device=raw.device)
        total += int((sums * _mix(index)).sum())
    return total


def combine_stack(digests: Tensor) -> int:
    """One digest of those of all units, int64 on the host: sum of digest_u * odd(u); that of unit 0 if it is alone."""
    return int((digests * _odd_multipliers(len(digests))).sum()) & MASK  # wraps at 64 bits


@cache
def _odd_multipliers(count: int) -> Tensor:
    return (torch.arange(count) * signed(LENGTH)) | 1


def weights_digest(entries: Iterable[tuple[str, str, int]]) -> str:
    """SHA-256 over (slot, stored tensor, digest) in name order: what `engine.digest()` returns."""
    lines = sorted(f"{slot} {tensor} {digest:016x}" for slot, tensor, digest in entries)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
