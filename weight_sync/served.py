"""`ServedWeights`: what is being served right now: slots, version, digest."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from .digest import weights_digest
from .errors import AsleepError, PoisonedError
from .master import Master
from .mirror import Mirror
from .plan import SyncPlan
from .side_stream import SideStream

CPU = torch.device("cpu")


class ServedWeights:
    """State that sessions change. `version` is None before the first load, while `poisoned` tells of a streamed
    swap or a commit that ended half-way, and from sleep to the next full swap; `open_version` is that of the one
    session under way. Served bytes change inside `commit_gate()`: whoever decodes holds the same lock for a step, and
    lets a session in once the device is at none. `on_flip` are called inside it, after the version has flipped; one
    that raises poisons. `mirror`: of the packed bytes, in host memory; `side`: where sessions compute on a GPU.
    """

    def __init__(self, plan: SyncPlan, master: Master | None = None, *, mirrored: bool = False) -> None:
        self.plan = plan
        self.master = master
        self.side = SideStream(next((t.device for slot in plan.slots for t in slot.tensors.values()), CPU))
        self.mirror = Mirror(plan.slots) if mirrored else None
        self.version: str | None = None
        self.poisoned: str | None = None
        self.open_version: str | None = None
        self.state: Literal["awake", "asleep", "empty"] = "awake"  # empty: awake again, without weights
        self.count = 0  # the highest number that a version has had
        self.closed = False
        self.backlog: int | None = None  # bytes of units that may wait for others in a session; None: as the device is
        self.commit_gate: Callable[[], AbstractContextManager[None]] = nullcontext
        self.on_flip: list[Callable[[], None]] = []

    def flip(self, version: str) -> None:
        """Name what is being served, once its last byte is in place."""
        self.version, self.poisoned, self.state = version, None, "awake"
        if version.isdecimal():
            self.count = max(self.count, int(version))
        for call in self.on_flip:
            call()

    def close(self) -> None:
        """Let the weights go."""
        self.settle()
        self.closed, self.plan, self.master, self.mirror = True, SyncPlan(()), None, None
        self.commit_gate, self.on_flip = nullcontext, []

    def settle(self) -> None:
        """Wait until nobody reads the packed bytes behind the scenes."""
        self.side.wait()
        if self.mirror is not None:
            self.mirror.settle()

    @property
    def mirror_bytes(self) -> int:
        """Host memory of the mirror."""
        return 0 if self.mirror is None else self.mirror.num_bytes

    @property
    def master_bytes(self) -> int:
        """Host memory of the BF16 master and its adapter."""
        return 0 if self.master is None else self.master.num_bytes

    def digest(self) -> str:
        """SHA-256 hex of all stored values being served, or that went to sleep; the same for every kernel and every
        way of arriving."""
        return weights_digest((s.name, tensor, d) for s in self.plan.slots for tensor, d in s.digests.items())

    def check_awake(self) -> None:
        """Raise `AsleepError` while there is no storage to write to."""
        if self.state == "asleep":
            raise AsleepError("the weights are asleep; wake them first")

    def check_servable(self) -> None:
        """Raise `AsleepError` or `PoisonedError` unless one complete version is in place."""
        self.check_awake()
        if self.state == "empty":
            raise AsleepError("awake, but holds no weights: call update_weights with every layer")
        if self.poisoned is not None:
            raise PoisonedError(f"no complete version is in place: {self.poisoned}; run a full swap")
