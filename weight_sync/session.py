"""`WeightSession`: one swap. Receives tensors, keeps the ledger, commits all or nothing; the only writer of slots."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Literal, Self

from torch import Tensor

from ..quant import WeightSlot, clipping_shares, reset_clipping
from .assembly import read_digests
from .clock import Clock
from .digest import weights_digest
from .errors import SessionClosedError, StaleVersionError
from .ledger import Ledger
from .lora import Adapter
from .memory import naming_memory_errors
from .messages import UpdateReport
from .pairs import as_pair, is_whole_stack, pull, split
from .pending import Backlog, default_backlog
from .plan import Target
from .served import ServedWeights
from .source import WeightSource
from .staging import SlotStaging

SwapMode = Literal["staged", "host", "streamed"]
SessionMode = Literal["staged", "host", "streamed", "dry"]


class WeightSession:
    """One swap to `version`; use it as a context manager: a clean end commits, an exception aborts.

    staged: packed tensors are built beside the served ones, which change at `commit` only.
    host: complete units overwrite the served ones; a failure puts them back from a mirror in host memory.
    streamed: the same without a mirror: until `commit` the policy is poisoned.
    dry: nothing is kept or written but digests; `commit` tells whether the served weights are the same.

    Bytes that serve change inside `served.commit_gate` only: staged, among the copies of `commit`; host and streamed,
    from the first write to the end of the session. One thread drives a session; it may be another one than decodes. On
    a GPU it quantizes and packs in `served.side`, while generation goes on in its own stream.
    `prefix` ("transformer.") is put before names that come without it.
    """

    def __init__(self, served: ServedWeights, version: str, mode: SessionMode, *, full: bool, prefix: str = "") -> None:
        self.served, self.version, self.mode = served, version, mode
        self.report: UpdateReport | None = None
        self.clock = Clock()
        self._same_version = version == served.version
        self._open = True
        self._staging: dict[WeightSlot, SlotStaging] = {}
        self._takers: dict[WeightSlot, list[SlotStaging]] = {}  # of what names lead to: the slot's, and its twin's
        self._backlog: Backlog | None = None
        self._ledger = Ledger(served.plan, prefix, full=full)
        self._clipping: dict[str, float] = {}
        self._error: BaseException | None = None
        self._paused_since: float | None = None
        self._gate = ExitStack()
        self._served_before = served.version
        self._flipping = False  # master and listeners may have changed: there is no way back
        self._borrows = False  # the GPU may still read what the sender owns
        self._adapter: Adapter | None = None  # merged weights come from the master and leave it as it is
        self._unadapted: list[str] = []

    # receiving

    def load(self, bucket: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor]) -> None:
        """Take (name, tensor) pairs, any names in any order; copied before this returns (on a GPU: in the order of the
        caller's stream).

        On an error the session is aborted. Unknown and doubled names are collected and reported by `commit`.
        """
        self._check_open()
        try:
            with self.clock("receive"), naming_memory_errors(lambda: self._ledger.last, self.served, self.mode):
                lazy = not isinstance(bucket, Collection)  # the next tensor may come in the memory of this one
                for pair in bucket.items() if isinstance(bucket, Mapping) else bucket:
                    self._take(*as_pair(pair))
                    if lazy:
                        self._give_back()
                self._give_back()
        except BaseException as error:
            self._error = error
            self.abort()
            raise

    def receive(self, source: WeightSource) -> None:
        """Load all of a source, tensor by tensor; whatever it raises becomes a `TransportError`."""
        pairs = pull(source)
        while True:
            with self.clock("receive"):
                pair = next(pairs, None)
            if pair is None:
                return
            self.load([pair])

    def merge(self, adapter: Adapter, slots: Iterable[WeightSlot]) -> None:
        """Load the master's weights of these slots with `adapter` merged in; `commit` makes it the one on duty."""
        assert self.served.master is not None
        self._adapter = adapter
        self.receive(self.served.master.pairs(slots, adapter))

    def _give_back(self) -> None:
        """From here on the sender may use its memory again, in the order of its stream."""
        if self._backlog is not None:
            self._backlog.compute_now()
            if self._borrows:  # read in another stream
                self._backlog.give_back()
                self._borrows = False

    def _take(self, name: str, value: Tensor) -> None:
        target = self._ledger.enter(name, value)
        if target is not None:
            self._stage(self._ledger.last, target, value)

    def _stage(self, name: str, target: Target, value: Tensor) -> None:
        takers = self._takers.get(target.slot)
        if takers is None:
            takers = [self._staging_of(slot) for slot in self.served.plan.copies(target.slot)]
            self._takers[target.slot] = takers
        if target.tensor == "input_scale":
            takers = takers[:1]  # a twin does not quantize activations
        if target.unit is not None and target.shard is not None:
            parts = ((target.unit, target.shard, value),)
        elif is_whole_stack(target, value) and all(taker.takes_stack for taker in takers):
            self._borrows |= takers[0].checks_later
            for taker in takers:
                taker.receive_stack(name, value, target.layout)
            return
        else:
            parts = split(name, target, value)
        for unit, shard, part in parts:
            for taker in takers:
                if not taker.receive(name, target.tensor, unit, shard, part):
                    self._ledger.duplicate.append(name)
                    return

    def _staging_of(self, slot: WeightSlot) -> SlotStaging:
        if slot not in self._staging:
            live = self.mode in ("host", "streamed")
            if live and self._paused_since is None:
                self._pause(f"a {self.mode} swap to version {self.version!r} has not finished")
            keeps = self.served.master is not None and self._adapter is None and not self.served.plan.is_twin(slot)
            dry = self.mode == "dry"
            if self._backlog is None:
                self._backlog = Backlog(self._backlog_limit(slot), self.served.side)
            self._staging[slot] = SlotStaging(
                slot, self.clock, self._backlog, live=live, dry=dry, master=keeps and not dry
            )
        return self._staging[slot]

    def _backlog_limit(self, slot: WeightSlot) -> int:
        if self.served.backlog is not None:
            return self.served.backlog
        return default_backlog(next(iter(slot.tensors.values())), streamed=self.mode in ("host", "streamed"))

    # ending

    def commit(self) -> UpdateReport:
        """Check the ledger and flip to the new version, or raise, abort and leave what was served before."""
        self._check_open()
        try:
            self.check_ledger()
            self._ledger.last = "(deriving scales)"
            with naming_memory_errors(lambda: self._ledger.last, self.served, self.mode), self.served.side.beside():
                for staging in self._staging.values():
                    staging.assembly.seal()
            digest = self.new_digest()
            unchanged = self._check_version(digest)
            if not unchanged:
                self._flip()
        except BaseException:
            self.abort()
            raise
        self.report = self._make_report("unchanged" if unchanged else "committed", digest)
        self._close()
        return self.report

    def abort(self) -> None:
        """Drop what was staged, or put back what was overwritten. After streamed writes, or an interrupted commit that
        is not undone, the policy stays poisoned."""
        if self._open and self._paused_since is not None:
            self.served.poisoned = f"a swap to version {self.version!r} failed half-way"
            self.served.version = None
            try:
                if self.mode == "host" and not self._flipping:
                    self._restore()
            finally:
                self._close()
        self._close()

    def _restore(self) -> None:
        assert self.served.mirror is not None
        with self.served.side.beside():  # writes in the caller's stream, too, must have landed
            pass
        self.served.side.wait()
        self.served.mirror.restore(self._staging)
        self.served.version, self.served.poisoned = self._served_before, None

    def _flip(self) -> None:
        if self._paused_since is None:  # an interrupt among the copies must not leave a mixture serving
            self._pause(f"the commit of version {self.version!r} has not finished")
        slots = self.served.plan.slots
        self._clipping = {} if self._served_before is None else clipping_shares(slots)
        with self.clock("commit"):
            with self.served.side.beside():
                for slot, staging in self._staging.items():
                    grown = staging.assembly
                    slot.commit(grown.packed, grown.scales, grown.digests)
                reset_clipping(slots)
            self.served.side.wait()
            self._flipping = True
            self._update_master()
            self.served.flip(self.version)
        assert self._paused_since is not None
        self.clock.seconds["pause"] = time.perf_counter() - self._paused_since
        self._paused_since = None
        self._gate.close()
        if self.served.mirror is not None:
            self.served.mirror.renew(self._staging)

    def _update_master(self) -> None:
        master = self.served.master
        if master is None:
            return
        if self._adapter is not None:
            master.adapter = self._adapter
        else:
            plan = self.served.plan
            own = {s: staging.assembly for s, staging in self._staging.items() if not plan.is_twin(s)}
            self._unadapted = master.replace({slot: assembly.master_units() for slot, assembly in own.items()})

    def _pause(self, why: str) -> None:
        """Keep generation from stepping until the session ends: from now on served bytes change, and `why` says so."""
        if self.mode == "host":
            assert self.served.mirror is not None
            self.served.mirror.complete()
        self.served.side.wait()
        self._gate.enter_context(self.served.commit_gate())
        self._check_open()  # the engine may have been closed meanwhile
        self._paused_since = time.perf_counter()
        self.served.poisoned = why

    def check_ledger(self) -> None:
        """Nothing more is to come: raise unless all of it is complete, known, single, and finite."""
        for staging in self._staging.values():
            staging.settle()
        if self._backlog is not None:
            self._backlog.look()
        self._ledger.check(self._staging)
        self._ledger.check_tied(self._digests())

    def _check_version(self, digest: str) -> bool:
        """True if the very same weights are being served under this version already."""
        if not self._same_version:
            return False
        if digest != self.served.digest():
            raise StaleVersionError(
                f"version {self.version!r} is being served already, with other weights; send a new version"
            )
        return True

    def new_digest(self) -> str:
        """The digest that the policy has once this session is committed."""
        return weights_digest(
            (slot.name, tensor, digest) for slot, found in self._digests().items() for tensor, digest in found.items()
        )

    def _digests(self) -> dict[WeightSlot, dict[str, int]]:
        """Of every slot, as they will be."""
        grown = {slot: staging.assembly for slot, staging in self._staging.items()}
        with self.served.side.beside():
            read_digests(list(grown.values()))
        return {slot: grown[slot].digests if slot in grown else slot.digests for slot in self.served.plan.slots}

    def _make_report(self, status: Literal["committed", "unchanged"], digest: str) -> UpdateReport:
        return UpdateReport(
            version=self.version,
            status=status,
            tensors=self._ledger.num_tensors,
            bytes_in=self._ledger.num_bytes,
            layers=len(self._staging),
            coverage=len(self._staging) / max(1, len(self.served.plan.slots)),
            seconds=self.clock.seconds,
            digest=digest,
            warnings=tuple(self._warnings()),
            clipping=self._clipping,
        )

    def _warnings(self) -> Iterator[str]:
        yield from self._ledger.warnings()
        if self._unadapted:
            yield f"base weights took the place of adapted ones, without the adapter: {', '.join(self._unadapted)}"

    def _check_open(self) -> None:
        if not self._open:
            raise SessionClosedError(f"the session for version {self.version!r} has ended; begin a new one")
        if self.served.closed:
            raise SessionClosedError("the engine has been closed")

    def _close(self) -> None:
        if self._open:
            self._open, self._staging, self._takers, self._backlog = False, {}, {}, None
            if self.mode != "dry" or self.served.open_version == self.version:
                self.served.open_version = None
            self._gate.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif self._open:
            self.commit()
        elif self._error is not None:  # swallowed inside the block
            raise SessionClosedError(
                f"the session for version {self.version!r} was aborted; the old version serves"
            ) from self._error
