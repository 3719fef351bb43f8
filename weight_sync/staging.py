"""What one slot has received in one session."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Self

import torch
from msgspec.structs import replace
from torch import Tensor

from ..quant import BF16, FP8, NVFP4, JoinedLayout, Plain, UnsupportedError, WeightSlot
from ..quant.scheme import has_kernels
from .assembly import Assembly
from .checks import check_finite, check_scale, check_shape
from .clock import Clock
from .errors import ShapeError
from .pending import FLOATS, Arrival, Backlog, Form, PendingUnit, Run, form_of

SCALE_TENSORS = ("k_scale", "v_scale")
TENSORS = {"bf16": 1, "fp8": 2, "nvfp4": 3}  # of a shard


class SlotStaging:
    """Collects shards; complete units go into `assembly`, with those beside them where the backlog has room for them.

    `live`, `dry`, `master`: see `Assembly`.
    """

    def __init__(
        self,
        slot: WeightSlot,
        clock: Clock,
        backlog: Backlog,
        *,
        live: bool = False,
        dry: bool = False,
        master: bool = False,
    ) -> None:
        self.slot, self.backlog = slot, backlog
        self.assembly = Assembly(slot, clock, backlog, live=live, dry=dry, master=master)
        self.primary = self.assembly.primary
        self.received: set[tuple[int, int, str]] = set()
        self.handed_on: set[int] = set()  # units that are complete
        self._came_whole = False  # the weight of all units, in one tensor
        self.pending: dict[int, PendingUnit] = {}
        self.runs: dict[int, Run] = {}  # of every pending unit
        first = next(iter(slot.tensors.values()))
        self.device, self.checks_later = first.device, has_kernels(first)

    @classmethod
    def for_names(cls, slot: WeightSlot) -> Self:
        """One that only tells names."""
        return cls(slot, Clock(), Backlog(), dry=True)

    # receiving

    def receive(self, name: str, tensor: str, unit: int, shard: int, value: Tensor) -> bool:
        """Take one shard's tensor; False if it came before. The value is copied before this returns."""
        if (unit, shard, tensor) in self.received or (self._came_whole and tensor != "input_scale"):
            return False
        if value.requires_grad:
            value = value.detach()
        self.received.add((unit, shard, tensor))
        if tensor == "input_scale":
            self._input_scale(name, unit, shard, value)
            return True
        pending = self._pending(name, tensor, unit, value)
        self._matrix_or_scale(name, tensor, unit, shard, value, pending)
        pending.left -= 1
        if not pending.left:  # nobody below holds a view of the buffers any more: they are freed before they are packed
            pending.run.complete.add(unit)
            if len(pending.run.complete) == len(pending.run.expected):
                self._finish(pending.run)
        return True

    @property
    def takes_stack(self) -> bool:
        """Whether nothing of the weight has come yet, so that all of it may come at once."""
        return not self.pending and not self.handed_on

    def receive_stack(self, name: str, stack: Tensor, layout: JoinedLayout) -> None:
        """Take all units of a float weight at once; without a copy in between if it has the dtype, the order and the
        device that the slot quantizes from: then a GPU may read it until `backlog.give_back()`."""
        units, device, dtype = self.slot.shape.num_units, self.device, self._unquantized.dtype
        self._came_whole = True
        step = self._run_length
        self.handed_on.update(range(units))
        for start in range(0, units, step):
            part = layout.sorted_rows(stack[start : start + step].detach(), self.slot.shape)
            if part.device != device or part.dtype != dtype or not part.is_contiguous():
                with self.backlog.side.beside() if self.checks_later else nullcontext():
                    part = part.to(device=device, dtype=dtype).contiguous()
            arrival = Arrival(range(start, start + len(part)), "bf16", {self.primary: part}, unchecked=[(name, part)])
            arrival.borrowed = part.untyped_storage().data_ptr() == stack.untyped_storage().data_ptr()
            arrival.alone = not arrival.borrowed
            del part
            self._hand_on(arrival)

    @cached_property
    def _run_length(self) -> int:
        if self.slot.shape.units is None:
            return 1
        return self.backlog.run_length(self.slot.shape.num_units, self._bytes_of(self._unquantized))

    def _bytes_of(self, scheme: Plain | FP8 | NVFP4) -> int:
        specs = scheme.matrices(self.slot.shape.unit).values()
        return sum(torch.Size(spec.shape).numel() * spec.dtype.itemsize for spec in specs)

    def _input_scale(self, name: str, unit: int, shard: int, value: Tensor) -> None:
        check_shape(name, value, (1,))
        value = value.to(self.device, torch.float32, copy=True)  # what is checked is what is copied later
        self.backlog.side.lend([value])
        check_scale(name, value)
        with self.backlog.side.beside():
            scales = self.assembly.own_scale("input_scale")
            (scales if self.slot.shape.units is None else scales[unit])[shard] = value.reshape(())

    def _matrix_or_scale(
        self, name: str, tensor: str, unit: int, shard: int, value: Tensor, pending: PendingUnit
    ) -> None:
        if tensor in pending.run.matrices:
            places = pending.run.places(tensor, shard, self.slot.shape)
            self._matrix(name, tensor, value, pending, places[unit - pending.run.first])
        else:
            rows = self.slot.shape.rows[shard]
            if value.numel() not in (1, rows):
                raise ShapeError(f"{name}: expected one scale or {rows}, got {list(value.shape)}")
            check_scale(name, value, zero=True)  # of a weight of zeros
            pending.scales[tensor, shard] = value.to(torch.float32, copy=True).reshape(-1)

    def _matrix(self, name: str, tensor: str, value: Tensor, pending: PendingUnit, target: Tensor) -> None:
        if pending.form == "bf16" and value.dtype not in FLOATS:
            raise ShapeError(f"{name}: {value.dtype} is no weight; send bfloat16, float16 or float32")
        if value.shape != target.shape:
            check_shape(name, value, tuple(target.shape))
            value = value.reshape(target.shape)
        later = tensor not in SCALE_TENSORS and (self.checks_later or pending.run.count > 1)
        if later:
            self.backlog.copy_later(target, value)
            pending.unchecked.append((name, target))  # one look at many spares a GPU's waiting
            return
        target.copy_(value)
        (check_scale if tensor in SCALE_TENSORS else check_finite)(name, target)  # as rounded: it may overflow BF16

    def _pending(self, name: str, tensor: str, unit: int, value: Tensor) -> PendingUnit:
        form = form_of(tensor, value.dtype)
        pending = self.pending.get(unit)
        if pending is None:
            own = self.slot.scheme.name
            if form != "bf16" and self.slot.shape.cols is None:
                raise UnsupportedError(f"{name}: a vector has no {form} form", ["send BF16"])
            if form not in ("bf16", own) and own != "bf16":
                raise UnsupportedError(
                    f"{name} is stored in {form}, but its layer is computed in {own}",
                    ["send BF16", "or open the engine with quant=None or quant='bf16'"],
                )
            return self._open(unit, form)
        if pending.form != form:
            raise ShapeError(f"{name}: shards of one weight came in {pending.form} and in {form}")
        return pending

    # runs

    def _open(self, unit: int, form: Form) -> PendingUnit:
        """A place for a unit: in a run with its neighbours, or alone where there is no room for them."""
        run = self.runs.get(unit)
        if run is None:
            run = self._new_run(unit, form)
        elif run.form != form:
            run.expected.discard(unit)
            run = self._alone(unit, form)
        self.runs[unit] = run
        pending = self.pending[unit] = PendingUnit(form, run, TENSORS[form] * len(self.slot.shape.rows))
        return pending

    def _new_run(self, unit: int, form: Form) -> Run:
        length = self._run_length
        if form != "bf16" and isinstance(self.slot.scheme, Plain):
            length = 1  # it is widened to float32 on its way
        unit_bytes = self._bytes_of(self._scheme_of(form)) if length > 1 else 0
        while length > 1:
            first = unit // length * length
            count = min(length, self.slot.shape.num_units - first)
            free = {u for u in range(first, first + count) if u not in self.runs and u not in self.handed_on}
            if len(free) > 1 and self.backlog.take(count * unit_bytes):
                run = Run(form, first, count, self._buffers(form, count), count * unit_bytes, free)
                self.runs.update(dict.fromkeys(free, run))
                return run
            length = -(-length // 2)
        return self._alone(unit, form)

    def _alone(self, unit: int, form: Form) -> Run:
        return Run(form, unit, 1, self._buffers(form, 1), 0, {unit})

    def _scheme_of(self, form: Form) -> Plain | FP8 | NVFP4:
        """What a weight of this form is stored in while it arrives."""
        return {"bf16": self._unquantized, "fp8": FP8(), "nvfp4": NVFP4()}[form]

    def _buffers(self, form: Form, count: int) -> dict[str, Tensor]:
        shape = self.slot.shape
        specs = self._scheme_of(form).matrices(shape if shape.units is None else replace(shape, units=count))
        return {key: torch.empty(spec.shape, dtype=spec.dtype, device=self.device) for key, spec in specs.items()}

    @property
    def _unquantized(self) -> Plain:
        return self.slot.scheme if isinstance(self.slot.scheme, Plain) else BF16

    def _finish(self, run: Run) -> None:
        """Hand a run's complete units on; incomplete ones go on alone."""
        if not self.checks_later:  # else many copies wait for each other, until the backlog computes
            self.backlog.copy_now()
        run.views.clear()
        parts = list(run.parts())
        self.backlog.side.lend(run.matrices.values())
        for part in parts:
            inside = slice(part.start - run.first, part.stop - run.first)
            whole = len(part) == run.count
            matrices = run.matrices if whole else {key: t[inside] for key, t in run.matrices.items()}
            arrival = Arrival(part, run.form, matrices, alone=run.count == 1)
            arrival.scales = [self.pending[unit].scales for unit in part]
            arrival.unchecked = [pair for unit in part for pair in self.pending[unit].unchecked]
            self.backlog.side.lend(scale for scales in arrival.scales for scale in scales.values())
            for unit in part:
                del self.pending[unit], self.runs[unit]
            if part is parts[-1]:
                arrival.release = partial(self.backlog.free, run.num_bytes)
            self.handed_on.update(part)
            self._hand_on(arrival)
        if not parts:
            self.backlog.free(run.num_bytes)

    def _hand_on(self, arrival: Arrival) -> None:
        """To the assembly: on a CPU now, so that memory is free again; on a GPU with others."""
        if self.checks_later:
            held = 0 if arrival.borrowed else arrival.num_bytes
            self.backlog.compute_later(partial(self.assembly.add, arrival), held)
        else:
            self.assembly.add(arrival)

    def settle(self) -> None:
        """Finish complete units that wait for others; nothing more is to come."""
        self.backlog.copy_now()
        for run in {id(run): run for run in self.runs.values()}.values():
            for unit in run.expected & self.pending.keys() - run.complete:
                for name, value in self.pending[unit].unchecked:
                    check_finite(name, value)
            self._finish(run)

    # the ledger

    def missing(self) -> list[str]:
        """Names that must still arrive before this slot can be committed."""
        open_units = (unit for unit in range(self.slot.shape.num_units) if unit not in self.handed_on)
        names = [
            name
            for unit in open_units
            for name in self._missing_of(unit, self.pending[unit].form if unit in self.pending else "bf16")
        ]
        return names + list(self._missing_input_scales())

    def _missing_of(self, unit: int, form: Form) -> Iterator[str]:
        scales = {"bf16": (), "fp8": ("weight_scale",), "nvfp4": ("weight_scale", "weight_scale_2")}[form]
        for shard, module in enumerate(self.slot.modules[unit]):
            for tensor in (self.primary, *scales):
                if (unit, shard, tensor) not in self.received:
                    yield f"{module}.{tensor}"

    def _missing_input_scales(self) -> Iterator[str]:
        if self.slot.loaded or "input_scale" not in self.assembly.scales:
            return
        for unit, modules in enumerate(self.slot.modules):
            for shard, module in enumerate(modules):
                if (unit, shard, "input_scale") not in self.received:
                    yield f"{module}.input_scale"
