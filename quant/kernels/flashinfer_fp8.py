"""`flashinfer_fp8`: FP8 x FP8 through FlashInfer's `bmm_fp8`, one scale for all activations and one for the weight."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..device import Capability
from ..flashinfer_api.library import import_flashinfer
from ..layout import pad_to
from ..scheme import FP8, Scheme, Stored, TensorSpec, WeightShape
from .activation import fp8_codes

TILE = 16  # cuBLAS takes multiples of 16 in N and K


class FlashInferFP8:
    """Codes as stored, zero-padded to [ceil(N, 16), ceil(K, 16)]; cuBLAS multiplies, BF16 out."""

    name: ClassVar[str] = "flashinfer_fp8"

    def __init__(self, scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability) -> None:
        assert isinstance(scheme, FP8)
        assert shape.cols is not None
        self.scheme, self.shape, self.dtype = scheme, shape, dtype
        self.padded = (-(-shape.num_rows // TILE) * TILE, -(-shape.cols // TILE) * TILE)

    @staticmethod
    def unsupported(scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability) -> str | None:
        if not isinstance(scheme, FP8) or scheme.per_channel:
            return "computes FP8 with one scale a weight"
        if scheme.activation not in ("static", "per_tensor"):
            return f"quantizes activations with one scale for all tokens, not {scheme.activation!r}"
        if len(shape.rows) > 1:
            return "takes one scale a weight, and fused shards have one each"
        if capability.sm is None or capability.sm < 89:
            return f"FP8 tensor cores start at sm89, this is {capability}"
        if capability.flashinfer is None:
            return capability.no_flashinfer
        if dtype != torch.bfloat16:
            return f"gives BF16 results, not {dtype}"
        return None

    @staticmethod
    def batch_dependent(capability: Capability) -> str | None:
        return "FlashInfer chooses a tactic by the number of tokens"

    def packed(self) -> dict[str, TensorSpec]:
        one = TensorSpec(self.shape.dims(1), torch.float32)
        specs = {"weight": TensorSpec(self.shape.dims(*self.padded), torch.float8_e4m3fn), "weight_scale": one}
        return specs | ({"input_scale": one} if self.scheme.activation == "static" else {})

    def prepare(self, matrices: Stored) -> dict[str, Tensor]:
        return {"weight": pad_to(matrices["weight"], rows=TILE, cols=TILE).clone()}

    def derive(self, scales: Stored) -> dict[str, Tensor]:
        return {name: scales[name].clone() for name in self.scheme.scales(self.shape)}

    def apply(self, x: Tensor, packed: Stored, bias: Tensor | None = None) -> Tensor:
        if not len(x):
            return x.new_empty(0, self.shape.num_rows, dtype=self.dtype)
        x = pad_to(x, cols=TILE)
        codes, scale = fp8_codes(x, self.scheme.activation, packed.get("input_scale"))
        weight = packed["weight"].t()[None]  # [1, K, N], column-major
        multiply = import_flashinfer().bmm_fp8
        out = multiply(codes[None], weight, scale.view(1), packed["weight_scale"], torch.bfloat16, backend="cublas")
        out = out[0, :, : self.shape.num_rows]
        return out if bias is None else out + bias
