"""`Policy`: the weights being served: their slots, version, digest, and the one session that may change them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor

from .digest import weights_digest
from .errors import PoisonedError, SessionBusyError
from .messages import UpdateReport
from .plan import SyncPlan
from .session import SwapMode, WeightSession
from .source import WeightSource, open_source, receive


class Policy:
    """`version` is None before the first load and after a failed streamed swap (`poisoned` then says why)."""

    def __init__(self, plan: SyncPlan, mode: SwapMode = "staged") -> None:
        self.plan = plan
        self.mode: SwapMode = mode
        self.version: str | None = None
        self.poisoned: str | None = None
        self.session: WeightSession | None = None
        self.closed = False

    def digest(self) -> str:
        """SHA-256 hex of all stored values being served; the same for every kernel and every way of arriving."""
        return weights_digest((s.name, tensor, d) for s in self.plan.slots for tensor, d in s.digests.items())

    def begin(self, version: str | None = None, *, full: bool = False) -> WeightSession:
        """Open a session. `full` demands every slot; the first load and the cure of a poisoned policy do, too."""
        if self.session is not None:
            raise SessionBusyError(f"a session for version {self.session.version!r} is open; commit or abort it")
        first = self.version is None
        mode: SwapMode = "streamed" if first else self.mode  # nothing is served yet: no copy to keep
        self.session = WeightSession(self, version or self._next_version(), mode, full=full or first)
        return self.session

    def update(
        self,
        source: WeightSource | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | str | Path,
        version: str | None,
    ) -> UpdateReport:
        """One session fed from `source`."""
        with self.begin(version) as session:
            receive(session, open_source(source))
        assert session.report is not None
        return session.report

    def check_servable(self) -> None:
        """Raise `PoisonedError` unless one complete version is in place."""
        if self.poisoned is not None:
            raise PoisonedError(f"no complete version is in place: {self.poisoned}; run a full swap")

    def _next_version(self) -> str:
        if self.version is None:
            return "0"
        return str(int(self.version) + 1) if self.version.isdigit() else f"{self.version}+1"
