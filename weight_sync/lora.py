"""LoRA adapters: pairs of low-rank factors, and where in the engine's slots each pair belongs."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from msgspec import Struct
from torch import Tensor

from ..quant import ConfigError, ModelError, UnsupportedError, WeightSlot
from .checks import check_finite
from .errors import CoverageError, ShapeError
from .pairs import pull, with_prefix
from .pending import FLOATS
from .plan import SyncPlan, Target
from .source import Source, open_source
from .sources.peft_folder import PeftFolder

RULE = "an adapter brings lora_A and lora_B of each of its modules, once, and the model has these modules"
NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
FOREIGN = {
    "lora_magnitude_vector": "DoRA scales whole rows",
    "lora_embedding_": "embeddings are not adapted",
    ".bias": "biases are not adapted",
    "modules_to_save": "full tensors belong into update_weights",
}


class Factors(Struct, frozen=True):
    """delta = scale * b @ a, for some rows of one unit."""

    rows: slice
    a: Tensor  # [rank, cols] float32, host
    b: Tensor  # [num_rows, rank] float32, host
    scale: float

    @property
    def delta(self) -> Tensor:
        return self.scale * (self.b @ self.a)


class Adapter(Struct):
    """What is added to the weights of which slots: slot -> unit -> pairs over disjoint rows."""

    factors: dict[WeightSlot, dict[int, list[Factors]]] = {}

    @property
    def num_bytes(self) -> int:
        units = (unit for units in self.factors.values() for unit in units.values())
        return sum(pair.a.nbytes + pair.b.nbytes for unit in units for pair in unit)

    def merge(self, slot: WeightSlot, unit: int, weight: Tensor) -> Tensor:
        """weight [num_rows, cols] plus this adapter's deltas: summed in float32, rounded once to weight's dtype."""
        pairs = self.factors.get(slot, {}).get(unit)
        if not pairs:
            return weight
        merged = weight.to(torch.float32, copy=True)
        for pair in pairs:
            merged[pair.rows] += pair.delta
        return merged.to(weight.dtype)


def read_adapter(source: Source, plan: SyncPlan, alpha: float | None, rank: int | None, prefix: str = "") -> Adapter:
    """Read a whole adapter in PEFT's names; a folder's adapter_config.json says what the arguments leave open.

    `prefix` is put before modules that come without it. An adapter all of whose names begin with the first of several
    models goes where `prefix` says: diffusers calls every one so.
    """
    folder = PeftFolder(Path(source)) if isinstance(source, str | Path) else None
    if folder is not None:
        alpha, rank = folder.alpha if alpha is None else alpha, folder.rank if rank is None else rank
    scale = _scale(alpha, rank, rslora=folder is not None and folder.use_rslora)
    assert rank is not None
    reader = _AdapterReader(plan, rank, scale, prefix)
    return reader.read(pull(open_source(source) if folder is None else folder))


def _scale(alpha: float | None, rank: int | None, *, rslora: bool) -> float:
    """alpha / rank (LoRA, arXiv:2106.09685), or alpha / sqrt(rank) (rsLoRA, arXiv:2312.03732)."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"an adapter's rank is an integer above 0, got {rank!r}; give rank=...")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ConfigError(f"an adapter's alpha is a finite number, got {alpha!r}; give alpha=...")
    return alpha / (math.sqrt(rank) if rslora else rank)


