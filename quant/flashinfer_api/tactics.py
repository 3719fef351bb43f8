"""FlashInfer's tactics: which a product has, and running it with one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

from msgspec import Struct
from torch import Tensor

from ..errors import UnsupportedError


class Tactic(Struct, frozen=True):
    """One of the ways in which a library runs a product: its runner, and what the runner calls the tactic."""

    runner: str
    value: Any

    def __str__(self) -> str:
        return f"{self.runner} {'fallback' if self.is_fallback else self.value}"

    @property
    def is_fallback(self) -> bool:
        return self.value == -1


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


def forced_tactic() -> Tactic | None:
    """The one that products run at the moment."""
    return _FORCED.get()


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
