"""`Policy`: the weights being served, and the way to swap them, adapt them, and put them to sleep."""

from __future__ import annotations

import threading

import torch

from ..quant import ConfigError, ModelError, UnsupportedError
from .errors import SessionBusyError, StagingMemoryError
from .lora import Adapter, read_adapter
from .master import Master, MasterPlace
from .messages import UpdateReport
from .plan import SyncPlan
from .served import ServedWeights
from .session import SessionMode, SwapMode, WeightSession
from .source import Source, open_source

INITIAL_VERSION = "initial"  # of the cold load; no trainer's own count meets it


class Policy(ServedWeights):
    """One policy of one engine; `mode` says how it swaps, `master` whether the BF16 that came in is kept."""

    def __init__(self, plan: SyncPlan, mode: SwapMode = "staged", master: MasterPlace | None = None) -> None:
        super().__init__(plan, None if master is None else Master(), mirrored=mode == "host")
        self.mode: SwapMode = mode
        self._lock = threading.RLock()  # one thread at a time opens a session, or sleeps, or wakes
        self._slept_version: str | None = None

    # swaps

    def begin(self, version: str | None = None, prefix: str = "") -> WeightSession:
        """Open a session. The first load, the cure of a poisoned policy and the first after sleep bring every slot.

        Names that do not begin with `prefix` get it, here and below.
        """
        with self._lock:
            self._check_idle()
            self.check_awake()
            if version is not None and (not isinstance(version, str) or not version):
                raise ConfigError(f"a version is a string that is not empty, got {version!r}")
            version = version or self._next_version()
            session = WeightSession(self, version, self._mode_for(version), full=self.version is None, prefix=prefix)
            self.open_version = version
            return session

    def update(self, source: Source, version: str | None, prefix: str = "") -> UpdateReport:
        """One session fed from `source`."""
        with self.begin(version, prefix) as session:
            session.receive(open_source(source))
        assert session.report is not None
        return session.report

    def digest_of(self, source: Source, prefix: str = "") -> str:
        """The digest that the policy would have after a swap to `source`: what a trainer compares with `digest()`."""
        session = WeightSession(self, "(dry run)", "dry", full=False, prefix=prefix)
        try:
            session.receive(open_source(source))
            session.check_ledger()
            return session.new_digest()
        finally:
            session.abort()

    def _check_idle(self) -> None:
        if self.open_version is not None:
            raise SessionBusyError(f"a session for version {self.open_version!r} is open; commit or abort it")

    def _mode_for(self, version: str) -> SessionMode:
        if self.version is None:
            return "streamed"  # nothing is served: no copy to keep
        if version == self.version and self.mode != "staged":
            return "dry"  # an equal version must hold equal bytes: look, do not write
        return self.mode

    def _next_version(self) -> str:
        """A counter where nobody names versions: above every number so far."""
        first = self.version is None and self.poisoned is None and self.state == "awake"
        return INITIAL_VERSION if first else str(self.count + 1)

    # what the master is for

    def update_lora(
        self,
        source: Source,
        alpha: float | None = None,
        rank: int | None = None,
        version: str | None = None,
        prefix: str = "",
    ) -> UpdateReport:
        """Serve the base weights with one adapter merged in, in place of the adapter before.

        With a `prefix` only layers whose names begin with it change; without one, where there are several models,
        those of the models that the adapter's names speak of.
        """
        self._need_master("update_lora")
        self.check_servable()
        with self.begin(version) as session:  # reads under the session: nobody changes the base meanwhile
            adapter = read_adapter(source, self.plan, alpha, rank, prefix)
            self._merge(session, adapter, (prefix,) if prefix else self._starts(adapter))
        assert session.report is not None
        return session.report

    def remove_lora(self, version: str | None = None, prefix: str = "") -> UpdateReport:
        """Serve the base weights again, byte for byte."""
        self._need_master("remove_lora")
        self.check_servable()
        with self.begin(version) as session:
            self._merge(session, Adapter(), (prefix,))
        assert session.report is not None
        return session.report

    def _starts(self, adapter: Adapter) -> tuple[str, ...]:
        """What the names of the models begin with that an adapter is for."""
        if len(self.plan.components) < 2:
            return ("",)
        starts = (f"{component}." for component in self.plan.components)
        return tuple(start for start in starts if any(slot.name.startswith(start) for slot in adapter.factors))

    def _merge(self, session: WeightSession, adapter: Adapter, starts: tuple[str, ...]) -> None:
        """`adapter` takes the place of what is on the slots whose names begin so."""
        master = self._need_master("update_lora")
        others = {slot: units for slot, units in master.adapter.factors.items() if not slot.name.startswith(starts)}
        whole = Adapter({**others, **adapter.factors})
        session.merge(whole, [slot for slot in master.touched(whole) if slot not in others])

    def quantization_error(self) -> dict[str, float]:
        """Layer -> relative Frobenius error of its quantized weight against the BF16 that came in last."""
        errors = self._need_master("quantization_error").quantization_error()
        if not errors and any(slot.scheme.name != "bf16" for slot in self.plan.slots):
            raise ModelError(
                "every quantized layer came quantized: there is no BF16 to compare with; send BF16 weights"
            )
        return errors

    def _need_master(self, what: str) -> Master:
        if self.master is None:
            raise ConfigError(f"{what} needs the BF16 weights: open the engine with EngineConfig(master='host')")
        return self.master

    # sleep

    def sleep(self) -> None:
        """Free the packed weights between two decoding steps. Scales, KV scales and the master stay."""
        with self._lock:
            self._check_idle()
            if self.state == "asleep":
                return
            reasons = [why for slot in self.plan.slots if (why := slot.unreleasable()) is not None]
            if reasons:
                raise UnsupportedError("these weights cannot be put to sleep", reasons)
            self.settle()
            with self.commit_gate():
                self._slept_version, self.version, self.state = self.version, None, "asleep"
                self._release()

    def wake(self) -> UpdateReport | None:
        """Allocate storage again: at other addresses, so captured CUDA graphs are void.

        A master that has every layer restores the version that went to sleep, and the report of that swap comes
        back. Else (None) nothing can be served until a full swap.
        """
        with self._lock:
            if self.state != "asleep":
                return None
            self._allocate()
            self.state = "empty"
            version, self._slept_version = self._slept_version, None
            slots = [slot for slot in self.plan.addressed if not slot.kept]
            if self.master is None or version is None or not self.master.weights.keys() >= set(slots):
                return None
            with self.begin(version) as session:
                session.merge(self.master.adapter, slots)
            return session.report

    def _release(self) -> None:
        for slot in self.plan.slots:
            slot.release()
        if any(t.is_cuda for slot in self.plan.slots for t in slot.tensors.values()):
            torch.cuda.empty_cache()  # other processes may have it

    def _allocate(self) -> None:
        try:
            for slot in self.plan.slots:
                slot.allocate()
        except (RuntimeError, MemoryError) as error:  # torch's CPU allocator has no type of its own
            self._release()
            raise StagingMemoryError(f"memory ran out while waking, still asleep: {error}") from error
