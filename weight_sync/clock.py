"""Seconds by phase."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from .messages import Phase


class Clock:
    """Adds up wall-clock seconds by phase; phases may nest, an inner phase is not counted in the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[Phase, float] = dict.fromkeys(("receive", "quantize", "prepare", "commit", "pause"), 0.0)
        self._inner = 0.0

    @contextmanager
    def __call__(self, phase: Phase) -> Iterator[None]:
        start, outer, self._inner = time.perf_counter(), self._inner, 0.0
        try:
            yield
        finally:
            total = time.perf_counter() - start
            self.seconds[phase] += total - self._inner
            self._inner = outer + total
