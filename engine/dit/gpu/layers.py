"""`Layer`: a linear of the model, or siblings as one product, as the fused forward calls it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from ....quant import UnsupportedError
from ....quant.fp8_rows import FP8Rows
from ....quant.kernels.plain import PlainKernel
from ....quant.kernels.torch_fp8 import TorchFP8Kernel
from ..linears import Linears
from .activations import Activations


class Layer:
    """y = x W^T + bias, of the linears `names` side by side.

    `reads_codes`: x comes as FP8 codes with a scale a token, else as BF16 rows. `UnsupportedError` where the linears
    are no single product, or scales of their input are not taken a token.
    """

    def __init__(self, linears: Mapping[tuple[str, ...], Linears], names: tuple[str, ...], precision: str) -> None:
        what = f"{names[0]} in one launch with what is before it"
        if names not in linears:
            raise UnsupportedError(what, [f"{', '.join(names)} are not stored alike"])
        siblings = linears[names].at(precision)
        kernel: Any = siblings.kernels[0] if len(names) == 1 else siblings.joined
        if kernel is None:
            raise UnsupportedError(what, [f"the rows of {', '.join(names)} do not lie in one packed weight"])
        if siblings.scheme.activation not in ("none", "per_token"):
            raise UnsupportedError(what, [f"its activation scales are {siblings.scheme.activation}, not per_token"])
        self.reads_codes = isinstance(kernel, TorchFP8Kernel)
        if isinstance(kernel, TorchFP8Kernel) and kernel.padded != kernel.shape.matrix:
            raise UnsupportedError(what, [f"its weight {list(kernel.shape.matrix)} is padded to multiples of 16"])
        self.slot, self.kernel = siblings.slot, kernel
        self.packed = siblings.packed(0) if len(names) == 1 else siblings.slot.tensors
        self.bias = _side_by_side(linears[names].biases, what)
        self.num_rows: int = kernel.shape.num_rows
        self.is_plain = isinstance(kernel, PlainKernel) and self.bias is not None

    def __call__(self, x: Activations, out: Tensor | None = None) -> Tensor:
        """x [num_tokens, in_features] -> BF16 [num_tokens, num_rows], written to `out` where it is given."""
        if self.reads_codes:
            assert x.codes is not None
            assert x.scale is not None
            return self.kernel.multiply(FP8Rows(x.codes, x.scale), self.packed, self.bias, out, fast=True)
        assert x.rows is not None
        if out is None:
            return self.kernel.apply(x.rows, self.packed, self.bias)
        if self.is_plain and self.bias is not None and out.is_cuda:
            return torch.addmm(self.bias, x.rows, self.packed["weight"].t(), out=out)
        return out.copy_(self.kernel.apply(x.rows, self.packed, self.bias))

    def gelu(self, x: Activations, out: Tensor | None = None) -> Tensor:
        """gelu(x W^T + bias), the tanh form, of a plain layer: rounded once, by the product itself on a GPU."""
        weight, bias = self.packed["weight"], self.bias
        assert x.rows is not None
        assert bias is not None
        if x.rows.is_cuda:
            return torch._addmm_activation(bias, x.rows, weight.t(), use_gelu=True, out=out)  # pyright: ignore[reportPrivateImportUsage]
        made = F.gelu(x.rows.float() @ weight.float().t() + bias, approximate="tanh").to(torch.bfloat16)
        return made if out is None else out.copy_(made)

    def sum_over(self, first: Tensor, *others: Tensor) -> Tensor:
        """y of [first | other ...], of a plain layer, without joining them: sums are rounded to BF16 after each."""
        weight, start = self.packed["weight"].to(torch.bfloat16), first.shape[1]
        assert self.bias is not None
        y = torch.addmm(self.bias, first, weight[:, :start].t())
        for part in others:
            y.addmm_(part, weight[:, start : start + part.shape[1]].t())
            start += part.shape[1]
        return y


def _side_by_side(biases: Sequence[Tensor | None], what: str) -> Tensor | None:
    """One bias for all: a view, for they are views of one tensor."""
    given = [bias for bias in biases if bias is not None]
    if not given:
        return None
    ends = [bias.data_ptr() + bias.nbytes for bias in given]
    if len(given) < len(biases) or ends[:-1] != [bias.data_ptr() for bias in given[1:]]:
        raise UnsupportedError(what, ["its biases do not lie side by side"])
    return given[0].as_strided((sum(bias.numel() for bias in given),), (1,))


class Written(TypedDict):
    """How a kernel writes its result: as BF16, as FP8 codes, or both."""

    keep: bool
    quantize: bool


def as_read_by(*layers: Layer) -> Written:
    """What these layers need."""
    codes = [layer.reads_codes for layer in layers]
    return {"keep": not all(codes), "quantize": any(codes)}
