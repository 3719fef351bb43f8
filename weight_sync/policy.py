"""`Policy`: the weights being served, and the way to swap them."""

from __future__ import annotations

from ..quant import ConfigError
from .errors import SessionBusyError
from .messages import UpdateReport
from .plan import SyncPlan
from .served import ServedWeights
from .session import SessionMode, SwapMode, WeightSession
from .source import Source, open_source

INITIAL_VERSION = "initial"  # of the cold load; no trainer's own count meets it


class Policy(ServedWeights):
    """One policy of one engine; `mode` says how it swaps."""

    def __init__(self, plan: SyncPlan, mode: SwapMode = "staged") -> None:
        super().__init__(plan)
        self.mode: SwapMode = mode

    def begin(self, version: str | None = None) -> WeightSession:
        """Open a session. The first load, and the cure of a poisoned policy, must bring every slot."""
        if self.open_version is not None:
            raise SessionBusyError(f"a session for version {self.open_version!r} is open; commit or abort it")
        if version is not None and (not isinstance(version, str) or not version):
            raise ConfigError(f"a version is a string that is not empty, got {version!r}")
        version = version or self._next_version()
        session = WeightSession(self, version, self._mode_for(version), full=self.version is None)
        self.open_version = version
        return session

    def update(self, source: Source, version: str | None) -> UpdateReport:
        """One session fed from `source`."""
        with self.begin(version) as session:
            session.receive(open_source(source))
        assert session.report is not None
        return session.report

    def digest_of(self, source: Source) -> str:
        """The digest that the policy would have after a swap to `source`: what a trainer compares with `digest()`."""
        session = WeightSession(self, "(dry run)", "dry", full=False)
        try:
            session.receive(open_source(source))
            session.check_ledger()
            return session.new_digest()
        finally:
            session.abort()

    def _mode_for(self, version: str) -> SessionMode:
        if self.version is None:
            return "streamed"  # nothing is served: no copy to keep
        if version == self.version and self.mode == "streamed":
            return "dry"  # an equal version must hold equal bytes: look, do not write
        return self.mode

    def _next_version(self) -> str:
        """A counter where nobody names versions: above every number so far."""
        first = self.version is None and self.poisoned is None
        return INITIAL_VERSION if first else str(self.count + 1)
