"""`TacticGuard`: a tactic serves a number of tokens once it has computed a random product as the reference does.

FlashInfer picks tactics by timing, or takes a fallback, and some of them have been wrong. Here the first that is right
serves: the same one on every rank and at every start.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock, RLock

import torch
from msgspec import Struct
from torch import Tensor

from ..errors import UnsupportedError
from .tactics import Tactic, forced, offered

ROW_ERROR = 0.25
ELEMENT_ERROR = 0.5

log = logging.getLogger("rollmill")


class KnownBad(Struct, frozen=True):
    """Tactics that are never tried, and where that is told."""

    source: str
    what: str
    holds: Callable[[Tactic, int], bool]  # (tactic, number of tokens)


class Trial(Struct, frozen=True):
    """One product on random numbers: what runs it, and what it should give, float32 of the same shape.

    `error` bounds the whole result's error, relative to its norm. A row may be off by more, `ROW_ERROR` of its norm and
    `ELEMENT_ERROR` of its largest value: where a kernel sums in another order, or divides otherwise, a code on a
    rounding tie falls the other way, which moves the rows that it is in.
    """

    run: Callable[[], Tensor]
    expected: Tensor
    error: float

    def fault(self) -> str | None:
        """What is wrong with the result, or None."""
        got = self.run().float()
        if got.shape != self.expected.shape:
            return f"gave {list(got.shape)}, not {list(self.expected.shape)}"
        finite = got.isfinite().all(-1)
        if not bool(finite.all()):
            return f"not finite in {int((~finite).sum())} of {len(got)} rows"
        error, tiny = got - self.expected, torch.finfo(torch.float32).tiny
        whole = (error.norm() / self.expected.norm().clamp(min=tiny)).item()
        rows = (error.norm(dim=-1) / self.expected.norm(dim=-1).clamp(min=tiny)).max().item()
        elements = (error.abs().amax(-1) / self.expected.abs().amax(-1).clamp(min=tiny)).max().item()
        if whole > self.error or rows > ROW_ERROR or elements > ELEMENT_ERROR:
            return f"off by {whole:.2%} in all, {rows:.0%} of a row, {elements:.0%} of a row's largest value"
        return None


class Served(Struct, frozen=True):
    """What the check found for up to `tokens` tokens: one line of `rollmill inspect --kernels`."""

    product: str
    tokens: int
    tactic: str
    refused: tuple[str, ...]
    seconds: float


Bench = Callable[[int], Trial]  # number of tokens -> a product of so many with weights that are there already


class TacticGuard:
    """Of one product (a kernel over one shape): the tactic that serves each number of tokens.

    Tokens go by powers of two; a tactic serves the numbers above one and up to the next once it was right at both ends.
    `make_bench` makes random weights. A number that was not prepared is checked when it first comes, which takes a
    while, and cannot be while a CUDA graph is captured.
    """

    def __init__(self, product: str, make_bench: Callable[[], Bench], known_bad: Sequence[KnownBad] = ()) -> None:
        self.product, self.make_bench, self.known_bad = product, make_bench, tuple(known_bad)
        self.served: dict[int, Served] = {}
        self._failed: dict[int, UnsupportedError] = {}
        self._tactics: dict[int, Tactic] = {}
        self._lock = RLock()

    def prepare(self, *token_counts: int) -> list[Served]:
        """Choose the tactic for each of these; `UnsupportedError` names every one that was refused, and why."""
        buckets = [bucket_of(count) for count in token_counts]
        with self._lock:
            missing = [bucket for bucket in dict.fromkeys(buckets) if bucket not in self.served]
            if missing:
                self._check(missing)
            return [self.served[bucket] for bucket in buckets]

    @contextmanager
    def serving(self, num_tokens: int) -> Iterator[None]:
        """Within, FlashInfer runs the tactic chosen for this many tokens."""
        bucket = bucket_of(num_tokens)
        if bucket not in self._tactics:
            self.prepare(num_tokens)
        with forced(self._tactics[bucket]):
            yield

    def _check(self, buckets: Sequence[int]) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise UnsupportedError(f"{self.product} was not checked for {list(buckets)} tokens", ["capture after that"])
        for failed in (self._failed[bucket] for bucket in buckets if bucket in self._failed):
            raise failed
        bench = self.make_bench()
        for bucket in buckets:
            self._choose(bucket, bench)

    def _choose(self, bucket: int, bench: Bench) -> None:
        start, refused = time.perf_counter(), []
        trials = [bench(tokens) for tokens in sorted({bucket // 2 + 1, bucket}, reverse=True)]
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
        error = UnsupportedError(f"no tactic of FlashInfer computes {self.product} for {bucket} tokens", refused)
        self._failed[bucket] = error
        raise error

    def _refuse(self, tactic: Tactic, bucket: int, trials: Sequence[Trial]) -> str | None:
        for known in self.known_bad:
            if known.holds(tactic, bucket):
                return f"{known.what} ({known.source})"
        for trial in trials:
            try:
                with forced(tactic):
                    fault = trial.fault()
            except (torch.OutOfMemoryError, torch.AcceleratorError):  # says nothing of the tactic
                raise
            except Exception as error:  # libraries raise types of their own for a tactic that cannot
                fault = f"{type(error).__name__}: {error}".splitlines()[0]
            if fault is not None:
                return f"{fault}, at {len(trial.expected)} tokens"
        return None


_GUARDS: dict[Hashable, TacticGuard] = {}
_GUARDS_LOCK = Lock()


def shared_guard(key: Hashable, make: Callable[[], TacticGuard]) -> TacticGuard:
    """One guard for all layers that compute the same product on the same device; it keeps no layer alive."""
    with _GUARDS_LOCK:
        if key not in _GUARDS:
            _GUARDS[key] = make()
        return _GUARDS[key]


def forget_guards() -> None:
    """Check everything anew."""
    _GUARDS.clear()


def bucket_of(num_tokens: int) -> int:
    """The power of two that this many tokens fit in."""
    return 1 << (num_tokens - 1).bit_length()
