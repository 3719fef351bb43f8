"""`reference`: one linear kernel per expert, experts in order. Exact on every device."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...quant import Capability, Scheme, WeightShape, select_kernel
from ..config import MoeConfig


def expert_shapes(config: MoeConfig) -> tuple[WeightShape, WeightShape]:
    """The stacks w13 (gate over up) and w2 (down)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    w13 = WeightShape((inner, inner), hidden, units=config.num_experts, one_scale=True)
    return w13, WeightShape((hidden,), inner, units=config.num_experts)


class ReferenceRunner:
    """Gathers each expert's tokens and applies a linear kernel; sums in float32, in the order of the choices.

    With per-tensor activations the "tensor" is what one expert gets, so a result depends on its batch company.
    """

    name: ClassVar[str] = "reference"

    def __init__(
        self,
        config: MoeConfig,
        scheme: Scheme,
        capability: Capability,
        dtype: torch.dtype,
        linear_kernel: str = "auto",
    ) -> None:
        self.config, self.dtype = config, dtype
        self.watch_w2: Callable[[Tensor], None] = lambda x: None
        self.w13, self.w2 = (
            select_kernel(scheme, shape, capability, dtype, linear_kernel)(scheme, shape, dtype)
            for shape in expert_shapes(config)
        )

    @staticmethod
    def unsupported(config: MoeConfig, scheme: Scheme, capability: Capability) -> str | None:
        return None

    def apply(self, x: Tensor, ids: Tensor, weights: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]) -> Tensor:
        order = ids.flatten().argsort(stable=True)  # (token, choice) pairs, expert by expert
        counts = ids.flatten().bincount(minlength=self.config.num_experts).tolist()
        outs = x.new_empty(ids.numel(), self.config.hidden_size)  # a row for every (token, choice)
        for expert, chosen in enumerate(order.split(counts)):
            if len(chosen):
                token = chosen // self.config.top_k
                outs[chosen] = self._expert(x[token], _unit(w13, expert), _unit(w2, expert))
        return (outs.view(*ids.shape, self.config.hidden_size).float() * weights[..., None]).sum(1).to(self.dtype)

    def _expert(self, x: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]) -> Tensor:
        gate, up = self.w13.apply(x, w13).chunk(2, dim=-1)
        inner = F.silu(gate) * up
        self.watch_w2(inner)
        return self.w2.apply(inner, w2)


def _unit(packed: dict[str, Tensor], expert: int) -> dict[str, Tensor]:
    return {name: tensor[expert] for name, tensor in packed.items()}
