"""`StepGate`: steps of the rollout loop and visits (commits, pauses, sleeps) exclude each other; visits go first."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class StepGate:
    """Not tied to threads: whoever entered may leave from another thread. A visit inside a visit never returns."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._held = False
        self._visitors = 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """For one step; waits for visitors who came before."""
        with self._condition:
            self._condition.wait_for(lambda: not self._held and not self._visitors)
            self._held = True
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Between two steps."""
        with self._condition:
            self._visitors += 1
            try:
                self._condition.wait_for(lambda: not self._held)
                self._held = True
            finally:
                self._visitors -= 1
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._condition:
            self._held = False
            self._condition.notify_all()
