"""Which of FlashInfer's tactics serves: checked against the reference, and the same on every rank and start.

FlashInfer picks tactics by timing, or takes a fallback, and some of them have been wrong (`KNOWN_BAD`). Here a tactic
serves a number of tokens once it has computed a random product of the very shape as the reference does.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from threading import RLock
from typing import Any

import torch
from msgspec import Struct
from torch import Tensor

from ..errors import UnsupportedError

log = logging.getLogger("rollmill")


class Tactic(Struct, frozen=True):
    """One of the ways in which a library runs a product: its runner, and what the runner calls the tactic."""

    runner: str
    value: Any

    def __str__(self) -> str:
        return f"{self.runner} {'fallback' if self.is_fallback else self.value}"

    @property
    def is_fallback(self) -> bool:
        return self.value == -1


class KnownBad(Struct, frozen=True):
    """Tactics that are never tried, and where that is told."""

    source: str
    what: str
    holds: Callable[[Tactic, int], bool]  # (tactic, number of tokens)


class Trial(Struct, frozen=True):
    """One product on random numbers: what runs it, and what it should give, float32 of the same shape.

    `rms` and `largest` bound a row's error: its norm over the row's norm, its largest element over the row's largest.
    """

    run: Callable[[], Tensor]
    expected: Tensor
    rms: float
    largest: float

    def fault(self) -> str | None:
        """What is wrong with the result, or None."""
        got = self.run().float()
        if got.shape != self.expected.shape:
            return f"gave {list(got.shape)}, not {list(self.expected.shape)}"
        finite = got.isfinite().all(-1)
        if not bool(finite.all()):
            return f"not finite in {int((~finite).sum())} of {len(got)} rows"
        error = got - self.expected
        tiny = torch.finfo(torch.float32).tiny
        rms = (error.norm(dim=-1) / self.expected.norm(dim=-1).clamp(min=tiny)).max().item()
        largest = (error.abs().amax(-1) / self.expected.abs().amax(-1).clamp(min=tiny)).max().item()
        if rms > self.rms or largest > self.largest:
            return f"off by {rms:.2%} of a row's norm and {largest:.2%} of its largest value"
        return None


class Served(Struct, frozen=True):
    """What the check found for up to `tokens` tokens: one line of `rollmill inspect --kernels`."""

    product: str
    tokens: int
    tactic: str
    refused: tuple[str, ...]
    seconds: float


class TacticGuard:
    """Of one product (a kernel over one shape): the tactic that serves each number of tokens.

    Tokens go by powers of two; a tactic serves the numbers above one and up to the next once it was right at both ends.
    `trial(tokens)` makes a product of that many. A number that was not prepared is checked when it first comes, which
    takes a while, and cannot be while a CUDA graph is captured.
    """

    def __init__(self, product: str, trial: Callable[[int], Trial], known_bad: Sequence[KnownBad] = ()) -> None:
        self.product, self.trial, self.known_bad = product, trial, tuple(known_bad)
        self.served: dict[int, Served] = {}
        self._tactics: dict[int, Tactic] = {}
        self._lock = RLock()

    def prepare(self, num_tokens: int) -> Served:
        """Choose the tactic for this many tokens; `UnsupportedError` names every one that was refused, and why."""
        bucket = bucket_of(num_tokens)
        with self._lock:
            if bucket not in self.served:
                self._choose(bucket)
            return self.served[bucket]

    @contextmanager
    def serving(self, num_tokens: int) -> Iterator[None]:
        """Within, FlashInfer runs the tactic chosen for this many tokens."""
        if _FORCED.get() is not None:  # a trial of this very product
            yield
            return
        self.prepare(num_tokens)
        with forced(self._tactics[bucket_of(num_tokens)]):
            yield

    def _choose(self, bucket: int) -> None:
        start, refused = time.perf_counter(), []
        trials = [self.trial(tokens) for tokens in sorted({bucket // 2 + 1, bucket}, reverse=True)]
        for tactic in offered(trials[0].run):
            why = self._refuse(tactic, bucket, trials)
            if why is None:
                seconds = time.perf_counter() - start
                self._tactics[bucket] = tactic
                self.served[bucket] = Served(self.product, bucket, str(tactic), tuple(refused), seconds)
                log.info("%s, up to %d tokens: %s (%.1f s)", self.product, bucket, tactic, seconds)
                return
            refused.append(f"{tactic}: {why}")
            log.warning("%s, up to %d tokens: refused %s", self.product, bucket, refused[-1])
        raise UnsupportedError(f"no tactic of FlashInfer computes {self.product} for {bucket} tokens", refused)

    def _refuse(self, tactic: Tactic, bucket: int, trials: Sequence[Trial]) -> str | None:
        for known in self.known_bad:
            if known.holds(tactic, bucket):
                return f"{known.what} ({known.source})"
        for trial in trials:
            try:
                with forced(tactic):
                    fault = trial.fault()
            except (RuntimeError, ValueError) as error:  # what the library raises for a tactic that cannot
                fault = str(error).splitlines()[0] if str(error) else type(error).__name__
            if fault is not None:
                return f"{fault}, at {len(trial.expected)} tokens"
        return None


_GUARDS: dict[Hashable, TacticGuard] = {}


def shared_guard(key: Hashable, make: Callable[[], TacticGuard]) -> TacticGuard:
    """One guard for all layers that compute the same product on the same device."""
    if key not in _GUARDS:
        _GUARDS[key] = make()
    return _GUARDS[key]


def forget_guards() -> None:
    """Check everything anew."""
    _GUARDS.clear()


def bucket_of(num_tokens: int) -> int:
    """The power of two that this many tokens fit in."""
    return 1 << (num_tokens - 1).bit_length()


_FORCED: ContextVar[Tactic | None] = ContextVar("tactic", default=None)
_OFFERED: ContextVar[list[Tactic] | None] = ContextVar("offered", default=None)


@contextmanager
def forced(tactic: Tactic) -> Iterator[None]:
    """Within, FlashInfer's products run this tactic."""
    install_chooser()
    token = _FORCED.set(tactic)
    try:
        yield
    finally:
        _FORCED.reset(token)


