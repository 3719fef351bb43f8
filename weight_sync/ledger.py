"""`Ledger`: what has come in one session, and what must still come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ..quant import ModelError, WeightSlot
from .checks import check_finite
from .digest import tensor_digest
from .errors import CoverageError
from .pairs import with_prefix
from .plan import SyncPlan, Target
from .staging import SlotStaging


class Ledger:
    """Every tensor of every touched layer comes once; what is unknown or doubled is collected for one error.

    `full`: all layers must come. `prefix` is put before names that come without it. `last`: the name at hand.
    """

    def __init__(self, plan: SyncPlan, prefix: str, *, full: bool) -> None:
        self.plan, self.prefix, self.full = plan, prefix, full
        self.num_tensors = self.num_bytes = 0
        self.last = ""
        self.duplicate: list[str] = []
        self._unexpected: list[str] = []
        self._ignored: dict[str, int] = {}
        self._tied: dict[str, int] = {}

    def enter(self, name: str, value: Tensor) -> Target | None:
        """Where a tensor goes; None for one that is only noted."""
        self.num_tensors += 1
        self.num_bytes += value.nbytes
        if self.prefix:
            name = with_prefix(name, self.prefix)
        self.last = name
        target = self.plan.find(name)
        if target is None:
            self._unexpected.append(name)
        elif isinstance(target, str):
            self._ignore(target)
        elif name in self.plan.tied:
            check_finite(name, value)
            self._tied[name] = tensor_digest(value.to(torch.bfloat16))
        elif target.tensor == "input_scale" and "input_scale" not in target.slot.scales:
            self._ignore("activations are not quantized with static scales")
        else:
            return target
        return None

    def _ignore(self, why: str) -> None:
        self._ignored[why] = self._ignored.get(why, 0) + 1

    def check(self, stagings: Mapping[WeightSlot, SlotStaging]) -> None:
        """Raise `CoverageError` unless every touched layer is complete and every name known and single."""
        plan = self.plan  # a twin lacks what its slot lacks
        missing = [n for slot, staging in stagings.items() if not plan.is_twin(slot) for n in staging.missing()]
        if self.full:
            missing += [name for slot in plan.addressed if slot not in stagings for name in names_of(slot)]
        if missing or self._unexpected or self.duplicate:
            hint = plan.hint(self.prefix) if self._unexpected else ""
            raise CoverageError(missing, self._unexpected, self.duplicate, hint=hint)

    def check_tied(self, digests: Mapping[WeightSlot, Mapping[str, int]]) -> None:
        """Raise `ModelError` if a tied tensor came with other values than the one that it is tied to will have."""
        for name, digest in self._tied.items():
            target = self.plan.resolve(name)
            assert target is not None
            if digests[target.slot][target.tensor] != digest:
                raise ModelError(f"{name} is tied to {self.plan.tied[name]}, but the two differ")

    def warnings(self) -> Iterator[str]:
        yield from (f"{count} tensors ignored: {why}" for why, count in self._ignored.items())


def names_of(slot: WeightSlot) -> list[str]:
    """Every name that a full session must bring for an untouched slot."""
    if slot.loaded and slot.kept:
        return []
    return SlotStaging.for_names(slot).missing()
