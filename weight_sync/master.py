"""`Master`: the BF16 weights that came in, kept on the host, and the adapter that is merged into what is served."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from torch import Tensor

from ..quant import ModelError, Plain, WeightSlot
from .lora import Adapter

MasterPlace = Literal["host"]
Units = Sequence[Tensor]  # unit by unit [num_rows, cols] BF16 (or the dtype of an unquantized slot), host


class Master:
    """What the served weights were made from. `weights` are the base, without the adapter; only commits change it."""

    def __init__(self) -> None:
        self.weights: dict[WeightSlot, Units] = {}
        self.adapter = Adapter()

    @property
    def num_bytes(self) -> int:
        return self.adapter.num_bytes + sum(t.nbytes for units in self.weights.values() for t in units)

    def replace(self, received: Mapping[WeightSlot, Units | None]) -> list[str]:
        """Take new base weights (None: they came quantized). Returns the names of slots that lost their adapter."""
        for slot, units in received.items():
            if units is None:
                self.weights.pop(slot, None)
            else:
                self.weights[slot] = units
        return sorted(slot.name for slot in received if self.adapter.factors.pop(slot, None) is not None)

    def merged(self, slot: WeightSlot, unit: int, adapter: Adapter | None = None) -> Tensor:
        """One unit with `adapter` (None: the one being served) merged in."""
        chosen = self.adapter if adapter is None else adapter
        return chosen.merge(slot, unit, self.weights[slot][unit])

    def pairs(self, slots: Iterable[WeightSlot], adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
        """The slots' weights with `adapter` merged in, named as the checkpoint names them."""
        for slot in slots:
            tensor = next(iter(slot.matrices))
            for unit, modules in enumerate(slot.modules):
                merged = self.merged(slot, unit, adapter)
                for shard, module in enumerate(modules):
                    yield f"{module}.{tensor}", merged[slot.shape.shard_slice(shard)]

    def touched(self, adapter: Adapter) -> list[WeightSlot]:
        """The slots that change when `adapter` takes the place of the one being served."""
        slots = {**self.adapter.factors, **adapter.factors}
        bare = sorted(slot.name for slot in slots.keys() - self.weights.keys())
        if bare:
            raise ModelError(
                f"no BF16 weights to merge an adapter into: {', '.join(bare)} came quantized; "
                "send them in BF16 with update_weights, or open a BF16 checkpoint"
            )
        return list(slots)

    def quantization_error(self) -> dict[str, float]:
        """Slot name -> ||dequantize(quantize(W)) - W|| / ||W|| (Frobenius) over quantized slots, W as served."""
        slots = [slot for slot in self.weights if not isinstance(slot.scheme, Plain)]
        return {slot.name: self._error(slot) for slot in slots}

    def _error(self, slot: WeightSlot) -> float:
        error = size = 0.0
        shape, device = slot.shape.unit, next(iter(slot.tensors.values())).device
        for unit in range(slot.shape.num_units):
            weight = self.merged(slot, unit).to(device)
            restored = slot.scheme.dequantize(slot.scheme.quantize(weight, shape), shape)
            error += float((restored - weight.float()).double().square().sum())
            size += float(weight.double().square().sum())
        return math.sqrt(error / size) if size else 0.0
