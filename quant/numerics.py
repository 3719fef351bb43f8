"""Quantize and dequantize in plain torch: the reference that every kernel is held against.

Sources of the formulas: ModelOpt 0.47 for weights (`nvfp4_tensor.py`, `fp8_tensor.py`), FlashInfer's exact recipe
(`quantization.cuh`, FLASHINFER_DISABLE_FP4_QUANT_FAST_MATH=1) for NVFP4 activations. All arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from .errors import UnsupportedError

E4M3_MAX = 448.0
E2M1_MAX = 6.0
NVFP4_MAX = E4M3_MAX * E2M1_MAX
E4M3_MIN = 2.0**-9  # smallest subnormal
FLOAT_MAX = torch.finfo(torch.float32).max
SIXTH = torch.tensor(1 / 6, dtype=torch.float32).item()
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

CHUNK = 1 << 17  # elements: temporaries stay in a core's cache between the passes of a CPU quantizer
GPU_CHUNK = 1 << 26  # elements: float32 temporaries of a whole stack of experts stay at 256 MiB


def group_amax(weight: Tensor, group: int) -> Tensor:
    """max |w| over groups of `group` along the last dimension: BF16 [..., K] -> BF16 [..., K // group]."""
    if weight.dtype != torch.bfloat16:
        raise UnsupportedError(f"quantizing {weight.dtype}", ["weights are rounded to BF16 first: weight.bfloat16()"])
    cols = weight.shape[-1]
    out = weight.new_empty(*weight.shape[:-1], cols // group)
    flat, flat_out = weight.reshape(-1, cols), out.view(-1, cols // group).view(torch.int16)
    for part in row_chunks(flat.shape[0], cols, weight.device):
        # Without its sign bit a BF16 number orders as its bits do, and integers reduce several times faster.
        magnitude = flat[part].view(torch.int16) & 0x7FFF
        flat_out[part] = magnitude.unflatten(-1, (-1, group)).amax(-1)
    return out


def _scalar(value: float, device: torch.device) -> Tensor:
    """A float32 scalar as a tensor: torch divides by and into Python numbers through reciprocals, which round twice."""
    return torch.full((), value, device=device)


def decode_scale(amax: Tensor, code_max: float) -> Tensor:
    """amax / code_max; 1 for a weight of zeros, whose codes are zero under any scale."""
    scale = amax / _scalar(code_max, amax.device)
    return torch.where(scale > 0, scale, 1.0)  # a float32 amax may underflow, too


def row_chunks(rows: int, cols: int, device: torch.device) -> Iterator[slice]:
    """Slices over rows: small on a CPU (temporaries stay in cache), large on a GPU (few launches)."""
    step = max(1, (CHUNK if device.type == "cpu" else GPU_CHUNK) // max(1, cols))
    for start in range(0, rows, max(1, step)):
        yield slice(start, min(start + step, rows))


@cache
def _e4m3_table(dtype: torch.dtype, device: torch.device) -> Tensor:
    bytes_ = torch.arange(256, dtype=torch.uint8, device=device)
    return bytes_.view(torch.float8_e4m3fn).to(dtype)


def decode_fp8(codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """E4M3 codes -> values, exact in bfloat16, float16 and float32."""
    if codes.device.type != "cpu":
        return codes.to(dtype)
    out = torch.empty(codes.shape, dtype=dtype)
    flat, flat_out, table = (
        codes.reshape(-1).view(torch.uint8),
        out.view(-1),
        _e4m3_table(dtype, codes.device),
    )
    for part in row_chunks(flat.numel(), 1, codes.device):  # torch's own cast is an order slower on a CPU
        torch.index_select(table, 0, flat[part].int(), out=flat_out[part])
    return out


def quantize_fp8(weight: Tensor, row_scale: Tensor, *, bf16_quotient: bool = False) -> Tensor:
    """[..., N, K] / row_scale [..., N] -> E4M3 codes.

    `bf16_quotient` rounds the quotient to BF16 first, as ModelOpt does for per-tensor scales
    (`e4m3(bf16(w / scale))`).
    """
    out = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    cols = weight.shape[-1]
    flat, flat_out, scale = weight.reshape(-1, cols), out.view(-1, cols), row_scale.reshape(-1, 1)
    for part in row_chunks(flat.shape[0], cols, weight.device):
        quotient = flat[part].float().div_(scale[part]).clamp_(-E4M3_MAX, E4M3_MAX)
        if bf16_quotient:
            quotient = quotient.bfloat16()
        flat_out[part] = quotient.to(torch.float8_e4m3fn)
    return out


def quantize_fp8_activation(x: Tensor, scale: Tensor) -> Tensor:
    """x [M, K] / scale ([M, 1] or scalar, float32) -> E4M3 codes, fp32 quotient, saturating."""
    return (x.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def round_e2m1(x: Tensor) -> Tensor:
    """Round float32 to the nearest E2M1 value in place, ties to the even code, saturating at 6."""
    x.clamp_(-E2M1_MAX, E2M1_MAX)
    # The grid's step is 2**(exponent - 1), at least 0.5. Adding 1.5 * 2**23 steps makes fp32 addition round to it.
    magic = (x.view(torch.int32) & 0x7F800000).clamp_(min=127 << 23).add_((22 << 23) | 0x400000)
    magic = magic.view(torch.float32)
    return x.add_(magic).sub_(magic)


def e2m1_codes(x: Tensor) -> Tensor:
    """Round float32 to the nearest E2M1 code (bit 3 = sign), as int32; ties and range as `round_e2m1`."""
    magnitude = x.abs().clamp_(max=E2M1_MAX)
    exponent = (magnitude.view(torch.int32) & 0x7F800000).clamp_(min=127 << 23)
    magic = exponent + (22 << 23)  # 2**23 grid steps: after the sum, the low mantissa bits count steps
    steps = magnitude.add_(magic.view(torch.float32)).view(torch.int32).sub_(magic)
    code = steps.add_(exponent.bitwise_right_shift_(22)).sub_(254)  # two codes for every octave from 2 on
    return code.bitwise_or_((x.view(torch.int32) >> 28).bitwise_and_(8))


def pack_nibbles(codes: Tensor) -> Tensor:
    """int32 4-bit codes [..., K] -> uint8 [..., K // 2], low nibble = even k."""
    pairs = codes.contiguous().view(torch.int64)  # low word = even k
    return (pairs >> 28).bitwise_or_(pairs).bitwise_and_(0xFF).to(torch.uint8)


def quantize_nvfp4_weight(weight: Tensor, block_amax: Tensor, row_scale_2: Tensor) -> tuple[Tensor, Tensor]:
    """ModelOpt's weight recipe: BF16 [..., N, K], its block amax, global decode scale [..., N] -> codes, scales.

    block scale = e4m3(clamp(block_amax / (6 * scale_2), 2**-9, 448)), 1.0 for a block of zeros;
    code = e2m1(w / (block scale * scale_2)). Returns uint8 [..., N, K // 2] and E4M3 [..., N, K // 16].
    """
    cols = weight.shape[-1]
    lead = weight.shape[:-1]
    scale_2 = row_scale_2.reshape(-1, 1)
    block_scale = block_amax.reshape(-1, cols // 16).float().div_(E2M1_MAX * scale_2)
    block_scale.masked_fill_(block_scale == 0, 1.0).clamp_(E4M3_MIN, E4M3_MAX)
    scales = block_scale.to(torch.float8_e4m3fn)
    block_scale = decode_fp8(scales).mul_(scale_2)
    codes = torch.empty(*lead, cols // 2, dtype=torch.uint8, device=weight.device)
    flat, flat_codes = weight.reshape(-1, cols), codes.view(-1, cols // 2)
    for part in row_chunks(flat.shape[0], cols, weight.device):
        quotient = flat[part].float().unflatten(-1, (-1, 16)).div_(block_scale[part, :, None])
        quotient.add_(0.0)  # ModelOpt gives -0 the code of +0
        flat_codes[part] = pack_nibbles(e2m1_codes(quotient).flatten(-2))
    return codes, scales.view(*lead, cols // 16)


@cache
def _nibble_pair_table(device: torch.device) -> Tensor:
    """int64 [256]: the float32 values of a byte's low and high nibble, side by side."""
    magnitudes = torch.tensor(E2M1_VALUES, device=device)
    values = torch.cat([magnitudes, -magnitudes])
    bytes_ = torch.arange(256, device=device)
    return torch.stack([values[bytes_ & 15], values[bytes_ >> 4]], dim=-1).view(torch.int64).flatten()


def decode_e2m1(codes: Tensor) -> Tensor:
    """uint8 [..., K // 2] -> float32 values [..., K]."""
    pairs = _nibble_pair_table(codes.device).index_select(0, codes.reshape(-1).int())
    return pairs.view(torch.float32).view(*codes.shape[:-1], codes.shape[-1] * 2)


def nvfp4_products(codes: Tensor, block_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """code x block scale [..., K]: exact in bfloat16, float16 and float32 (2 + 4 significant bits)."""
    cols = codes.shape[-1] * 2
    out = torch.empty(*codes.shape[:-1], cols, dtype=dtype, device=codes.device)
    flat, flat_out = codes.reshape(-1, cols // 2), out.view(-1, cols)
    scales = decode_fp8(block_scale.reshape(-1, cols // 16))
    for part in row_chunks(flat.shape[0], cols, codes.device):
        blocks = decode_e2m1(flat[part]).unflatten(-1, (-1, 16))
        flat_out[part] = blocks.mul_(scales[part, :, None]).flatten(-2)
    return out


def quantize_nvfp4_activation(x: Tensor, encode: Tensor) -> tuple[Tensor, Tensor]:
    """FlashInfer's exact NVFP4 recipe with the encode scale `encode` (float32 scalar or [M, 1]).

    sf = e4m3(block_amax * (encode * fp32(1/6))); code = e2m1(x * min(1 / (sf * (1 / encode)), FLT_MAX)).
    Returns E2M1 values float32 [M, K // 16, 16] and block scales float32 [M, K // 16].
    """
    blocks = x.to(torch.float32, copy=True).unflatten(-1, (-1, 16))
    block_amax = blocks.abs().amax(-1)
    scale = (block_amax * (encode * SIXTH)).clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn)
    scale = decode_fp8(scale)
    factor = (scale * encode.reciprocal()).reciprocal_().clamp_(max=FLOAT_MAX)
    factor.masked_fill_(block_amax == 0, 0.0)
    return round_e2m1(blocks.mul_(factor[..., None])), scale


def nvfp4_encode(amax: Tensor) -> Tensor:
    """Encode scale from an amax (of each row: per token): min(2688 / amax, FLT_MAX), FLT_MAX for zero."""
    return (_scalar(NVFP4_MAX, amax.device) / amax).clamp_(max=FLOAT_MAX)
