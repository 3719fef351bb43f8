"""`torch_fp8`: FP8 x FP8 through `torch._scaled_mm`, one scale a token and one a row of the weight."""

from __future__ import annotations

from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from ..device import Capability
from ..errors import UnsupportedError
from ..fp8_rows import FP8Rows
from ..layout import pad_to
from ..scheme import FP8, Scheme, Stored, TensorSpec, WeightShape
from .activation import fp8_codes
from .gemm import batch_dependent

TILE = 16  # _scaled_mm takes multiples of 16 in N and K


@cache
def cpu_takes_row_scales() -> bool:
    """Whether this torch's `_scaled_mm` runs on a CPU with a scale for every row."""
    codes, scale = torch.zeros(TILE, TILE).to(torch.float8_e4m3fn), torch.ones(TILE, 1)
    try:
        torch._scaled_mm(codes, codes.t(), scale, scale.t(), out_dtype=torch.bfloat16)  # pyright: ignore[reportPrivateImportUsage]
    except (RuntimeError, ValueError, NotImplementedError):
        return False
    return True


def _aligned(scale: Tensor) -> Tensor:
    """cuBLAS reads vectors of scales 16 bytes at a time: those that begin elsewhere (some tokens of many) move."""
    return scale if scale.data_ptr() % 16 == 0 else scale.clone()


def _ceil(size: int) -> int:
    return -(-size // TILE) * TILE


class TorchFP8Kernel:
    """Codes as stored, zero-padded to [ceil(N, 16), ceil(K, 16)]; BF16 out, float32 accumulation."""

    name: ClassVar[str] = "torch_fp8"

    def __init__(self, scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability) -> None:
        assert isinstance(scheme, FP8)
        assert shape.cols is not None
        self.scheme, self.shape, self.dtype = scheme, shape, dtype
        self.padded = (_ceil(shape.num_rows), _ceil(shape.cols))

    @staticmethod
    def unsupported(scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability) -> str | None:
        if not isinstance(scheme, FP8):
            return "computes FP8 only"
        if scheme.activation == "none":
            return "quantizes activations, and these are to stay as they are"
        if dtype == torch.float32:
            return "gives BF16 results, not float32"
        if capability.sm is not None and capability.sm < 89:
            return f"FP8 tensor cores start at sm89, this is {capability}"
        if capability.sm is None and not cpu_takes_row_scales():
            return f"torch {torch.__version__} takes no scale a row on a CPU (2.13 does)"
        return None

    @staticmethod
    def batch_dependent(capability: Capability) -> str | None:
        return None if capability.sm == 90 else f"a row was seen to keep its bits on sm90, and this is {capability}"

    def packed(self) -> dict[str, TensorSpec]:
        weight = TensorSpec(self.shape.dims(*self.padded), torch.float8_e4m3fn)
        specs = {"weight": weight, "row_scale": TensorSpec(self.shape.dims(1, self.padded[0]), torch.float32)}
        if self.scheme.activation == "static":
            specs["input_scale"] = TensorSpec(self.shape.dims(1), torch.float32)
        return specs

    def prepare(self, matrices: Stored) -> dict[str, Tensor]:
        return {"weight": pad_to(matrices["weight"], rows=TILE, cols=TILE).clone()}

    def derive(self, scales: Stored) -> dict[str, Tensor]:
        row_scale = self.scheme.row_scale(scales, self.shape)[..., None, :]
        packed = {"row_scale": pad_to(row_scale, cols=TILE).clone()}
        if self.scheme.activation == "static":
            first = scales["input_scale"][..., :1]
            if not torch.equal(first.expand_as(scales["input_scale"]), scales["input_scale"]):
                raise UnsupportedError(
                    "torch_fp8 quantizes its input once, but the shards have unequal input scales",
                    ["choose linear_kernel='exact', or activation='per_token'"],
                )
            packed["input_scale"] = first.clone()
        return packed

    def apply(self, x: Tensor, packed: Stored, bias: Tensor | None = None) -> Tensor:
        codes, scale = fp8_codes(pad_to(x, cols=TILE), self.scheme.activation, packed.get("input_scale"))
        return self.multiply(FP8Rows(codes, scale), packed, bias)

    @property
    def takes_codes(self) -> bool:
        """Of rows that need no padding along K."""
        return self.scheme.activation == "per_token" and self.padded[1] == self.shape.cols

    def multiply(
        self,
        rows: FP8Rows,
        packed: Stored,
        bias: Tensor | None = None,
        out: Tensor | None = None,
        *,
        fast: bool = False,
    ) -> Tensor:
        """`rows` have K columns, zero-padded like the weight's; one scale for all is as good as one a row.

        `out`: BF16 [num_tokens, num_rows] to write to, of a weight without padding. On a GPU the bias is added before
        the result is rounded. `fast` (Hopper): sums stay in the tensor cores, which keep fewer bits than float32, for
        the whole of K.
        """
        if not len(rows):
            return rows.codes.new_empty(0, self.shape.num_rows, dtype=self.dtype)
        whole = self.padded[0] == self.shape.num_rows
        assert whole or out is None
        within = bias is not None and whole and rows.codes.is_cuda
        product = torch._scaled_mm(  # pyright: ignore[reportPrivateImportUsage]
            rows.codes,
            packed["weight"].t(),
            scale_a=_aligned(rows.scale.view(-1, 1).expand(len(rows), 1).contiguous()),
            scale_b=_aligned(packed["row_scale"]),
            bias=bias if within else None,
            out_dtype=torch.bfloat16,
            use_fast_accum=fast,
            out=out,  # pyright: ignore[reportCallIssue, reportArgumentType]
        )
        product = product[:, : self.shape.num_rows].to(self.dtype)
        if bias is None or within:
            return product
        return product + bias if out is None else product.add_(bias)

    def rows_of(self, packed: Stored, part: slice) -> dict[str, Tensor]:
        """What `apply` of a kernel for some of the rows reads, multiples of 16: views."""
        return {"weight": packed["weight"][part], "row_scale": packed["row_scale"][:, part]}


class TorchFP8WeightOnly(TorchFP8Kernel):
    """The same packed weights, decoded for every product with activations as they are: exact codes, row scales after.

    No kernel to serve with: it moves more memory than BF16 weights. It is for single steps of a quantized engine.
    """

    @staticmethod
    def unsupported(scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability) -> str | None:
        return None if isinstance(scheme, FP8) and scheme.activation == "none" else "leaves activations as they are"

    @staticmethod
    def batch_dependent(capability: Capability) -> str | None:
        return batch_dependent(capability)

    def apply(self, x: Tensor, packed: Stored, bias: Tensor | None = None) -> Tensor:
        products = pad_to(x.to(self.dtype), cols=TILE) @ packed["weight"].to(self.dtype).t()
        out = (products.float() * packed["row_scale"])[:, : self.shape.num_rows]
        return (out if bias is None else out + bias).to(self.dtype)
