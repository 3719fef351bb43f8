"""Kernels are built and checked before an engine is ready, not under its first request."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from ..quant import WeightSlot
from ..quant.flashinfer_api.tactics import Served, TacticGuard
from ..quant.siblings import SplitPacker

log = logging.getLogger("rollmill")


def prewarm(slots: Iterable[WeightSlot], token_counts: Iterable[int]) -> list[Served]:
    """Let every guarded kernel choose its tactic for these numbers of tokens, which builds what it lacks.

    `UnsupportedError` where no tactic computes what the reference does. Other numbers are checked when they first come.
    """
    guards, counts = guards_of(slots), list(token_counts)
    served = []
    for guard in guards:
        for tokens in counts:
            served.append(guard.prepare(tokens))
            done = f"{len(served)} of {len(guards) * len(counts)}"
            log.info("self-check %s: %s, %d tokens: %s", done, guard.product, tokens, served[-1].tactic)
    return served


def guards_of(slots: Iterable[WeightSlot]) -> list[TacticGuard]:
    """The guards of the kernels that these slots are packed for, each once."""
    found: dict[int, TacticGuard] = {}
    for slot in slots:
        for packer in slot.packer.kernels if isinstance(slot.packer, SplitPacker) else (slot.packer,):
            guard = getattr(packer, "guard", None)
            if isinstance(guard, TacticGuard):
                found[id(guard)] = guard
    return list(found.values())


def powers_of_two(largest: int) -> list[int]:
    """1, 2, 4 up to the first that is not below `largest`."""
    return [1 << bits for bits in range((largest - 1).bit_length() + 1)]
