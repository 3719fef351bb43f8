"""Stacks of experts as TensorRT-LLM's grouped kernels read them.

w13 takes gate over up (stored) to up and gate in turns, then both stacks shuffle the rows of every block of 32:

    stored    g0 g1 ... | u0 u1 ...
    in turns  u0 g0 u1 g1 u2 g2 ...
    shuffled  rows 0 4 8 ... 28, 1 5 9 ... of every 32 of those

Sizes are zero-padded: intermediate_size and hidden_size to multiples of 128, gate and up each for itself.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ...quant import FP8, NVFP4, Scheme, TensorSpec, WeightShape, layout
from ...quant.flashinfer_api.tactics import TacticGuard
from ...quant.scheme import GROUP_SIZE, Stored

SIZE_MULTIPLE = 128
EPILOGUE_TILE = 128


def padded_size(size: int) -> int:
    return -(-size // SIZE_MULTIPLE) * SIZE_MULTIPLE


class TrtllmExperts:
    """One stack in NVFP4 or FP8: what codes, block scales and scales a row have in common is their rows.

    Scalars, one an expert, float32: w13 "gate_scale" and "up_scale", w2 "out_scale": weight_scale_2 (or FP8's
    weight_scale), times the input_scale where that is static; it lies beside them, [1], as quantizers take it: NVFP4
    "encode" = 1 / input_scale, FP8 "input_scale". FP8 per token has "row_scale" [num_experts, rows] in the order of the
    rows, and scalars of one. A kernel quantizes a token once for all its experts: with the largest input_scale.
    """

    name: ClassVar[str] = "trtllm_experts"

    def __init__(self, scheme: Scheme, shape: WeightShape, guard: TacticGuard) -> None:
        assert isinstance(scheme, NVFP4 | FP8)
        assert shape.cols is not None
        self.scheme, self.shape, self.guard = scheme, shape, guard
        self.gated = len(shape.rows) == 2
        self.rows = sum(padded_size(count) for count in shape.rows)
        self.cols = padded_size(shape.cols)
        self.per_row = isinstance(scheme, FP8) and scheme.activation == "per_token"
        self.scalars = ("gate_scale", "up_scale") if self.gated else ("out_scale",)
        self.order = layout.shuffle_rows_index(self.rows, EPILOGUE_TILE)
        if self.gated:
            self.order = layout.gated_reorder_index(self.rows)[self.order]

    def packed(self) -> dict[str, TensorSpec]:
        dims = self.shape.dims
        if isinstance(self.scheme, NVFP4):
            specs = {
                "weight": TensorSpec(dims(self.rows, self.cols // 2), torch.uint8),
                "block_scale": TensorSpec(dims(self.rows, self.cols // GROUP_SIZE), torch.float8_e4m3fn),
            }
        else:
            specs = {"weight": TensorSpec(dims(self.rows, self.cols), torch.float8_e4m3fn)}
        specs |= {name: TensorSpec(dims(), torch.float32) for name in self.scalars}
        if self.per_row:
            specs["row_scale"] = TensorSpec(dims(self.rows), torch.float32)
        if self.scheme.activation == "static":
            specs["encode" if isinstance(self.scheme, NVFP4) else "input_scale"] = TensorSpec((1,), torch.float32)
        return specs

    def prepare(self, matrices: Stored) -> dict[str, Tensor]:
        if not isinstance(self.scheme, NVFP4):
            return {"weight": self._order_rows(matrices["weight"], self.cols)}
        scales = self._order_rows(matrices["weight_scale"], self.cols // GROUP_SIZE)
        return {
            "weight": self._order_rows(matrices["weight"], self.cols // 2),
            "block_scale": layout.swizzle_scales(scales),
        }

    def _order_rows(self, x: Tensor, cols: int) -> Tensor:
        """[..., gate and up or one shard, width] -> [..., padded rows in the kernel's order, cols]."""
        shards = [layout.pad_to(shard, rows=SIZE_MULTIPLE, cols=cols) for shard in x.split(self.shape.rows, dim=-2)]
        raw = torch.cat([shard.view(torch.uint8) if x.element_size() == 1 else shard for shard in reversed(shards)], -2)
        return layout.gather_rows(raw, self.order).view(x.dtype)

    def derive(self, scales: Stored) -> dict[str, Tensor]:
        if self.per_row:
            assert isinstance(self.scheme, FP8)
            row_scale = self.scheme.row_scale(scales, self.shape)[..., None]
            ones = scales["weight_scale"].new_ones(self.shape.num_units)
            rows = self._order_rows(row_scale, 1).squeeze(-1)
            return {"row_scale": rows} | {name: ones.clone() for name in self.scalars}
        weight_scale = scales["weight_scale_2" if isinstance(self.scheme, NVFP4) else "weight_scale"]
        if self.scheme.activation != "static":
            return {name: weight_scale[:, i].clone() for i, name in enumerate(self.scalars)}
        input_scale = scales["input_scale"].amax().view(1)
        packed = {name: weight_scale[:, i] * input_scale for i, name in enumerate(self.scalars)}
        given = {"encode": input_scale.reciprocal()} if isinstance(self.scheme, NVFP4) else {"input_scale": input_scale}
        return packed | given
