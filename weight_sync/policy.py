"""`Policy`: the weights being served: their slots, version, digest, and the one session that may change them."""

from __future__ import annotations

from .digest import weights_digest
from .errors import PoisonedError, SessionBusyError
from .messages import UpdateReport
from .plan import SyncPlan
from .session import SessionMode, SwapMode, WeightSession
from .source import Source, open_source, receive

INITIAL_VERSION = "initial"  # of the cold load; no trainer's own count meets it


class Policy:
    """`version` is None before the first load and after a failed streamed swap (`poisoned` then says why)."""

    def __init__(self, plan: SyncPlan, mode: SwapMode = "staged") -> None:
        self.plan = plan
        self.mode: SwapMode = mode
        self.version: str | None = None
        self.poisoned: str | None = None
        self.num_commits = 0
        self.session: WeightSession | None = None
        self.closed = False

    def digest(self) -> str:
        """SHA-256 hex of all stored values being served; the same for every kernel and every way of arriving."""
        return weights_digest((s.name, tensor, d) for s in self.plan.slots for tensor, d in s.digests.items())

    def begin(self, version: str | None = None, *, full: bool = False) -> WeightSession:
        """Open a session. `full` demands every slot; the first load and the cure of a poisoned policy do, too."""
        if self.session is not None:
            raise SessionBusyError(f"a session for version {self.session.version!r} is open; commit or abort it")
        version = version or self._next_version()
        full = full or self.version is None
        self.session = WeightSession(self, version, self._mode_for(version), full=full)
        return self.session

    def _mode_for(self, version: str) -> SessionMode:
        if self.version is None:
            return "streamed"  # nothing is served: no copy to keep
        if version == self.version and self.mode == "streamed":
            return "dry"  # an equal version must hold equal bytes: look, do not write
        return self.mode

    def update(self, source: Source, version: str | None) -> UpdateReport:
        """One session fed from `source`."""
        with self.begin(version) as session:
            receive(session, open_source(source))
        assert session.report is not None
        return session.report

    def digest_of(self, source: Source) -> str:
        """The digest that the policy would have after a swap to `source`: what a trainer compares with `digest()`."""
        session = WeightSession(self, "(dry run)", "dry", full=False)
        receive(session, open_source(source))
        session.check_ledger()
        return session.new_digest()

    def check_servable(self) -> None:
        """Raise `PoisonedError` unless one complete version is in place."""
        if self.poisoned is not None:
            raise PoisonedError(f"no complete version is in place: {self.poisoned}; run a full swap")

    def _next_version(self) -> str:
        """A counter where nobody names versions: the served version + 1, or the number of swaps so far."""
        if self.version is not None and self.version.isdigit():
            return str(int(self.version) + 1)
        return str(self.num_commits) if self.num_commits else INITIAL_VERSION
