"""Which seeds the samples of a call draw with."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

from ..errors import RequestError
from .families import Embeds
from .params import DiffusionParams
from .rollouts import Wanted
from .sample import Seeds

FREE, END = 1 << 31, 1 << 32  # users choose small seeds; torch's CPU generator knows 32 bits


class SeedSource:
    """Gives the samples of every call seeds that no call had, where the user names none.

    They are taken one after the other from the upper half of 32 bits; engines of other `seed` begin elsewhere.
    """

    def __init__(self, seed: int) -> None:
        self._next = FREE + random.Random(seed).randrange(END - FREE)
        self._lock = threading.Lock()

    def wanted(self, params: DiffusionParams, embeds: Sequence[Embeds]) -> list[Wanted]:
        """`params.n` samples of every prompt, prompt-major; `RequestError` if chosen seeds do not suffice."""
        count = len(embeds) * params.n
        base = self._take(count)
        init = base if params.init_seed is None else params.init_seed
        step = base if params.step_seed is None else params.step_seed
        if max(init, step) + count > END:
            raise RequestError(f"{count} seeds from {max(init, step)} on end beyond 2**32 - 1")
        return [
            Wanted(p, one, Seeds(init + _place(p, i, params, "init"), step + _place(p, i, params, "step")))
            for p, one in enumerate(embeds)
            for i in range(params.n)
        ]

    def _take(self, count: int) -> int:
        with self._lock:
            if self._next + count > END:
                self._next = FREE
            self._next += count
            return self._next - count


def _place(prompt: int, sample: int, params: DiffusionParams, kind: str) -> int:
    sharing = params.init_noise if kind == "init" else params.step_noise
    return prompt if sharing == "shared" else prompt * params.n + sample
