"""`MoeRunner`: one way to compute routed experts; the ordered registry; the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..quant import Capability, FP8Rows, Scheme, UnsupportedError, WeightShape
from ..quant.kernel import log_choice, shares_a_scale
from ..quant.slot import Packer
from .choices import Choices
from .config import MoeConfig
from .runners.flashinfer_trtllm import FlashInferTrtllm, FlashInferTrtllmRouted
from .runners.reference import ReferenceRunner
from .runners.triton import TritonRunner


class ExpertPacker(Packer, Protocol):
    """How a stack of experts is packed: a linear kernel, or what a runner has of its own."""

    shape: WeightShape


class MoeRunner(Protocol):
    """A runner bound to a config, scheme and dtype; `w13` and `w2` say how its slots are packed.

    With `shows_w2` it shows `watch_w2` every input [num_pairs, intermediate_size] of the down projections; the layer
    sees that of w13. With `routes` it chooses the experts itself: it has `apply_logits` in place of `apply`.
    `capturable`: in a CUDA graph, since it asks nothing of the host. With `leaves_sum` it has `choices` too, and with
    `takes_codes` their x may be quantized: FP8 per token.
    """

    name: ClassVar[str]
    routes: ClassVar[bool]
    shows_w2: ClassVar[bool]
    capturable: ClassVar[bool]
    leaves_sum: ClassVar[bool]
    takes_codes: bool
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

    @staticmethod
    def batch_dependent(capability: Capability) -> str | None:
        """Why a token's bits may depend on the other tokens, or None if they do not."""
        ...

    def apply(self, x: Tensor, ids: Tensor, weights: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]) -> Tensor:
        """x [num_tokens, hidden_size], ids and weights [num_tokens, top_k] -> [num_tokens, hidden_size].

        With `config.bias`, `w13` and `w2` also hold "bias" [num_experts, rows].
        """
        ...


class RoutingRunner(MoeRunner, Protocol):
    """A runner that routes."""

    def apply_logits(
        self, x: Tensor, logits: Tensor, bias: Tensor | None, w13: dict[str, Tensor], w2: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """x [num_tokens, hidden_size], logits [num_tokens, num_experts], bias of the choice float32 [num_experts] or
        None -> [num_tokens, hidden_size], and the chosen experts int16 [num_tokens, top_k]."""
        ...


class ChoicesRunner(MoeRunner, Protocol):
    """A runner that can leave the sum over a token's choices to who comes next."""

    def choices(
        self, x: Tensor | FP8Rows, ids: Tensor, weights: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]
    ) -> Choices:
        """What `apply` sums."""
        ...


MOE_RUNNERS: tuple[type[MoeRunner], ...] = (FlashInferTrtllmRouted, FlashInferTrtllm, TritonRunner, ReferenceRunner)


def select_runner(
    config: MoeConfig,
    scheme: Scheme,
    capability: Capability,
    name: str = "auto",
    dtype: torch.dtype = torch.bfloat16,
    *,
    linear_kernel: str = "auto",
    batch_invariant: bool = False,
) -> type[MoeRunner]:
    """The first runner that can, or the one that was asked for; every reason if none can.

    A `linear_kernel` by name asks for `reference`, which is made of linear kernels, unless a runner is named, too.
    With `batch_invariant` only those can that give a token the same bits in any company. What was taken, and why
    nothing before it, is logged once.
    """
    known = {runner.name: runner for runner in MOE_RUNNERS}
    if name == "auto" and linear_kernel != "auto":
        name = "reference"
    if name not in ("auto", *known):
        raise UnsupportedError(f"MoE runner {name!r} is unknown", [f"known: auto, {', '.join(known)}"])
    passed_over = []
    names = tuple(known) if name == "auto" else (name,)
    judged = judge_runners(config, scheme, capability, dtype, names, batch_invariant=batch_invariant)
    for runner, reason in judged:
        if reason is None:
            what = f"experts in {scheme.name}, activations {scheme.activation}"
            log_choice(what, runner.name, str(capability), *passed_over)
            return runner
        passed_over.append(f"{runner.name}: {reason}")
    kind = "batch-invariant MoE runner" if batch_invariant else "MoE runner"
    raise UnsupportedError(f"no {kind} for {scheme.name} on {capability}", passed_over)


def judge_runners(
    config: MoeConfig,
    scheme: Scheme,
    capability: Capability,
    dtype: torch.dtype,
    names: Sequence[str] | None = None,
    *,
    batch_invariant: bool = False,
) -> list[tuple[type[MoeRunner], str | None]]:
    """(runner, why it cannot or None) for the named runners, or for all."""
    runners = [runner for runner in MOE_RUNNERS if names is None or runner.name in names]
    reasons = [runner.unsupported(config, scheme, capability, dtype) for runner in runners]
    if batch_invariant:
        reasons = [
            reason or shares_a_scale(scheme) or runner.batch_dependent(capability)
            for runner, reason in zip(runners, reasons, strict=True)
        ]
    return list(zip(runners, reasons, strict=True))
