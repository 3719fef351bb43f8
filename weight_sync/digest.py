"""Digests of stored values: equal however the tensors came (order, buckets, split or joined), on CPU and GPU."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
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
    queue = DigestQueue()
    digests = queue.add(stack)
    queue.run()
    return digests.values


class UnitDigests:
    """`values`: signed int64 [units], there once the queue has run."""

    values: Tensor


class DigestQueue:
    """Digests of the units of many stacks, which a GPU computes in one launch.

    Stacks that wait are held; `add` runs the queue where they become more than `limit` bytes.
    """

    def __init__(self, limit: int = 1 << 29) -> None:
        self.limit = limit
        self._held = 0
        self._stacks: list[Tensor] = []
        self._digests: list[UnitDigests] = []

    def add(self, stack: Tensor) -> UnitDigests:
        """Of every unit of [units, ...]; on a CPU at once."""
        digests = UnitDigests()
        if not has_kernels(stack):
            digests.values = torch.tensor([signed(tensor_digest(unit)) for unit in stack], dtype=torch.int64)
            return digests
        self._stacks.append(stack)
        self._digests.append(digests)
        self._held += stack.nbytes
        if self._held > self.limit:
            self.run()
        return digests

    def run(self) -> None:
        """Launch what waits."""
        stacks, digests = self._stacks, self._digests
        self._stacks, self._digests, self._held = [], [], 0
        if not stacks:
            return
        from ..quant.gpu.word_sums import word_sums

        raw = [_in_halves(stack) for stack in stacks]
        lengths = [signed(stack.nbytes // stack.shape[0] * LENGTH & MASK) for stack in stacks]
        for one, values in zip(digests, word_sums(raw, _word_multipliers(raw[0].device), lengths), strict=True):
            one.values = values


def _in_halves(stack: Tensor) -> Tensor:
    """The stack, or a copy of it that begins and whose units end at multiples of 4 bytes, filled up with zeros."""
    stack = stack.detach().contiguous()
    size = stack.nbytes // stack.shape[0]
    if size % 4 == 0 and stack.data_ptr() % 4 == 0:
        return stack
    return F.pad(stack.view(stack.shape[0], -1).view(torch.uint8), (0, -size % 4)).clone()


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


def read_units(digests: Sequence[Tensor]) -> Tensor:
    """All these, in order, in one tensor on the host: a GPU tells its own in one transfer, the rest are there.

    Both kinds meet where a checkpoint's packed tensors, on the host, go to a GPU that quantizes the others.
    """
    told = list(digests)
    for device in {values.device for values in digests}:
        there = [i for i, values in enumerate(digests) if values.device == device]
        whole = torch.cat([digests[i] for i in there]).cpu()
        for i, values in zip(there, whole.split([len(digests[i]) for i in there]), strict=True):
            told[i] = values
    return torch.cat(told)


def combine_units(digests: Tensor, pieces: Sequence[range]) -> list[int]:
    """Digests of units, int64 on the host, piece by piece of stacks -> what each piece adds to its stack's digest.

    That is the sum of digest_u * odd(u), which for unit 0 alone is its own digest.
    """
    factors = torch.cat([_odd_multipliers(units.stop)[units.start :] for units in pieces])
    sums = (digests * factors).cumsum(0)  # wraps at 64 bits
    ends = sums[torch.tensor([len(units) for units in pieces]).cumsum(0) - 1].tolist()
    return [(end - before) & MASK for before, end in zip([0, *ends], ends, strict=False)]


@cache
def _odd_multipliers(count: int) -> Tensor:
    return (torch.arange(count) * signed(LENGTH)) | 1


def weights_digest(entries: Iterable[tuple[str, str, int]]) -> str:
    """SHA-256 over (slot, stored tensor, digest) in name order: what `engine.digest()` returns."""
    lines = sorted(f"{slot} {tensor} {digest:016x}" for slot, tensor, digest in entries)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
