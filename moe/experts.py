"""`RoutedExperts`: two slots (w13, w2), their biases where they have any, and a runner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from ..quant import (
    Capability,
    FP8Rows,
    JoinedLayout,
    Plain,
    Scheme,
    WeightShape,
    WeightSlot,
    select_kernel,
    values_of,
)
from ..quant.kernels.plain import PlainKernel
from .choices import Choices, summed
from .config import MoeConfig
from .routing import route
from .runner import ChoicesRunner, RoutingRunner, select_runner
from .runners.reference import ReferenceRunner, expert_shapes


class RoutedExperts:
    """The experts of one layer.

    `prefix` is the checkpoint's module of the experts; `projections` its names of gate, up and down:
    `prefix.E.gate` [intermediate_size, hidden_size]. Trainers may send transformers 5's stacked tensors too:
    `prefix.gate_up_proj` [num_experts, 2 * intermediate_size, hidden_size] and
    `prefix.down_proj` [num_experts, hidden_size, intermediate_size], in the layout that `joined` declares;
    biases as `prefix.gate_up_proj_bias` and `prefix.down_proj_bias`.
    """

    def __init__(
        self,
        prefix: str,
        projections: Sequence[str],
        config: MoeConfig,
        scheme: Scheme,
        *,
        capability: Capability,
        dtype: torch.dtype,
        runner: str = "auto",
        linear_kernel: str = "auto",
        batch_invariant: bool = False,
        joined: JoinedLayout | None = None,
    ) -> None:
        gate, up, down = projections
        self.config, experts = config, range(config.num_experts)
        joined = joined or JoinedLayout()
        asked = {"linear_kernel": linear_kernel, "batch_invariant": batch_invariant}
        chosen = select_runner(config, scheme, capability, runner, dtype, **asked)
        if batch_invariant and chosen is ReferenceRunner:  # it is what its linear kernels are
            for shape in expert_shapes(config):
                select_kernel(scheme, shape, capability, dtype, linear_kernel, batch_invariant=True)
        self.runner = chosen(config, scheme, capability, dtype, linear_kernel)
        self.w13 = WeightSlot(
            f"{prefix}.w13",
            [(f"{prefix}.{e}.{gate}", f"{prefix}.{e}.{up}") for e in experts],
            scheme,
            self.runner.w13.shape,
            self.runner.w13,
            device=capability.device,
            fused=(f"{prefix}.gate_up_proj",),
            joined=joined,
        )
        self.w2 = WeightSlot(
            f"{prefix}.w2",
            [(f"{prefix}.{e}.{down}",) for e in experts],
            scheme,
            self.runner.w2.shape,
            self.runner.w2,
            device=capability.device,
            fused=(f"{prefix}.down_proj",),
            joined=joined,
        )
        self.biases = [_bias_of(slot, dtype, capability) for slot in (self.w13, self.w2)] if config.bias else []
        # what the runner reads: packed tensors never move, so this holds through every swap
        self._served = [dict(self.w13.tensors), dict(self.w2.tensors)]
        for served, bias in zip(self._served, self.biases, strict=False):
            served |= bias.tensors
        if self.runner.shows_w2:
            self.runner.watch_w2 = self.w2.watch
        else:
            self.w2.meter = None  # it would count nothing, which reads as if nothing were clipped

    @property
    def slots(self) -> list[WeightSlot]:
        return [self.w13, self.w2, *self.biases]

    @property
    def takes_codes(self) -> bool:
        """Whether x may come as `FP8Rows` with values: not while a meter looks at them."""
        return self.runner.takes_codes and self.w13.meter is None and self.w2.meter is None

    def dispatch(
        self, x: Tensor | FP8Rows, logits: Tensor, bias: Tensor | None = None
    ) -> tuple[Tensor | Choices, Tensor]:
        """x [num_tokens, hidden_size], router logits [num_tokens, num_experts], bias of the choice or None ->
        [num_tokens, hidden_size] or what to sum, and the ids of the chosen experts [num_tokens, top_k]."""
        if not self.runner.routes:
            ids, weights = route(logits, self.config, bias)
            return self._compute(x, ids, weights), ids
        x = values_of(x)
        self.w13.watch(x)
        return cast(RoutingRunner, self.runner).apply_logits(x, logits, bias, *self._served)

    def __call__(self, x: Tensor | FP8Rows, ids: Tensor, weights: Tensor) -> Tensor:
        """x [num_tokens, hidden_size], ids and weights [num_tokens, top_k] -> [num_tokens, hidden_size]."""
        return summed(self._compute(x, ids, weights))

    def _compute(self, x: Tensor | FP8Rows, ids: Tensor, weights: Tensor) -> Tensor | Choices:
        if not (isinstance(x, FP8Rows) and self.takes_codes):
            x = values_of(x)
            self.w13.watch(x)
        if self.runner.leaves_sum:
            return cast(ChoicesRunner, self.runner).choices(x, ids, weights, *self._served)
        return self.runner.apply(values_of(x), ids, weights, *self._served)


def _bias_of(weight: WeightSlot, dtype: torch.dtype, capability: Capability) -> WeightSlot:
    """The slot of a stacked weight's bias [num_experts, rows]: its rows lie as the weight's do."""
    scheme, shape = Plain(tensor="bias"), WeightShape(weight.shape.rows, None, weight.shape.units)
    return WeightSlot(
        weight.name,
        weight.modules,
        scheme,
        shape,
        PlainKernel(scheme, shape, dtype, capability),
        device=capability.device,
        fused=[f"{name}_bias" for name in weight.fused],
        joined=weight.joined,
    )
