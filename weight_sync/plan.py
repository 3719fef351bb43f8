"""`SyncPlan`: the trainer's or checkpoint's name -> slot, unit, shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

from ..quant import JoinedLayout, WeightSlot, matches_any

SCALE_NAMES = ("weight_scale", "weight_scale_2", "input_scale")


class Target(Struct, frozen=True):
    """Where one tensor goes; `unit` or `shard` None: all units stacked, or all shards joined as `layout` tells."""

    slot: WeightSlot
    tensor: str
    unit: int | None
    shard: int | None
    layout: JoinedLayout = JoinedLayout()


class SyncPlan:
    """All slots of an engine, and the names that lead to them.

    `renames`: (from, to) substrings applied to incoming names, for trainers that name modules otherwise.
    `ignored`: pattern over whole names -> why such tensors are not needed.
    `tied`: name -> name of the tensor that it must equal.
    `components`: what the names begin with, where there are several models ("transformer", "transformer_2").
    `twins`: slot -> a second slot of the same weight in another scheme, which takes whatever the first one takes.
    """

    def __init__(
        self,
        slots: Sequence[WeightSlot],
        *,
        renames: Sequence[tuple[str, str]] = (),
        ignored: Mapping[str, str] | None = None,
        tied: Mapping[str, str] | None = None,
        twins: Mapping[WeightSlot, WeightSlot] | None = None,
        components: Sequence[str] = (),
    ) -> None:
        self.components = tuple(components)
        self.twins = dict(twins or {})
        self.addressed = tuple(slots)  # what names lead to
        self.slots = (*self.addressed, *self.twins.values())
        self._twins = frozenset(self.twins.values())
        self.renames, self.ignored, self.tied = tuple(renames), dict(ignored or {}), dict(tied or {})
        self._targets: dict[str, Target] = {}
        self._found: dict[str, Target | str] = {}  # by name as it came: trainers send the same names every time
        for slot in self.addressed:
            self._add(slot)

    def _add(self, slot: WeightSlot) -> None:
        tensor = next(iter(slot.matrices))
        for unit, modules in enumerate(slot.modules):
            for shard, module in enumerate(modules):
                self._targets[f"{module}.{tensor}"] = Target(slot, tensor, unit, shard)
        for module in slot.fused:  # transformers names stacked experts without `.weight`
            name = f"{module}.{tensor}" if slot.shape.units is None else module
            self._targets[name] = Target(slot, tensor, None, None, slot.joined)

    def find(self, name: str) -> Target | str | None:
        """`resolve`, or the reason for which a tensor of this name is ignored; remembers what it found."""
        found = self._found.get(name)
        if found is None:
            found = self.why_ignored(name) or self.resolve(name)
            if found is not None:
                self._found[name] = found
        return found

    def resolve(self, name: str) -> Target | None:
        """The target of an incoming tensor, or None for an unknown name."""
        for old, new in self.renames:
            name = name.replace(old, new)
        name = self.tied.get(name, name)
        module, _, suffix = name.rpartition(".")
        if suffix not in SCALE_NAMES:
            return self._targets.get(name)
        found = self._targets.get(f"{module}.weight")
        return None if found is None else Target(found.slot, suffix, found.unit, found.shard, found.layout)

    def copies(self, slot: WeightSlot) -> tuple[WeightSlot, ...]:
        """The slot itself, and its twin if it has one."""
        twin = self.twins.get(slot)
        return (slot,) if twin is None else (slot, twin)

    def is_twin(self, slot: WeightSlot) -> bool:
        return slot in self._twins

    def hint(self, prefix: str) -> str:
        """What to say of unknown names that came under `prefix`."""
        if len(self.components) < 2 or prefix:
            return ""
        starts = " or ".join(f"'{component}.'" for component in self.components)
        return f"there are {len(self.components)} modules: begin every name with {starts}, or say module=..."

    def why_ignored(self, name: str) -> str | None:
        """The reason for which a tensor of this name is not needed, or None."""
        return next((why for pattern, why in self.ignored.items() if matches_any(name, (pattern,))), None)
