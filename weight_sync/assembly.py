"""What grows from the complete units of one slot: stored values, their digests, the packed copy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..quant import FP8, NVFP4, Plain, UnsupportedError, WeightSlot
from ..quant.scheme import has_kernels
from .clock import Clock
from .digest import MASK, UnitDigests, combine_units, read_units
from .pending import Arrival, Backlog, UnitScales


class Assembly:
    """Quantizes units that lie side by side in one call, packs them in another, into `packed`.

    `live` (streamed and host mode) writes into the slot's served tensors; `dry` only takes digests; `master` keeps what
    came in BF16 on the host.
    """

    def __init__(
        self, slot: WeightSlot, clock: Clock, backlog: Backlog, *, live: bool, dry: bool, master: bool
    ) -> None:
        self.slot, self.clock, self.backlog = slot, clock, backlog
        self.live, self.dry, self.master = live, dry, master
        self.primary = next(iter(slot.matrices))
        self.packed: dict[str, Tensor] = {}
        self.scales = dict(slot.scales)  # the served ones, until others come: `own_scale`
        self.digests: dict[str, int] = {}  # stored tensor -> digest over all units, once read
        self._unread: list[tuple[str, range, UnitDigests]] = []  # that a GPU may still be computing
        self._master: dict[int, Tensor] = {}

    def add(self, arrival: Arrival) -> None:
        """Take complete units. On a CPU what arrived is checked first, and freed before it is packed; a GPU tells later
        whether it was finite, and it is held until then."""
        units = arrival.units
        with self.clock("quantize"):
            stored = self._quantize(arrival)
            for key, value in stored.items():
                self._unread.append((key, units, self.backlog.digests.add(value if self.stacked else value[None])))
        for key in stored.keys() - self.slot.matrices.keys():
            self._keep_scale(key, units, stored.pop(key))
        if not self.dry:
            with self.clock("prepare"):
                self._place(units, self.slot.packer.prepare(stored), borrowed=arrival.borrowed)

    def _keep_scale(self, key: str, units: range, value: Tensor) -> None:
        served = self.slot.scales[key]
        if len(units) == self.slot.shape.num_units and value.shape == served.shape and value.device == served.device:
            self.scales[key] = value
        else:
            own = self.own_scale(key)
            (own[units.start : units.stop] if self.stacked else own).copy_(value)

    def own_scale(self, key: str) -> Tensor:
        """The scale that this session may write."""
        if self.scales[key] is self.slot.scales[key]:
            self.scales[key] = self.slot.scales[key].clone()
        return self.scales[key]

    @property
    def stacked(self) -> bool:
        return self.slot.shape.units is not None

    def _quantize(self, arrival: Arrival) -> dict[str, Tensor]:
        weight, scheme = arrival.matrices.get(self.primary), self.slot.scheme
        later = weight is not None and has_kernels(weight)
        if not later:
            arrival.check()
        stored = self._stored(arrival)
        if later:
            told_by_scales = arrival.form == "bf16" and not isinstance(scheme, Plain)  # a kernel's scales
            scales = [stored[key] for key in stored.keys() - self.slot.matrices.keys()]
            self._check_later(arrival, scales if told_by_scales else list(arrival.matrices.values()))
        if self.master and arrival.form == "bf16":
            host = arrival.matrices[self.primary].to("cpu", copy=arrival.borrowed)
            self._master.update(zip(arrival.units, host if self.stacked else (host,), strict=True))
        arrival.clear()
        if not later:
            arrival.release()
        return stored

    def _check_later(self, arrival: Arrival, telling: Sequence[Tensor]) -> None:
        held = arrival.num_bytes if arrival.alone else 0
        values = [(name, None if arrival.borrowed else value) for name, value in arrival.unchecked]
        self.backlog.checks.add(telling, values, held, arrival.release)

    def _stored(self, arrival: Arrival) -> dict[str, Tensor]:
        """The stored form of some units in the slot's own scheme."""
        scheme, shape = self.slot.scheme, self.slot.shape.unit
        if arrival.form == "bf16":
            return scheme.quantize(arrival.matrices[self.primary], shape)
        per_tensor = isinstance(scheme, FP8) and not scheme.per_channel
        source = NVFP4() if arrival.form == "nvfp4" else FP8(per_channel=not per_tensor)
        stored = dict(arrival.matrices)
        per_row = isinstance(source, FP8) and source.per_channel
        for key in {key for key, _ in arrival.scales[0]}:
            values = [self._assembled(key, unit, per_row=per_row) for unit in arrival.scales]
            stored[key] = torch.stack(values) if self.stacked else values[0]
        if isinstance(scheme, Plain):
            device = stored[self.primary].device
            return scheme.quantize(source.dequantize({k: t.to(device) for k, t in stored.items()}, shape), shape)
        return stored

    def _assembled(self, key: str, scales: UnitScales, *, per_row: bool) -> Tensor:
        """The shards' scales of one unit side by side: one a shard, or spread over the rows."""
        rows = self.slot.shape.rows
        shards = [scales[key, shard] for shard in range(len(rows))]
        if per_row:
            return torch.cat([scale.expand(count) for scale, count in zip(shards, rows, strict=True)])
        if any(scale.numel() > 1 for scale in shards):
            raise UnsupportedError(
                f"{self.slot.name} came with one FP8 scale a row, but is computed with one a tensor",
                ["open the engine with quant='fp8_channel'"],
            )
        return torch.cat(shards)

    def _place(self, units: range, packed: dict[str, Tensor], *, borrowed: bool) -> None:
        foreign = borrowed and isinstance(self.slot.scheme, Plain)  # stored as it came, it is still the sender's
        if self.live:
            self.slot.place(self.slot.tensors, slice(units.start, units.stop), packed)
        elif len(units) == self.slot.shape.num_units and not foreign:
            self.packed = packed
        else:
            for key in packed.keys() - self.packed.keys():
                self.packed[key] = torch.empty_like(self.slot.tensors[key], dtype=packed[key].dtype)
            self.slot.place(self.packed, slice(units.start, units.stop), packed)

    def seal(self) -> None:
        """Derive the packed scales; every unit has been finished."""
        if not self.dry:
            with self.clock("prepare"):
                self.packed.update(self.slot.packer.derive(self.scales))
        for key, value in self.packed.items():
            served = self.slot.tensors[key]
            widens = (value.dtype, served.dtype) == (torch.bfloat16, torch.float32)
            assert value.shape == served.shape, f"{self.slot.name}/{key}"
            assert value.dtype == served.dtype or widens, f"{self.slot.name}/{key}"

    def master_units(self) -> list[Tensor] | None:
        """What came in BF16, unit by unit; None if any of it came quantized."""
        units = range(self.slot.shape.num_units)
        return [self._master[unit] for unit in units] if len(self._master) == len(units) else None

    def unread(self) -> list[tuple[str, range, UnitDigests]]:
        """(stored tensor, units, their digests) of all that has come since the last call."""
        found, self._unread = self._unread, []
        if "input_scale" in self.scales:
            found.append(("input_scale", range(1), self.backlog.digests.add(self.scales["input_scale"][None])))
        return found


def read_digests(assemblies: Sequence[Assembly]) -> None:
    """Set `digests` of all these, of one session, whose every unit has come."""
    waiting = [(assembly, *one) for assembly in assemblies for one in assembly.unread()]
    if not waiting:
        return
    assemblies[0].backlog.digests.run()
    told = read_units([digests.values for *_, digests in waiting])
    found: dict[tuple[Assembly, str], int] = {}
    for (assembly, key, *_), part in zip(
        waiting, combine_units(told, [units for *_, units, _ in waiting]), strict=True
    ):
        found[assembly, key] = (found.get((assembly, key), 0) + part) & MASK
    for (assembly, key), digest in found.items():
        assembly.digests[key] = digest
