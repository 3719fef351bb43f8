"""What one slot has received in one session, and the packed copy that grows from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from msgspec import Struct, field
from torch import Tensor

from ..quant import BF16, FP8, NVFP4, Plain, UnsupportedError, WeightSlot
from .clock import Clock
from .digest import combine_units, tensor_digest
from .errors import NonFiniteError, ShapeError

Form = Literal["bf16", "fp8", "nvfp4"]
SCALE_TENSORS = ("k_scale", "v_scale")
FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class PendingUnit(Struct):
    """One unit under way: matrices in a buffer of our own, fused along rows; scales a shard."""

    form: Form
    matrices: dict[str, Tensor]
    scales: dict[tuple[str, int], Tensor] = field(default_factory=dict)


def form_of(tensor: str, dtype: torch.dtype) -> Form:
    """In which form a weight arrives, as any one of its tensors tells."""
    if tensor == "weight_scale_2" or dtype == torch.uint8 or (tensor, dtype) == ("weight_scale", torch.float8_e4m3fn):
        return "nvfp4"
    return "fp8" if tensor == "weight_scale" or dtype == torch.float8_e4m3fn else "bf16"


class SlotStaging:
    """Collects shards, quantizes a unit once it is complete, packs it into `packed`.

    `live` (streamed mode) writes into the slot's served tensors; `dry` only takes digests; `master` keeps what came
    in BF16 on the host.
    """

    def __init__(
        self, slot: WeightSlot, clock: Clock, *, live: bool = False, dry: bool = False, master: bool = False
    ) -> None:
        self.slot, self.clock, self.live, self.dry, self.master = slot, clock, live, dry, master
        self.primary = next(iter(slot.matrices))
        self.received: set[tuple[int, int, str]] = set()
        self.pending: dict[int, PendingUnit] = {}
        self.finished: set[int] = set()
        self.packed: dict[str, Tensor] = {}
        self.scales = {name: t.clone() for name, t in slot.scales.items()}
        self._digests: dict[str, dict[int, int]] = {}
        self._master: dict[int, Tensor] = {}

    # receiving

    def receive(self, name: str, tensor: str, unit: int, shard: int, value: Tensor) -> bool:
        """Take one shard's tensor; False if it came before. The value is copied before this returns."""
        if (unit, shard, tensor) in self.received:
            return False
        if tensor == "input_scale":
            self._input_scale(name, unit, shard, value)
        else:
            self._matrix_or_scale(name, tensor, unit, shard, value)
        self.received.add((unit, shard, tensor))
        if unit in self.pending and not any(self._missing_of(unit, self.pending[unit].form)):
            self._finish(unit)
        return True

    def _input_scale(self, name: str, unit: int, shard: int, value: Tensor) -> None:
        _check_shape(name, value, (1,))
        check_scale(name, value)
        scales = self.scales["input_scale"]
        (scales if self.slot.shape.units is None else scales[unit])[shard] = value.reshape(())

    def _matrix_or_scale(self, name: str, tensor: str, unit: int, shard: int, value: Tensor) -> None:
        pending = self._pending(name, tensor, unit, value)
        rows = self.slot.shape.shard_slice(shard)
        if tensor in pending.matrices:
            target = pending.matrices[tensor][rows]
            self._check_dtype(name, value, pending.form)
            _check_shape(name, value, tuple(target.shape))
            target.copy_(value.reshape(target.shape))
            check_finite(name, target)  # as rounded: float32 may overflow BF16
            if tensor in SCALE_TENSORS:
                check_scale(name, target)
            return
        if value.numel() not in (1, rows.stop - rows.start):
            raise ShapeError(f"{name}: expected one scale or {rows.stop - rows.start}, got {list(value.shape)}")
        check_scale(name, value, zero=True)  # of a weight of zeros
        pending.scales[tensor, shard] = value.detach().to(torch.float32, copy=True).reshape(-1)

    def _pending(self, name: str, tensor: str, unit: int, value: Tensor) -> PendingUnit:
        form = form_of(tensor, value.dtype)
        if unit not in self.pending:
            own = self.slot.scheme.name
            if form != "bf16" and self.slot.shape.cols is None:
                raise UnsupportedError(f"{name}: a vector has no {form} form", ["send BF16"])
            if form not in ("bf16", own) and own != "bf16":
                raise UnsupportedError(
                    f"{name} is stored in {form}, but its layer is computed in {own}",
                    ["send BF16", "or open the engine with quant=None or quant='bf16'"],
                )
            self.pending[unit] = PendingUnit(form, self._buffers(form))
        elif self.pending[unit].form != form:
            raise ShapeError(f"{name}: shards of one weight came in {self.pending[unit].form} and in {form}")
        return self.pending[unit]

    def _buffers(self, form: Form) -> dict[str, Tensor]:
        scheme = {"bf16": self._unquantized, "fp8": FP8(), "nvfp4": NVFP4()}[form]
        device = next(iter(self.slot.tensors.values())).device
        specs = scheme.matrices(self.slot.shape.unit)
        return {key: torch.empty(spec.shape, dtype=spec.dtype, device=device) for key, spec in specs.items()}

    @property
    def _unquantized(self) -> Plain:
        return self.slot.scheme if isinstance(self.slot.scheme, Plain) else BF16

    def _check_dtype(self, name: str, value: Tensor, form: Form) -> None:
        if form == "bf16" and value.dtype not in FLOATS:
            raise ShapeError(f"{name}: {value.dtype} is no weight; send bfloat16, float16 or float32")

    # finishing

    def _finish(self, unit: int) -> None:
        if self.master and self.pending[unit].form == "bf16":
            self._master[unit] = self.pending[unit].matrices[self.primary].cpu()
        with self.clock("quantize"):
            stored = self._stored(self.pending.pop(unit))  # what arrived is freed before it is packed
            matrices = {key: stored[key] for key in self.slot.matrices}
            for key in stored:
                self._digests.setdefault(key, {})[unit] = tensor_digest(stored[key])
        for key in stored.keys() - matrices.keys():
            (self.scales[key] if self.slot.shape.units is None else self.scales[key][unit]).copy_(stored[key])
        self.finished.add(unit)
        if not self.dry:
            with self.clock("prepare"):
                self._place(unit, self.slot.packer.prepare(matrices))

    def _stored(self, pending: PendingUnit) -> dict[str, Tensor]:
        """The stored form of one unit in the slot's own scheme."""
        scheme, shape = self.slot.scheme, self.slot.shape.unit
        if pending.form == "bf16":
            return scheme.quantize(pending.matrices[self.primary], shape)
        per_tensor = isinstance(scheme, FP8) and not scheme.per_channel
        source = NVFP4() if pending.form == "nvfp4" else FP8(per_channel=not per_tensor)
        stored = dict(pending.matrices)
        for key in {key for key, _ in pending.scales}:
            stored[key] = self._assembled(key, pending, per_row=isinstance(source, FP8) and source.per_channel)
        if isinstance(scheme, Plain):
            return scheme.quantize(source.dequantize(stored, shape), shape)
        return stored

    def _assembled(self, key: str, pending: PendingUnit, *, per_row: bool) -> Tensor:
        """The shards' scales side by side: one a shard, or spread over the rows."""
        rows = self.slot.shape.rows
        shards = [pending.scales[key, shard] for shard in range(len(rows))]
        if per_row:
            return torch.cat([scale.expand(count) for scale, count in zip(shards, rows, strict=True)])
        if any(scale.numel() > 1 for scale in shards):
            raise UnsupportedError(
                f"{self.slot.name} came with one FP8 scale a row, but is computed with one a tensor",
                ["open the engine with quant='fp8_channel'"],
            )
        return torch.cat(shards)

    def _place(self, unit: int, packed: dict[str, Tensor]) -> None:
        if self.live:
            self.slot.place(self.slot.tensors, unit, packed)
        elif self.slot.shape.units is None:
            self.packed = packed
        else:
            for key in packed.keys() - self.packed.keys():
                self.packed[key] = torch.empty_like(self.slot.tensors[key], dtype=packed[key].dtype)
            self.slot.place(self.packed, unit, packed)

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

    # the ledger

    def digests(self) -> dict[str, int]:
        """Stored tensor -> digest over all units."""
        digests = {key: combine_units(units) for key, units in self._digests.items()}
        if "input_scale" in self.scales:
            digests["input_scale"] = tensor_digest(self.scales["input_scale"])
        return digests

    def missing(self) -> list[str]:
        """Names that must still arrive before this slot can be committed."""
        open_units = (unit for unit in range(self.slot.shape.num_units) if unit not in self.finished)
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
        if self.slot.loaded or "input_scale" not in self.scales:
            return
        for unit, modules in enumerate(self.slot.modules):
            for shard, module in enumerate(modules):
                if (unit, shard, "input_scale") not in self.received:
                    yield f"{module}.input_scale"


def _check_shape(name: str, value: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(value.shape) != expected and not (value.numel() == 1 and expected == (1,)):
        raise ShapeError(f"{name}: expected shape {list(expected)}, got {list(value.shape)}")


def check_finite(name: str, value: Tensor) -> None:
    """Raise `NonFiniteError` if a float tensor holds NaN or infinity (E4M3 has NaN only)."""
    if value.dtype == torch.uint8:
        return
    if value.dtype == torch.float8_e4m3fn:
        finite = bool((value.view(torch.uint8) & 0x7F).amax() < 0x7F) if value.numel() else True
    else:
        finite = bool(torch.isfinite(torch.stack(torch.aminmax(value))).all()) if value.numel() else True
    if not finite:
        raise NonFiniteError(f"{name} holds NaN or infinity")


def check_scale(name: str, value: Tensor, *, zero: bool = False) -> None:
    """Raise `NonFiniteError` unless a scale is finite and positive (or zero, where that has a meaning)."""
    check_finite(name, value)
    if bool((value < 0).any()) or not zero and bool((value == 0).any()):
        raise NonFiniteError(f"{name} must be positive, got {value.min().item()}")
