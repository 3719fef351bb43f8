"""`reference`: one linear kernel per expert, experts in order. Exact on every device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ...quant import Capability, LinearKernel, Scheme, WeightShape, select_kernel
from ...quant.kernels.gemm import batch_dependent
from ..activation import gated_activation
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
    routes: ClassVar[bool] = False
    shows_w2: ClassVar[bool] = True
    capturable: ClassVar[bool] = False
    leaves_sum: ClassVar[bool] = False
    takes_codes = False

    def __init__(
        self,
        config: MoeConfig,
        scheme: Scheme,
        capability: Capability,
        dtype: torch.dtype,
        linear_kernel: str = "auto",
    ) -> None:
        self.config, self.dtype = config, dtype
        self.activate = gated_activation(config.activation, config.swiglu_limit, config.swiglu_alpha)
        self.watch_w2: Callable[[Tensor], None] = lambda x: None
        self.w13, self.w2 = (
            select_kernel(scheme, shape, capability, dtype, linear_kernel)(scheme, shape, dtype, capability)
            for shape in expert_shapes(config)
        )

    @staticmethod
    def unsupported(config: MoeConfig, scheme: Scheme, capability: Capability, dtype: torch.dtype) -> str | None:
        return None

    @staticmethod
    def batch_dependent(capability: Capability) -> str | None:
        return batch_dependent(capability)

    def apply(self, x: Tensor, ids: Tensor, weights: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]) -> Tensor:
        order = ids.flatten().argsort(stable=True)  # (token, choice) pairs, expert by expert
        counts = ids.flatten().bincount(minlength=self.config.num_experts).tolist()
        inner = self.activate(self._each(self.w13, x[order // self.config.top_k], counts, w13))
        self.watch_w2(inner)
        outs = x.new_empty(ids.numel(), self.config.hidden_size)  # a row for every (token, choice)
        outs[order] = self._each(self.w2, inner, counts, w2)
        return (outs.view(*ids.shape, self.config.hidden_size).float() * weights[..., None]).sum(1).to(self.dtype)

    def _each(self, kernel: LinearKernel, x: Tensor, counts: Sequence[int], packed: dict[str, Tensor]) -> Tensor:
        """Rows of x, expert by expert, through their expert's weight: [num_rows, rows of the weight]."""
        outs = []
        for expert, rows in enumerate(x.split(counts)):
            if len(rows):
                unit = {name: tensor[expert] for name, tensor in packed.items()}
                outs.append(kernel.apply(rows, unit, unit.get("bias")))
        return torch.cat(outs) if outs else x.new_empty(0, kernel.shape.num_rows)
