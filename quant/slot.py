"""`WeightSlot`: where one weight lives. What must arrive, fixed packed storage, prepare, derive, commit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from msgspec import Struct
from torch import Tensor

from .meter import ActivationMeter, ClippingMeter
from .scheme import Scheme, Stored, TensorSpec, WeightShape


class Packer(Protocol):
    """The part of a kernel that a slot needs: pure functions from stored to packed."""

    def packed(self) -> dict[str, TensorSpec]: ...
    def prepare(self, matrices: Stored) -> dict[str, Tensor]: ...
    def derive(self, scales: Stored) -> dict[str, Tensor]: ...


class JoinedLayout(Struct, frozen=True):
    """How a tensor that holds all shards of a weight lies, one unit of it.

    rows first, shard after shard:       g0 g1 g2 u0 u1 u2
    interleaved, shards take turns:      g0 u0 g1 u1 g2 u2
    `transposed`: a matrix comes as [cols, rows].
    """

    transposed: bool = False
    interleaved: bool = False

    def rows_first(self, tensor: Tensor) -> Tensor:
        """[num_rows, cols], or [num_rows] of a vector, shards still as they lie; a view."""
        return tensor.mT if self.transposed and tensor.ndim == 2 else tensor

    def sorted_rows(self, matrices: Tensor, shape: WeightShape) -> Tensor:
        """Joined matrices of some units -> [..., num_rows, cols], shard after shard; a view where it can be."""
        rows = matrices.mT if self.transposed else matrices
        if not self.interleaved:
            return rows
        return rows.unflatten(-2, (-1, len(shape.rows))).transpose(-3, -2).flatten(-3, -2)

    def shard(self, rows_first: Tensor, shape: WeightShape, shard: int) -> Tensor:
        """One shard's rows, a view."""
        if self.interleaved:
            return rows_first[shard :: len(shape.rows)]
        return rows_first[shape.shard_slice(shard)]


class WeightSlot:
    """One weight (linear: shards fused along rows; experts: a stack of units) in packed storage that never moves.

    `modules[unit][shard]` are the checkpoint's module names; `fused` is the module under which a trainer may send
    all shards joined along rows (and all units stacked), lying as `joined` tells. A `kept` slot (KV scales) need not
    come again once loaded. Only a weight session writes a slot.
    """

    def __init__(
        self,
        name: str,
        modules: Sequence[Sequence[str]],
        scheme: Scheme,
        shape: WeightShape,
        packer: Packer,
        *,
        device: torch.device,
        fused: Sequence[str] = (),
        kept: bool = False,
        joined: JoinedLayout | None = None,
    ) -> None:
        self.name, self.modules, self.fused = name, tuple(map(tuple, modules)), tuple(fused)
        self.scheme, self.shape, self.packer, self.kept = scheme, shape, packer, kept
        self.joined = joined or JoinedLayout()
        self.matrices, self.scale_specs = scheme.matrices(shape), scheme.scales(shape)
        self.tensors = {key: empty(spec, device) for key, spec in packer.packed().items()}
        self.scales = {key: empty(spec, device) for key, spec in self.scale_specs.items()}
        self.digests: dict[str, int] = {}
        self.meter: ActivationMeter | None = None
        if "input_scale" in self.scales:
            self.meter = ClippingMeter(self.scales["input_scale"], scheme.code_max)
        assert len(self.modules) == shape.num_units
        assert all(len(unit) == len(shape.rows) for unit in self.modules)
        assert not self.joined.interleaved or len(set(shape.rows)) == 1

    @property
    def loaded(self) -> bool:
        """Whether a session has committed this slot."""
        return bool(self.digests)

    @property
    def num_bytes(self) -> int:
        """Bytes of packed storage: none while released."""
        return sum(t.untyped_storage().nbytes() for t in self.tensors.values())

    def unreleasable(self) -> str | None:
        """Why the packed storage cannot be freed, or None."""
        pinned = [key for key, t in self.tensors.items() if not self.kept and not t.untyped_storage().resizable()]
        return f"{self.name}: a numpy view or another process shares {', '.join(pinned)}" if pinned else None

    def release(self) -> None:
        """Free the packed storage. Tensor objects, scales and digests stay; a kept slot stays as it is."""
        if not self.kept:
            for tensor in self.tensors.values():
                tensor.untyped_storage().resize_(0)

    def allocate(self) -> None:
        """Give released tensors storage again, at other addresses and with no values in it."""
        for tensor in self.tensors.values():
            tensor.untyped_storage().resize_(tensor.nbytes)

    def watch(self, x: Tensor) -> None:
        """Show an input of this weight to its meter, if it has one."""
        if self.meter is not None:
            self.meter(x)

    def place(self, target: Mapping[str, Tensor], units: int | slice, packed: Mapping[str, Tensor]) -> None:
        """Write packed tensors of a unit, or of several side by side, into `target`, which has this slot's specs."""
        for key, value in packed.items():
            (target[key] if self.shape.units is None else target[key][units]).copy_(value)

    def commit(self, packed: Mapping[str, Tensor], scales: Mapping[str, Tensor], digests: Mapping[str, int]) -> None:
        """Copy staged tensors onto the served ones: addresses stay, so CUDA graphs stay valid."""
        for key, value in packed.items():
            if value is not self.tensors[key]:
                self.tensors[key].copy_(value)
        for key, value in scales.items():
            if value is not self.scales[key]:
                self.scales[key].copy_(value)
        self.digests = dict(digests)


def empty(spec: TensorSpec, device: torch.device) -> Tensor:
    return torch.empty(spec.shape, dtype=spec.dtype, device=device)
