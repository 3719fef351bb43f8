"""`triton_nvfp4`: NVFP4 weights multiplied packed, with BF16 activations (W4A16) or quantized ones (W4A4's exact twin).

The twin multiplies exact products of codes and block scales, in BF16 with float32 sums: the numbers of NVFP4 arithmetic
up to the order of summation.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..device import Capability
from ..scheme import GROUP_SIZE, NVFP4, Scheme, Stored, TensorSpec, WeightShape
from .activation import quantize_activation
from .nvfp4_packing import NVFP4Packer


class TritonNVFP4Kernel:
    """Tiles measured on Hopper; any N, K a multiple of 16; a row's result does not depend on other rows.

    Up to 256 rows (512 of large weights) all sums have one order, above it another; there a BF16 copy of the weight
    lives during the call.

    Static activations are quantized for each shard with its own scale, in case they are unequal: a look at them would
    make the CPU wait for the GPU.
    """

    name: ClassVar[str] = "triton_nvfp4"
    invariant: ClassVar[bool] = False

    def __init__(self, scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability) -> None:
        assert isinstance(scheme, NVFP4)
        self.scheme, self.shape = scheme, shape
        self.packer = NVFP4Packer(scheme, shape)

    @staticmethod
    def unsupported(scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability) -> str | None:
        if not isinstance(scheme, NVFP4):
            return "computes NVFP4 only"
        if scheme.activation == "per_tensor":
            return "quantizes activations per token or with static scales, not per tensor"
        if capability.sm != 90:
            return f"its tiles are for sm90, this is {capability}"
        if "triton" not in capability.libraries:
            return "triton is not installed"
        if dtype != torch.bfloat16:
            return f"computes in bfloat16, not {dtype}"
        if shape.cols is None or shape.cols % GROUP_SIZE:
            return f"K is a multiple of {GROUP_SIZE}"
        return None

    @staticmethod
    def batch_dependent(capability: Capability) -> str | None:
        return "it sums many tokens in another order than few; triton_nvfp4_invariant does not"

    def packed(self) -> dict[str, TensorSpec]:
        return self.packer.packed()

    def prepare(self, matrices: Stored) -> dict[str, Tensor]:
        return self.packer.prepare(matrices)

    def derive(self, scales: Stored) -> dict[str, Tensor]:
        return self.packer.derive(scales)

    def apply(self, x: Tensor, packed: Stored, bias: Tensor | None = None) -> Tensor:
        from ..gpu.nvfp4_gemm import nvfp4_matmul

        x = x.contiguous()
        out = torch.empty(len(x), self.shape.num_rows, dtype=torch.bfloat16, device=x.device)
        if not len(x):
            return out
        if self.scheme.activation == "static":
            for shard in range(len(self.shape.rows)):
                values, scale = self._quantize(x, packed["input_scale"][shard])
                nvfp4_matmul(values, packed, out, self.shape.shard_slice(shard), scale, bias, invariant=self.invariant)
            return out
        values, scale = self._quantize(x)
        nvfp4_matmul(values, packed, out, slice(0, self.shape.num_rows), scale, bias, invariant=self.invariant)
        return out

    def _quantize(self, x: Tensor, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """BF16 values that products see, and their scale: float32, one a token, one for all, or none."""
        if x.dtype == torch.bfloat16 and self.scheme.activation != "none":
            from ..gpu.quantize import nvfp4_products

            return nvfp4_products(x, input_scale)
        values, scale = quantize_activation(x, self.scheme, input_scale, torch.bfloat16)
        return values, scale if scale is None else scale.squeeze(-1) if scale.ndim else scale


class TritonNVFP4InvariantKernel(TritonNVFP4Kernel):
    """The same packed weights, summed in one order for any number of rows: slower for many."""

    name: ClassVar[str] = "triton_nvfp4_invariant"
    invariant: ClassVar[bool] = True

    @staticmethod
    def batch_dependent(capability: Capability) -> str | None:
        return None
