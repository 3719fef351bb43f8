"""`SlotLinear`: what takes the place of a `nn.Linear` of diffusers, and the precision it computes in."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...quant import UnsupportedError

Apply = Callable[[Tensor, Tensor | None], Tensor]  # x [num_tokens, in_features], bias


class PrecisionSwitch:
    """The precision that all linears of an engine compute in right now, in the thread that asks."""

    def __init__(self) -> None:
        self._mine = threading.local()

    @property
    def now(self) -> str:
        return getattr(self._mine, "precision", "quantized")

    @contextmanager
    def at(self, precision: str) -> Iterator[None]:
        before, self._mine.precision = self.now, precision
        try:
            yield
        finally:
            self._mine.precision = before


class SlotLinear(nn.Module):
    """x [..., in_features] -> [..., out_features] through the kernel of a slot.

    `ways`: precision -> how; which there are, `Transformer.resolve_precision` has checked. `per_sample`: a scale is
    taken over the first dimension's items one by one, so that no sample's scale depends on its neighbours (on a GPU the
    order of a product's sums may still depend on the number of tokens). `read`: the weight [out_features, in_features],
    None where it is quantized.
    """

    def __init__(
        self,
        name: str,
        linear: nn.Linear,
        ways: Mapping[str, Apply],
        switch: PrecisionSwitch,
        bias: Tensor | None,
        *,
        dtype: torch.dtype,
        device: torch.device,
        read: Callable[[], Tensor] | None,
        per_sample: bool,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.ways, self.switch, self.per_sample = dict(ways), switch, per_sample
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.weight = LookedAt.make(name, (self.out_features, self.in_features), dtype, device, read)

    @property
    def quantized(self) -> bool:
        return self.weight.read is None

    def forward(self, x: Tensor) -> Tensor:
        apply = self.ways[self.switch.now]
        if self.per_sample and x.ndim > 1:
            outs = [apply(sample.reshape(-1, self.in_features), self.bias) for sample in x]
            return torch.stack(outs).view(*x.shape[:-1], self.out_features)
        return apply(x.reshape(-1, self.in_features), self.bias).view(*x.shape[:-1], self.out_features)


LOOKS = {"size", "dim", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "get_device", "__len__"}
LOOKED_AT = {"dtype", "shape", "device", "ndim", "is_cuda", "is_meta", "is_cpu", "layout", "requires_grad", "is_sparse"}


class LookedAt(Tensor):
    """A weight that models may look at: dtype, shape and device cost nothing. What computes with it gets the weight
    itself, or an `UnsupportedError` where it is quantized: never values that are not there."""

    path: str
    read: Callable[[], Tensor] | None

    @classmethod
    def make(
        cls,
        path: str,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        read: Callable[[], Tensor] | None,
    ) -> LookedAt:
        made = torch.empty((), dtype=dtype, device=device).expand(*shape).as_subclass(cls)
        made.path, made.read = path, read
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        looks = func.__name__ in LOOKS or func.__name__ == "__get__" and func.__self__.__name__ in LOOKED_AT
        with torch._C.DisableTorchFunctionSubclass():
            if looks:
                return func(*args, **(kwargs or {}))
            return func(*_read(args), **_read(kwargs or {}))

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"<weight of {self.path}: {list(self.shape)} {self.dtype}>"


def _read(value: Any) -> Any:
    """Arguments of a function with the weights themselves in them."""
    if isinstance(value, LookedAt):
        if value.read is None:
            around = f"{value.path.rpartition('.')[0]}.*".removeprefix(".")
            raise UnsupportedError(
                f"{value.path} is quantized, and its model computes with the weight itself, not through the module",
                [f"keep it and what is beside it in BF16: EngineConfig(keep=[..., {around!r}])"],
            )
        return value.read()
    if isinstance(value, list | tuple):
        return type(value)([_read(one) for one in value])
    if isinstance(value, dict):
        return {key: _read(one) for key, one in value.items()}
    return value
