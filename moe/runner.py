"""`MoeRunner`: one way to compute routed experts; the ordered registry; the choice among them."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..quant import Capability, Scheme, UnsupportedError, WeightShape
from ..quant.slot import Packer
from .config import MoeConfig
from .runners.reference import ReferenceRunner
from .runners.triton import TritonRunner


class ExpertPacker(Packer, Protocol):
    """How a stack of experts is packed: a linear kernel, or what a runner has of its own."""

    shape: WeightShape


class MoeRunner(Protocol):
    """A runner bound to a config, scheme and dtype; `w13` and `w2` say how its slots are packed.

    It shows `watch_w2` every input [num_pairs, intermediate_size] of the down projections; the layer sees that of w13.
    """

    name: ClassVar[str]
    watch_w2: Callable[[Tensor], None]

    @property
    def w13(self) -> ExpertPacker: ...
    @property
    def w2(self) -> ExpertPacker: ...

    def __init__(
        self,
        config: MoeConfig,
        scheme: Scheme,
        capability: Capability,
        dtype: torch.dtype,
        linear_kernel: str,
    ) -> None: ...

    @staticmethod
    def unsupported(config: MoeConfig, scheme: Scheme, capability: Capability, dtype: torch.dtype) -> str | None:
        """Why this runner cannot compute such a layer, or None if it can."""
        ...

    def apply(self, x: Tensor, ids: Tensor, weights: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]) -> Tensor:
        """x [num_tokens, hidden_size], ids and weights [num_tokens, top_k] -> [num_tokens, hidden_size].

        With `config.bias`, `w13` and `w2` also hold "bias" [num_experts, rows].
        """
        ...


MOE_RUNNERS: tuple[type[MoeRunner], ...] = (TritonRunner, ReferenceRunner)


def select_runner(
    config: MoeConfig,
    scheme: Scheme,
    capability: Capability,
    name: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
) -> type[MoeRunner]:
    """The first runner of the order that can, or the one that was asked for; every reason if none can."""
    known = {runner.name: runner for runner in MOE_RUNNERS}
    if name not in ("auto", *known):
        raise UnsupportedError(f"MoE runner {name!r} is unknown", [f"known: auto, {', '.join(known)}"])
    reasons = []
    for runner in MOE_RUNNERS if name == "auto" else (known[name],):
        reason = runner.unsupported(config, scheme, capability, dtype)
        if reason is None:
            return runner
        reasons.append(f"{runner.name}: {reason}")
    raise UnsupportedError(f"no MoE runner for {scheme.name} on {capability}", reasons)
