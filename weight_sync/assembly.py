"""What grows from the complete units of one slot: stored values, their digests, the packed copy."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant import FP8, NVFP4, Plain, UnsupportedError, WeightSlot
from ..quant.scheme import has_kernels
from .checks import is_finite
from .clock import Clock
from .digest import combine_units, tensor_digest, unit_digests
from .pending import Arrival, UnitScales


class Assembly:
    """Quantizes units that lie side by side in one call, packs them in another, into `packed`.

    `live` (streamed mode) writes into the slot's served tensors; `dry` only takes digests; `master` keeps what came
    in BF16 on the host.
    """

    def __init__(self, slot: WeightSlot, clock: Clock, *, live: bool, dry: bool, master: bool) -> None:
        self.slot, self.clock, self.live, self.dry, self.master = slot, clock, live, dry, master
        self.primary = next(iter(slot.matrices))
        self.finished: set[int] = set()
        self.packed: dict[str, Tensor] = {}
        self.scales = {name: t.clone() for name, t in slot.scales.items()}
        self._digests: dict[str, dict[int, int]] = {}
        self._unread: list[tuple[str, range, Tensor]] = []  # digests that a GPU may still be computing
        self._master: dict[int, Tensor] = {}

    def add(self, arrival: Arrival) -> None:
        """Take complete units. What arrived is freed before it is packed; nothing is placed that is not finite."""
        units = arrival.units
        with self.clock("quantize"):
            stored = self._quantize(arrival)
            for key, value in stored.items():
                self._unread.append((key, units, unit_digests(value if self.stacked else value[None])))
        for key in stored.keys() - self.slot.matrices.keys():
            (self.scales[key][units.start : units.stop] if self.stacked else self.scales[key]).copy_(stored.pop(key))
        self.finished.update(units)
        if not self.dry:
            with self.clock("prepare"):
                self._place(units, self.slot.packer.prepare(stored), borrowed=arrival.borrowed)

    @property
    def stacked(self) -> bool:
        return self.slot.shape.units is not None

    def _quantize(self, arrival: Arrival) -> dict[str, Tensor]:
        weight, scheme = arrival.matrices.get(self.primary), self.slot.scheme
        if weight is None or arrival.form != "bf16" or isinstance(scheme, Plain) or not has_kernels(weight):
            arrival.check()
            stored = self._stored(arrival)
        else:  # a kernel's scales tell it
            stored = self._stored(arrival)
            if not all(is_finite(stored[key]) for key in stored.keys() - self.slot.matrices.keys()):
                arrival.check()
        if self.master and arrival.form == "bf16":
            host = arrival.matrices[self.primary].to("cpu", copy=arrival.borrowed)
            self._master.update(zip(arrival.units, host if self.stacked else (host,), strict=True))
        arrival.clear()
        return stored

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

    def digests(self) -> dict[str, int]:
        """Stored tensor -> digest over all units."""
        for key, units, values in self._unread:
            self._digests.setdefault(key, {}).update(zip(units, values.tolist(), strict=True))
        self._unread = []
        digests = {key: combine_units(units) for key, units in self._digests.items()}
        if "input_scale" in self.scales:
            digests["input_scale"] = tensor_digest(self.scales["input_scale"])
        return digests
