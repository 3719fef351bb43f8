"""What can go wrong in a swap. After any of these the previous version serves (staged) or nothing does (streamed)."""

from __future__ import annotations

from collections.abc import Sequence

from ..quant import RollmillError


class CoverageError(RollmillError):
    """A session did not deliver every tensor of every touched layer exactly once."""

    def __init__(
        self,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        duplicate: Sequence[str] = (),
        *,
        rule: str = "a session brings every tensor of the layers that it touches, once, and no other",
        hint: str = "",
    ) -> None:
        self.missing, self.unexpected, self.duplicate = tuple(missing), tuple(unexpected), tuple(duplicate)
        lists = {"missing": self.missing, "unexpected": self.unexpected, "duplicate": self.duplicate}
        parts = [f"{len(names)} {kind}: {_listed(names)}" for kind, names in lists.items() if names]
        super().__init__("; ".join([rule, *parts, *([hint] if hint else [])]))


class ShapeError(RollmillError):
    """A tensor of a shape or dtype that its name does not allow."""


class NonFiniteError(RollmillError):
    """A tensor with NaN or infinity, or a scale that is not positive."""


class SessionBusyError(RollmillError):
    """A weight session is open already."""


class SessionClosedError(RollmillError):
    """The weight session has been committed or aborted."""


class StaleVersionError(RollmillError):
    """The version is being served already, with other weights."""


class TransportError(RollmillError):
    """The source of the weights failed."""


class PoisonedError(RollmillError):
    """A streamed swap failed half-way: no complete version is in place until a full swap succeeds."""


class AsleepError(RollmillError):
    """The weights have been let go (`sleep`), or are back (`wake`) but hold nothing until a full swap."""


class StagingMemoryError(RollmillError):
    """Memory ran out while staging."""


def _listed(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
