"""Kernels are built and checked before an engine is ready, not under its first request."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..quant import WeightSlot
from ..quant.flashinfer_api.guard import Served, TacticGuard
from ..quant.siblings import SplitPacker

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())

log = logging.getLogger("rollmill")


def prewarm(slots: Iterable[WeightSlot], token_counts: Iterable[int]) -> list[Served]:
    """Let every guarded kernel choose its tactic for these numbers of tokens, which builds what it lacks.

    `UnsupportedError` where no tactic computes what the reference does. Other numbers are checked when they first come.
    """
    guards, counts = guards_of(slots), list(token_counts)
    served: list[Served] = []
    if not guards:
        return served
    console = Console(stderr=True)
    with Progress(*COLUMNS, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=len(guards))
        for done, guard in enumerate(guards, 1):
            bar.update(task, description=f"building and checking {guard.product}")
            served += guard.prepare(*counts)
            bar.advance(task)
            log.info("%s is checked (%d of %d)", guard.product, done, len(guards))
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
