"""`QuantLinear`: one slot and one kernel; fused projections are shard lists, not subclasses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .device import Capability
from .fp8_rows import FP8Rows, values_of
from .kernel import CodesKernel, select_kernel
from .kernels.plain import PlainKernel
from .scheme import Plain, Scheme, WeightShape
from .slot import WeightSlot


class QuantLinear:
    """y = x W^T (+ bias), W = the named modules' weights stacked along rows.

    x [num_tokens, in_features] -> [num_tokens, sum(rows)], in the engine's dtype.
    """

    def __init__(
        self,
        modules: Sequence[str],
        rows: Sequence[int],
        in_features: int,
        scheme: Scheme,
        *,
        capability: Capability,
        dtype: torch.dtype,
        kernel: str = "auto",
        batch_invariant: bool = False,
        bias: bool = False,
        fused: str | None = None,
    ) -> None:
        shape = WeightShape(tuple(rows), in_features)
        chosen = select_kernel(scheme, shape, capability, dtype, kernel, batch_invariant=batch_invariant)
        self.kernel = chosen(scheme, shape, dtype, capability)
        name, joined = fused or modules[0], () if fused is None else (fused,)
        self.slot = WeightSlot(name, [modules], scheme, shape, self.kernel, device=capability.device, fused=joined)
        self.bias = (
            plain_slot(modules, rows, None, Plain(tensor="bias"), capability, dtype, fused=joined) if bias else None
        )

    @property
    def slots(self) -> list[WeightSlot]:
        return [self.slot] if self.bias is None else [self.slot, self.bias]

    @property
    def takes_codes(self) -> bool:
        """Whether x may come as `FP8Rows` without values: not while a meter looks at them."""
        return isinstance(self.kernel, CodesKernel) and self.kernel.takes_codes and self.slot.meter is None

    def __call__(self, x: Tensor | FP8Rows) -> Tensor:
        bias = None if self.bias is None else self.bias.tensors["bias"]
        if isinstance(x, FP8Rows) and isinstance(self.kernel, CodesKernel) and self.takes_codes:
            return self.kernel.multiply(x, self.slot.tensors, bias)
        x = values_of(x)
        self.slot.watch(x)
        return self.kernel.apply(x, self.slot.tensors, bias)


def plain_slot(
    modules: Sequence[str],
    rows: Sequence[int],
    cols: int | None,
    scheme: Plain,
    capability: Capability,
    dtype: torch.dtype,
    *,
    fused: Sequence[str] = (),
    kept: bool = False,
    trailing: Sequence[int] = (),
) -> WeightSlot:
    """A slot for a tensor that is never quantized: norm, embedding, router, bias, KV scale, convolution, table."""
    shape = WeightShape(tuple(rows), cols, trailing=tuple(trailing))
    return WeightSlot(
        fused[0] if fused else modules[0],
        [modules],
        scheme,
        shape,
        PlainKernel(scheme, shape, dtype, capability),
        device=capability.device,
        fused=fused,
        kept=kept,
    )
