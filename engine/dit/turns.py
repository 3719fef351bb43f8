"""`Turns`: who may compute right now; swaps, pauses and sleep come between two turns."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from ...weight_sync import Policy
from ..errors import ClosedError, PausedError, PoisonedError
from ..step_gate import StepGate


class Turns:
    """Batches of rollouts and direct calls of a transformer take turns, each over one version of the weights.

    Pauses and missing weights hold rollouts up; a direct call waits for the turn before it and for swaps only.
    """

    def __init__(self, policy: Policy, device: torch.device) -> None:
        self.gate = StepGate()
        self.closed = False
        self._policy, self._device = policy, device
        self._may_run = threading.Event()
        self._may_run.set()
        self._pausers: set[threading.Thread] = set()
        self._has_weights = threading.Event()
        self._has_weights.set()
        self._mine = threading.local()  # .held: whether it is this thread's turn
        policy.commit_gate = self.gate.visit
        policy.on_flip.append(self._has_weights.set)

    @contextmanager
    def batch(self) -> Iterator[str]:
        """For one batch of a rollout: the version of its weights. Waits for `resume`, and for weights after sleep."""
        if threading.current_thread() in self._pausers:
            raise PausedError("this thread has paused the engine and would wait for itself: call resume() first")
        while True:
            self._may_run.wait()
            self._has_weights.wait()
            with self.gate.step(lambda: self.paused) as entered:
                if entered and self._holds_weights():
                    version = self._policy.version
                    assert version is not None
                    with self._hold():
                        yield version
                    return

    @contextmanager
    def call(self) -> Iterator[None]:
        """For one forward; within its own turn a thread passes."""
        if getattr(self._mine, "held", False):
            yield
            return
        with self.gate.step(lambda: self.closed):
            self._check_open()
            self._policy.check_servable()
            with self._hold():
                yield

    def check_begin(self) -> None:
        """What begins asleep is refused; what sleep interrupts waits in `batch`."""
        with suppress(PoisonedError):  # a swap under way looks the same: the batch, after it, tells
            self._policy.check_servable()

    def _holds_weights(self) -> bool:
        """Within a step: False after sleep, until the next full swap has flipped the version."""
        self._check_open()
        if self._policy.state != "awake":
            self._has_weights.clear()
            return False
        self._policy.check_servable()
        return True

    @contextmanager
    def _hold(self) -> Iterator[None]:
        self._mine.held = True
        try:
            yield
        finally:
            self._mine.held = False
            if self._device.type == "cuda":  # kernels may be under way still: a swap would write what they read
                torch.cuda.current_stream(self._device).synchronize()

    def _check_open(self) -> None:
        if self.closed:
            raise ClosedError("this engine has been closed; open a new one")

    # pausing

    def pause(self) -> None:
        """Returns once no turn is under way; the next batches wait for `resume`."""
        self._pausers.add(threading.current_thread())
        self._may_run.clear()
        with self.gate.visit():
            pass

    def resume(self) -> None:
        self._pausers.clear()
        self._may_run.set()

    @property
    def paused(self) -> bool:
        return not self._may_run.is_set()

    def close(self) -> None:
        """Whoever waits is told so."""
        self.closed = True
        self._may_run.set()
        self._has_weights.set()
