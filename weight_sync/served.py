"""`ServedWeights`: what is being served right now: slots, version, digest."""

from __future__ import annotations

from .digest import weights_digest
from .errors import PoisonedError
from .plan import SyncPlan


class ServedWeights:
    """State that sessions change. `version` is None before the first load, and while `poisoned` tells of a streamed
    swap or a commit that ended half-way; `open_version` is that of the one session under way."""

    def __init__(self, plan: SyncPlan) -> None:
        self.plan = plan
        self.version: str | None = None
        self.poisoned: str | None = None
        self.open_version: str | None = None
        self.count = 0  # the highest number that a version has had
        self.closed = False

    def flip(self, version: str) -> None:
        """Name what is being served, once its last byte is in place."""
        self.version, self.poisoned = version, None
        if version.isdecimal():
            self.count = max(self.count, int(version))

    def close(self) -> None:
        """Let the weights go."""
        self.closed, self.plan = True, SyncPlan(())

    def digest(self) -> str:
        """SHA-256 hex of all stored values being served; the same for every kernel and every way of arriving."""
        return weights_digest((s.name, tensor, d) for s in self.plan.slots for tensor, d in s.digests.items())

    def check_servable(self) -> None:
        """Raise `PoisonedError` unless one complete version is in place."""
        if self.poisoned is not None:
            raise PoisonedError(f"no complete version is in place: {self.poisoned}; run a full swap")
