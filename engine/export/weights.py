"""A BF16 checkpoint's tensors -> stored tensors in ModelOpt's names, one fused weight or expert at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack
from math import prod
from types import TracebackType
from typing import Any, Self

import torch
from msgspec import Struct
from safetensors import safe_open
from torch import Tensor

from ...quant import JoinedLayout, Plain, WeightSlot
from ...quant.numerics import decode_scale
from ...weight_sync import CoverageError, SafetensorsSource, ShapeError, SyncPlan, Target
from ...weight_sync.staging import check_finite

Named = tuple[str, Tensor]


class Piece(Struct, frozen=True):
    """Where one shard of one unit lies: a tensor of its own, or a part of a joined one, stacked or not."""

    name: str
    unit: int | None
    joined: JoinedLayout | None


class SourceWeights:
    """The tensors of a checkpoint by slot, unit and shard; each is read from its file when it is asked for."""

    def __init__(self, source: SafetensorsSource, plan: SyncPlan) -> None:
        self.plan = plan
        self._stack, self._files = ExitStack(), {}
        for file in source.files:
            tensors: Any = self._stack.enter_context(safe_open(file, framework="pt"))
            self._files |= dict.fromkeys(tensors.keys(), tensors)
        self.pieces: dict[tuple[WeightSlot, int, int], Piece] = {}
        self.copied: dict[WeightSlot, list[str]] = {}  # names of tensors that stay as they are
        self.tied: list[str] = []
        self._find_pieces()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def tensor(self, name: str) -> Tensor:
        return self._files[name].get_tensor(name)

    def kept(self, slot: WeightSlot) -> list[Named]:
        """The tensors of a slot that is not quantized, as they are."""
        tensors = [(name, self.tensor(name)) for name in self.copied[slot]]
        for name, value in tensors:
            check_finite(name, value)
        if sum(value.numel() for _, value in tensors) != prod(slot.shape.matrix):
            got = ", ".join(f"{name} {list(value.shape)}" for name, value in tensors)
            raise ShapeError(f"{got}: expected {list(slot.shape.matrix)} in all")
        return tensors

    def unit(self, slot: WeightSlot, unit: int) -> Tensor:
        """One unit's shards joined along rows: BF16 [num_rows, cols]."""
        shards = [self._shard(slot, unit, shard) for shard in range(len(slot.shape.rows))]
        return torch.cat(shards) if len(shards) > 1 else shards[0]

    def _shard(self, slot: WeightSlot, unit: int, shard: int) -> Tensor:
        piece = self.pieces[slot, unit, shard]
        part = self._files[piece.name].get_slice(piece.name)
        value = part[:] if piece.unit is None else part[piece.unit]
        if piece.joined is not None:
            value = piece.joined.shard(piece.joined.rows_first(value), slot.shape, shard)
        expected = (slot.shape.rows[shard], slot.shape.cols)
        if tuple(value.shape) != expected:
            raise ShapeError(f"{piece.name}: expected shape {list(expected)}, got {list(value.shape)}")
        check_finite(piece.name, value)
        return value.to(torch.bfloat16)

    def _find_pieces(self) -> None:
        unexpected, duplicate = [], []
        for name in sorted(self._files):
            target = self.plan.resolve(name)
            if self.plan.why_ignored(name) is not None:
                continue
            if target is None:
                unexpected.append(name)
            elif name in self.plan.tied:
                self.tied.append(name)
            elif not self._add(name, target):
                duplicate.append(name)
        missing = [
            f"{module}.{next(iter(slot.matrices))}"
            for slot in self.plan.slots
            for unit, modules in enumerate(slot.modules)
            for shard, module in enumerate(modules)
            if (slot, unit, shard) not in self.pieces
        ]
        if missing or unexpected or duplicate:
            raise CoverageError(missing, unexpected, duplicate)

    def _add(self, name: str, target: Target) -> bool:
        """Note what a tensor holds; False if some of it came before."""
        slot = target.slot
        pieces = {
            (slot, unit, shard): Piece(
                name,
                unit if target.unit is None and slot.shape.units is not None else None,
                target.layout if target.shard is None or target.unit is None else None,
            )
            for unit in _span(target.unit, slot.shape.num_units)
            for shard in _span(target.shard, len(slot.shape.rows))
        }
        new = self.pieces.keys().isdisjoint(pieces)
        self.pieces |= pieces
        self.copied.setdefault(slot, []).append(name)
        return new


def _span(index: int | None, count: int) -> range:
    return range(count) if index is None else range(index, index + 1)


def stored_tensors(source: SourceWeights, amax: Mapping[str, Tensor]) -> Iterator[list[Named]]:
    """Everything to write, a list a slot's unit: quantized weights with their scales, other tensors as they are.

    `amax[slot]`: the calibrated max |x| of a weight's inputs; where there is none, no `input_scale` is written.
    """
    for slot in source.plan.slots:
        if isinstance(slot.scheme, Plain):
            yield source.kept(slot)
            continue
        for unit, modules in enumerate(slot.modules):
            stored = slot.scheme.quantize(source.unit(slot, unit), slot.shape.unit)
            if slot.name in amax:
                input_scale = decode_scale(amax[slot.name], slot.scheme.code_max)
                stored["input_scale"] = input_scale.expand(len(modules))
            yield [named for shard in range(len(modules)) for named in shard_tensors(slot, modules, shard, stored)]
    yield [(name, source.tensor(name)) for name in source.tied]


def shard_tensors(
    slot: WeightSlot, modules: Collection[str], shard: int, stored: Mapping[str, Tensor]
) -> Iterator[Named]:
    """One module's tensors: its rows of the matrices, its own value of the scales (0-dim)."""
    module = tuple(modules)[shard]
    for key, value in stored.items():
        per_row = key in slot.matrices
        yield f"{module}.{key}", value[slot.shape.shard_slice(shard)] if per_row else value[shard].clone()
