"""Online activation quantization as the CPU kernels need it: exact values and a float32 decode scale."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import numerics
from ..scheme import NVFP4, Activation, Scheme, has_kernels


def quantize_activation(
    x: Tensor, scheme: Scheme, input_scale: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """x [M, K] -> values [M, K] in `dtype` and the decode scale (float32 [M, 1] or scalar): x ~ values * scale.

    The values (FP8: codes; NVFP4: code x block scale) are exact in BF16. `input_scale` is the static decode scale.
    """
    if scheme.activation == "none":
        return x.to(dtype), None
    if isinstance(scheme, NVFP4):
        encode = _nvfp4_encode(x, scheme.activation, input_scale)
        values, block_scale = numerics.quantize_nvfp4_activation(x, encode)
        return values.mul_(block_scale[..., None]).flatten(-2).to(dtype), encode.reciprocal()
    scale = fp8_scale(x, scheme.activation, input_scale)
    codes = numerics.quantize_fp8_activation(x, scale)
    return numerics.decode_fp8(codes, dtype), scale


def _nvfp4_encode(x: Tensor, activation: Activation, input_scale: Tensor | None) -> Tensor:
    if activation == "static":
        assert input_scale is not None
        return input_scale.reciprocal()
    return numerics.nvfp4_encode(activation_amax(x, activation))


def fp8_codes(x: Tensor, activation: Activation, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """E4M3 codes of x [M, K] and the decode scale, one a row (float32 [M] or [M, 1]) or one for all."""
    if has_kernels(x) and x.dtype == torch.bfloat16 and activation != "per_tensor":
        from ..gpu.quantize import quantize_fp8

        return quantize_fp8(x.contiguous(), input_scale)
    scale = fp8_scale(x, activation, input_scale)
    return numerics.quantize_fp8_activation(x, scale), scale


def fp8_scale(x: Tensor, activation: Activation, input_scale: Tensor | None) -> Tensor:
    """Decode scale of x [M, K]: amax / 448 of each row ([M, 1]) or of all, or the static one."""
    if activation == "static":
        assert input_scale is not None
        return input_scale
    return numerics.decode_scale(activation_amax(x, activation), numerics.E4M3_MAX)


def activation_amax(x: Tensor, activation: Activation) -> Tensor:
    """max |x| of each row (float32 [M, 1]) or of all of x [M, K] (float32 scalar; zero without rows)."""
    magnitude = x.abs()
    if activation == "per_token":
        return magnitude.amax(-1, keepdim=True).float()
    return magnitude.amax().float() if len(x) else x.new_zeros((), dtype=torch.float32)
