"""`StepGate`: steps of the rollout loop and visits (commits, pauses, sleeps) exclude each other; visits go first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StepGate:
    """Not tied to threads: whoever entered may leave from another thread. Within a visit, the thread that entered it
    passes again: nobody else steps meanwhile.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._held = False
        self._visitors = 0
        self._visitor: int | None = None  # the thread whose visit it is

    @contextmanager
    def step(self, needless: Callable[[], bool]) -> Iterator[bool]:
        """For one step: True; waits for visitors who came before. False once the step has become `needless`."""
        if self._visitor == threading.get_ident():
            yield not needless()
            return
        with self._condition:
            self._condition.wait_for(lambda: needless() or not (self._held or self._visitors))
            enters = not needless()
            self._held |= enters
        try:
            yield enters
        finally:
            if enters:
                self._leave()

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Between two steps."""
        if self._visitor == threading.get_ident():
            yield
            return
        with self._condition:
            self._visitors += 1
            try:
                self._condition.wait_for(lambda: not self._held)
                self._held, self._visitor = True, threading.get_ident()
            finally:
                self._visitors -= 1
                self._condition.notify_all()  # a step may have waited for this visitor only
        try:
            yield
        finally:
            self._leave()

    def _leave(self) -> None:
        with self._condition:
            self._held, self._visitor = False, None
            self._condition.notify_all()