class _AdapterReader:
    """Collects factors by module, pairs them, and places the pairs."""

    def __init__(self, plan: SyncPlan, rank: int, scale: float, prefix: str) -> None:
        self.plan, self.rank, self.scale, self.prefix = plan, rank, scale, prefix
        self.found: dict[str, dict[str, tuple[str, Tensor]]] = {}  # module -> A or B -> its name, its value
        self.first = _first_model(plan, prefix)
        self.of_first: list[str] = []  # names that begin with it
        self.of_prefix: list[str] = []
        self.unexpected: list[str] = []
        self.duplicate: list[str] = []

    def read(self, pairs: Iterable[tuple[str, Tensor]]) -> Adapter:
        for name, value in pairs:
            self._take(name, value)
        if self.of_prefix:
            self.unexpected += self.of_first
        missing = [_twin(name) for sides in self.found.values() if len(sides) == 1 for name, _ in sides.values()]
        adapter = Adapter() if missing else self._place()
        if missing or self.unexpected or self.duplicate:
            hint = self.plan.hint(self.prefix) if self.unexpected else ""
            raise CoverageError(missing, self.unexpected, self.duplicate, rule=RULE, hint=hint)
        if not adapter.factors:
            raise ModelError("the adapter holds no tensors; to take an adapter off, call remove_lora")
        return adapter

    def _take(self, name: str, value: Tensor) -> None:
        for part, why in FOREIGN.items():
            if part in name:
                raise UnsupportedError(f"{name} is more than plain LoRA", [why])
        match = NAME.fullmatch(name)
        target = None if match is None else self._target(name, match["module"])
        if match is None or target is None:
            self.unexpected.append(name)
            return
        (self.of_first if self._is_of_first(match["module"]) else self.of_prefix).append(name)
        sides = self.found.setdefault(match["module"], {})
        if match["side"] in sides:
            self.duplicate.append(name)
            return
        self._check_shape(name, match["side"], target, value)
        check_finite(name, value)
        sides[match["side"]] = name, value.detach().to("cpu", torch.float32, copy=True)

    def _target(self, name: str, module: str) -> Target | None:
        weight = self._weight_of(module)
        if weight in self.plan.tied:
            raise UnsupportedError(f"{name} adapts a tied weight", [f"{self.plan.tied[weight]} would change with it"])
        target = self.plan.resolve(weight)
        return None if target is None or target.slot.shape.cols is None else target

    def _is_of_first(self, module: str) -> bool:
        return self.first is not None and module.startswith(self.first)

    def _weight_of(self, module: str) -> str:
        module = module.removeprefix(self.first or "")
        return with_prefix(f"{module}.weight", self.prefix)

    def _check_shape(self, name: str, side: str, target: Target, value: Tensor) -> None:
        shape = target.slot.shape
        rows = shape.num_rows if target.shard is None else shape.rows[target.shard]
        expected = [self.rank, shape.cols] if side == "A" else [rows, self.rank]
        if list(value.shape) != expected:
            raise ShapeError(f"{name}: expected shape {expected} at rank {self.rank}, got {list(value.shape)}")
        if value.dtype not in FLOATS:
            raise ShapeError(f"{name}: {value.dtype} is no factor; send bfloat16, float16 or float32")

    def _place(self) -> Adapter:
        adapter = Adapter()
        for module, sides in self.found.items():
            target = self.plan.resolve(self._weight_of(module))
            assert target is not None
            assert target.unit is not None or target.slot.shape.units is None
            shape = target.slot.shape
            rows = slice(0, shape.num_rows) if target.shard is None else shape.shard_slice(target.shard)
            pairs = adapter.factors.setdefault(target.slot, {}).setdefault(target.unit or 0, [])
            if any(rows.start < other.rows.stop and other.rows.start < rows.stop for other in pairs):
                self.duplicate += [name for name, _ in sides.values()]
            pairs.append(Factors(rows, sides["A"][1], sides["B"][1], self.scale))
        return adapter


def _first_model(plan: SyncPlan, prefix: str) -> str | None:
    """What names of the first of several models begin with, where `prefix` is that of another one."""
    first = f"{plan.components[0]}." if len(plan.components) > 1 else prefix
    return first if prefix not in ("", first) else None


def _twin(name: str) -> str:
    """The other half of a pair."""
    head, side, tail = re.split(r"(?<=\.lora_)([AB])(?=\.)", name)
    return head + {"A": "B", "B": "A"}[side] + tail
