"""NVFP4 weights in the order in which the Triton kernels read them; drawn in `quant/gpu/nvfp4_widen.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..scheme import GROUP_SIZE, NVFP4, Stored, TensorSpec, WeightShape, has_kernels

DEPTH = 128  # weights of a step along K; what is missing to a whole one is zero


def num_steps(cols: int) -> int:
    return -(-cols // DEPTH)


class NVFP4Packer:
    """Linears and stacks of experts.

    weight u8 [steps, N, 64]: a row's 128 codes of a step. Place 16 c + 4 q + i of a half is k = 16 q + 4 c + i.
    block_scale u8 [steps, 2, N, 4]: half by half, as UE5M3: bias 12, so that E4M3's subnormals are normal.
    """

    def __init__(self, scheme: NVFP4, shape: WeightShape) -> None:
        assert shape.cols is not None
        self.scheme, self.shape, self.cols = scheme, shape, shape.cols

    def packed(self) -> dict[str, TensorSpec]:
        rows, steps = self.shape.num_rows, num_steps(self.cols)
        specs = {
            "weight": TensorSpec(self.shape.dims(steps, rows, DEPTH // 2), torch.uint8),
            "block_scale": TensorSpec(self.shape.dims(steps, 2, rows, DEPTH // 2 // GROUP_SIZE), torch.uint8),
            "row_scale": TensorSpec(self.shape.dims(rows), torch.float32),
        }
        if self.scheme.activation == "static":
            specs["input_scale"] = TensorSpec(self.shape.dims(len(self.shape.rows)), torch.float32)
        return specs

    def prepare(self, matrices: Stored) -> dict[str, Tensor]:
        codes, scales = matrices["weight"], matrices["weight_scale"]
        if has_kernels(codes):
            from ..gpu.nvfp4_pack import pack_nvfp4

            return dict(zip(("weight", "block_scale"), pack_nvfp4(codes, scales), strict=True))
        # a scale of zero is E4M3's, not UE5M3's: its codes become zero instead
        codes = torch.where(scales.float().repeat_interleave(GROUP_SIZE // 2, dim=-1) == 0, 0, codes)
        return {"weight": pack_codes(codes), "block_scale": pack_scales(scales)}

    def derive(self, scales: Stored) -> dict[str, Tensor]:
        packed = {"row_scale": self.scheme.row_scale(scales, self.shape).clone()}
        if self.scheme.activation == "static":
            packed["input_scale"] = scales["input_scale"].clone()
        return packed


def pack_codes(codes: Tensor) -> Tensor:
    """Stored codes uint8 [..., N, K / 2] -> uint8 [..., steps, N, 64]."""
    lead, cols = codes.shape[:-1], codes.shape[-1] * 2
    codes = F.pad(codes, (0, (num_steps(cols) * DEPTH - cols) // 2))
    natural = torch.stack([codes & 15, codes >> 4], -1).view(*lead, num_steps(cols), 2, 4, 4, 2, 2)
    # [..., step, half, q, c, pair, half of a word] -> [half, pair of codes][..., step, c, q, half of a word]
    first, second = natural.transpose(-4, -3).unbind(-5)
    (a, b), (c, d) = (half.unbind(-2) for half in (first, second))
    a, b, c, d = (_numbers(pair) for pair in (a, b, c, d))
    end, d = d & 0x00400040, d & 0x81808180
    words = a | _rotated_left(b, 4) | (c >> 6) | _rotated_left(d, 6) | (end >> 2)
    words = torch.stack([words >> shift & 255 for shift in (0, 8, 16, 24)], -1).to(torch.uint8)
    return words.view(*lead, num_steps(cols), DEPTH // 2).transpose(-3, -2).contiguous()


def _numbers(pair: Tensor) -> Tensor:
    """E2M1 codes uint8 [..., 2] -> int64 words: signs at 15 and 31, magnitudes at 8 to 6 and 24 to 22."""
    first, second = ((code >> 3 << 15) | ((code & 7) << 6) for code in pair.long().unbind(-1))
    return first | (second << 16)


def _rotated_left(word: Tensor, bits: int) -> Tensor:
    """Of 32 bits in an int64."""
    return (word << bits) & 0xFFFFFFFF | (word >> (32 - bits))


def pack_scales(scales: Tensor) -> Tensor:
    """Stored block scales E4M3 [..., N, K / 16] -> uint8 [..., steps, 2, N, 4]."""
    lead, rows, groups = scales.shape[:-2], scales.shape[-2], DEPTH // 2 // GROUP_SIZE
    steps = num_steps(scales.shape[-1] * GROUP_SIZE)
    whole = F.pad(ue5m3(scales), (0, steps * 2 * groups - scales.shape[-1]))
    return whole.view(*lead, rows, steps, 2, groups).movedim(-4, -2).contiguous()


def ue5m3(scales: Tensor) -> Tensor:
    """E4M3 >= 0 -> uint8: 5 bits of exponent over a bias of 12, 3 of mantissa; exact, zero becomes the smallest."""
    mantissa, exponent = torch.frexp(scales.float().clamp(min=2.0**-9))  # mantissa in [0.5, 1)
    return ((exponent + 11 << 3) | ((mantissa * 16).to(torch.int32) & 7)).to(torch.uint8)
