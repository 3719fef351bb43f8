"""Quantization as FlashInfer's CUDA kernels do it, in float32, operation by operation.

NVFP4: the exact recipe of `cvt_warp_fp16_to_fp4` and `nvfp4QuantAndPerTokenScaleKernel` (quantization_utils.cuh,
quantization.cuh), which 0.7.2 runs under FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH=1. 0.6.11 runs it per token; its
per-tensor kernel has fast math only (`rcp.approx`), which no CPU reproduces: there the model differs in rare ties.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decoding import E2M1, GROUP, decode_e4m3

FLOAT_MAX = torch.finfo(torch.float32).max
SIXTH = torch.tensor(1.0) / 6.0  # float32(1 / 6), a constexpr there
E4M3_MAX = 448.0
MIDPOINTS = (E2M1[:7] + E2M1[1:8]) / 2


def encode_e2m1(x: Tensor) -> Tensor:
    """float32 -> 4-bit codes (uint8), nearest, ties to the even code, beyond 6 saturated; bit 3 is the sign bit."""
    magnitude = x.abs().contiguous()
    below = torch.bucketize(magnitude, MIDPOINTS, right=False)  # midpoints < x
    upto = torch.bucketize(magnitude, MIDPOINTS, right=True)  # midpoints <= x
    code = torch.where((upto != below) & (below % 2 == 1), upto, below)
    return (code | (torch.signbit(x).long() << 3)).to(torch.uint8)


def encode_e4m3(x: Tensor) -> Tensor:
    """float32 -> E4M3 bytes, nearest even, saturated."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)


def pack_nibbles(codes: Tensor) -> Tensor:
    """[M, K] codes -> [M, K / 2] bytes, even k in the low nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def quantize_nvfp4(x: Tensor, encode_scale: Tensor) -> tuple[Tensor, Tensor]:
    """[M, K] -> (codes [M, K / 2] uint8, scale bytes [M, K / 16]); `encode_scale` float32 [1] or [M, 1].

    sf = e4m3(amax * (G * 1/6)); codes = e2m1(x * min(1 / (sf * (1 / G)), FLT_MAX)); an all-zero block has sf = 0.
    """
    blocks = x.float().unflatten(1, (-1, GROUP))  # [M, K / 16, 16]
    encode_scale = encode_scale.float()
    amax = blocks.abs().amax(dim=-1)
    zero = amax == 0
    scale = encode_e4m3(torch.where(zero, 0.0, amax * (encode_scale * SIXTH)))
    inverse = (1.0 / (decode_e4m3(scale) * (1.0 / encode_scale))).clamp(max=FLOAT_MAX)
    inverse = torch.where(zero, 0.0, inverse)
    codes = encode_e2m1((blocks * inverse[..., None]).flatten(1))
    return pack_nibbles(codes), scale


def row_encode_scale(x: Tensor, scale_inv: float) -> Tensor:
    """[M, K] -> float32 [M, 1]: (1 / scale_inv) / amax of the row, FLT_MAX for a row of zeros."""
    amax = x.float().abs().amax(dim=1, keepdim=True)
    constant = torch.tensor(1.0) / torch.tensor(scale_inv, dtype=torch.float32)
    scale = torch.where(amax == 0, FLOAT_MAX, (constant / amax).clamp(max=FLOAT_MAX))
    return torch.where(scale == 0, 1.0, scale)


def quantize_nvfp4_per_token(x: Tensor, scale_inv: float) -> tuple[Tensor, Tensor, Tensor]:
    """[M, K] -> (codes, scale bytes, per-token decode scales float32 [M])."""
    encode_scale = row_encode_scale(x, scale_inv)
    codes, scale = quantize_nvfp4(x, encode_scale)
    return codes, scale, (1.0 / encode_scale).flatten()


def quantize_fp8_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """BF16 [M, K] -> (E4M3 values as float32, decode scales float32 [M, 1]).

    `perTokenQuantization`: the row's amax is at least bfloat16(1e-6), the scale at least 1 / (448 * 512), and
    x is multiplied by min(448 / amax, 448 * 512).
    """
    least = torch.tensor(1e-6).bfloat16().float()
    amax = torch.maximum(x.float().abs().amax(dim=1, keepdim=True), least)
    scale = (amax / E4M3_MAX).clamp(min=1.0 / (E4M3_MAX * 512.0))
    multiplier = (E4M3_MAX / amax).clamp(max=E4M3_MAX * 512.0)
    return decode_e4m3(encode_e4m3(x.float() * multiplier)), scale
