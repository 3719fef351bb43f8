"""`RoutedExperts`: two slots (w13, w2) and a runner."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..quant import Capability, Scheme, WeightSlot
from .config import MoeConfig
from .runner import select_runner


class RoutedExperts:
    """The experts of one layer.

    `prefix` is the checkpoint's module of the experts; `projections` its names of gate, up and down:
    `prefix.E.gate` [intermediate_size, hidden_size]. Trainers may send transformers 5's stacked tensors too:
    `prefix.gate_up_proj` [num_experts, 2 * intermediate_size, hidden_size] and
    `prefix.down_proj` [num_experts, hidden_size, intermediate_size].
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
    ) -> None:
        gate, up, down = projections
        experts = range(config.num_experts)
        self.runner = select_runner(config, scheme, capability, runner)(
            config, scheme, capability, dtype, linear_kernel
        )
        self.w13 = WeightSlot(
            f"{prefix}.w13",
            [(f"{prefix}.{e}.{gate}", f"{prefix}.{e}.{up}") for e in experts],
            scheme,
            self.runner.w13.shape,
            self.runner.w13,
            device=capability.device,
            fused=(f"{prefix}.gate_up_proj",),
        )
        self.w2 = WeightSlot(
            f"{prefix}.w2",
            [(f"{prefix}.{e}.{down}",) for e in experts],
            scheme,
            self.runner.w2.shape,
            self.runner.w2,
            device=capability.device,
            fused=(f"{prefix}.down_proj",),
        )

        self.runner.watch_w2 = self.w2.watch

    @property
    def slots(self) -> list[WeightSlot]:
        return [self.w13, self.w2]

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """x [num_tokens, hidden_size], ids and weights [num_tokens, top_k] -> [num_tokens, hidden_size]."""
        self.w13.watch(x)
        return self.runner.apply(x, ids, weights, self.w13.tensors, self.w2.tensors)