class _Collected(Exception):
    """Ends a call once its tactics are known."""


def offered(run: Callable[[], object]) -> list[Tactic]:
    """The tactics that FlashInfer has for the product in `run`, which is not computed: its own fallback first."""
    install_chooser()
    found: list[Tactic] = []
    token = _OFFERED.set(found)
    try:
        run()
    except _Collected:
        return found
    finally:
        _OFFERED.reset(token)
    raise AssertionError("the product asked for no tactic")


@cache
def install_chooser() -> None:
    """Make FlashInfer's tuner obey `forced`; where nothing is forced it decides as before, with all it has learned."""
    from flashinfer.autotuner import AutoTuner

    class GuardedTuner(AutoTuner):
        def choose_one(
            self, custom_op: str, runners: list[Any], tuning_config: Any, inputs: list[Any], **kwargs: Any
        ) -> tuple[Any, Any]:
            found, tactic = _OFFERED.get(), _FORCED.get()
            if found is not None:
                found.extend(_tactics_of(runners, inputs))
                raise _Collected
            if tactic is None:
                return super().choose_one(custom_op, runners, tuning_config, inputs, **kwargs)
            for runner in runners:
                if type(runner).__name__ == tactic.runner:
                    return runner, tactic.value
            raise UnsupportedError(f"{custom_op} has no runner {tactic.runner}", [_names(runners)])

    AutoTuner.get().__class__ = GuardedTuner


def _tactics_of(runners: Sequence[Any], inputs: Sequence[Any]) -> Iterator[Tactic]:
    for runner in runners:
        name = type(runner).__name__
        yield Tactic(name, -1)
        for value in runner.get_valid_tactics(inputs, _Shapes(inputs)):
            if value != -1:
                yield Tactic(name, value)


def _names(runners: Sequence[Any]) -> str:
    return f"known: {', '.join(type(runner).__name__ for runner in runners)}"


class _Shapes:
    """The shapes of these very inputs, as runners ask for those they are tuned for."""

    def __init__(self, inputs: Sequence[Any]) -> None:
        self.shapes = tuple(tuple(x.shape) if isinstance(x, Tensor) else (0,) for x in inputs)

    def get_opt_shapes(self) -> tuple[tuple[int, ...], ...]:
        return self.shapes

    def get_hash_key(self) -> tuple[tuple[int, ...], ...]:
        return self.shapes
