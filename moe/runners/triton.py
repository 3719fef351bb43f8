"""`triton`: all experts in two launches, FP8, NVFP4 W4A16 or the twin of NVFP4 W4A4, on Hopper."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ...quant import FP8, NVFP4, Capability, FP8Rows, Scheme, TensorSpec, UnsupportedError, WeightShape
from ...quant.kernels.nvfp4_packing import ue5m3
from ...quant.scheme import Stored, has_kernels
from ..config import MoeConfig
from .reference import expert_shapes

DEPTH = 128  # along K: of one step of an NVFP4 product, whose weights are packed for it


class Tile(NamedTuple):
    """Rows of a weight and tokens of a program, its depth along K, warps, and steps that are loaded ahead."""

    rows: int
    tokens: int
    depth: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        """For a launch."""
        sizes = {"ROWS": self.rows, "TOKENS": self.tokens, "DEPTH": self.depth, "STAGES": self.stages}
        return sizes | {"num_warps": self.warps}


# Average pairs an expert, at the most -> tile. Measured on an H100 at Qwen3-30B-A3B's
# shape: benchmarks/NOTES.md.
Tiles = tuple[tuple[float, Tile], ...]
FP8_TILES: dict[str, Tiles] = {
    "w13": (
        (12, Tile(64, 16, 256, 4, 3)),
        (24, Tile(128, 32, 256, 4, 3)),
        (96, Tile(128, 32, 128, 8, 3)),
        (float("inf"), Tile(128, 128, 128, 8, 4)),
    ),
    "w2": (
        (12, Tile(128, 16, 256, 8, 2)),
        (24, Tile(128, 32, 256, 8, 2)),
        (96, Tile(128, 32, 128, 4, 3)),
        (float("inf"), Tile(128, 128, 128, 4, 3)),
    ),
}
NVFP4_TILES: dict[str, Tiles] = {
    "w13": (
        (12, Tile(64, 16, DEPTH, 2, 3)),
        (24, Tile(128, 32, DEPTH, 4, 2)),
        (96, Tile(64, 64, DEPTH, 4, 3)),
        (float("inf"), Tile(64, 128, DEPTH, 4, 3)),
    ),
    "w2": (
        (12, Tile(128, 16, DEPTH, 4, 3)),
        (24, Tile(128, 32, DEPTH, 4, 3)),
        (96, Tile(128, 64, DEPTH, 4, 3)),
        (float("inf"), Tile(128, 128, DEPTH, 4, 3)),
    ),
}


class GroupedFP8:
    """Packed as stored: codes [experts, N, K], a scale a row."""

    name: ClassVar[str] = "triton_fp8"

    def __init__(self, scheme: Scheme, shape: WeightShape) -> None:
        assert isinstance(scheme, FP8)
        self.scheme, self.shape = scheme, shape

    def packed(self) -> dict[str, TensorSpec]:
        weight = TensorSpec(self.shape.matrix, torch.float8_e4m3fn)
        row_scale = TensorSpec(self.shape.dims(self.shape.num_rows), torch.float32)
        return {"weight": weight, "row_scale": row_scale} | input_scale_spec(self.scheme, self.shape)

    def prepare(self, matrices: Stored) -> dict[str, Tensor]:
        return {"weight": matrices["weight"]}

    def derive(self, scales: Stored) -> dict[str, Tensor]:
        return {"row_scale": self.scheme.row_scale(scales, self.shape).clone()} | input_scale(self.scheme, scales)


class GroupedNVFP4:
    """Codes and scales in the order in which a program reads them.

    A byte holds the codes of k and k + 64 of a step of 128: sign0 sign1 mag1[3] mag0[3]. Block scales lie step by step,
    half by half, row by row, 4 a row, as UE5M3: bias 12, so that E4M3's subnormals are normal.
    """

    name: ClassVar[str] = "triton_nvfp4"

    def __init__(self, scheme: Scheme, shape: WeightShape) -> None:
        assert isinstance(scheme, NVFP4)
        assert shape.cols is not None
        self.scheme, self.shape, self.cols = scheme, shape, shape.cols

    def packed(self) -> dict[str, TensorSpec]:
        rows, steps = self.shape.num_rows, self.cols // DEPTH
        return {
            "weight": TensorSpec(self.shape.dims(rows, self.cols // 2), torch.uint8),
            "block_scale": TensorSpec(self.shape.dims(steps, 2, rows, DEPTH // 32), torch.uint8),
            "row_scale": TensorSpec(self.shape.dims(rows), torch.float32),
            **input_scale_spec(self.scheme, self.shape),
        }

    def prepare(self, matrices: Stored) -> dict[str, Tensor]:
        codes, scales = matrices["weight"], matrices["weight_scale"]
        if has_kernels(codes):
            from ..gpu.pack import pack_nvfp4

            return dict(zip(("weight", "block_scale"), pack_nvfp4(codes, scales), strict=True))
        lead, rows = codes.shape[:-2], codes.shape[-2]
        # a scale of zero is E4M3's, not UE5M3's: its codes become zero instead
        codes = torch.where(scales.float().repeat_interleave(8, dim=-1) == 0, 0, codes)
        halves = torch.stack([codes & 15, codes >> 4], -1).view(*lead, rows, self.cols // DEPTH, 2, DEPTH // 2)
        first, second = halves.unbind(-2)
        weight = (first >> 3 << 7) | (second >> 3 << 6) | ((second & 7) << 3) | (first & 7)
        steps = ue5m3(scales).view(*lead, rows, self.cols // DEPTH, 2, DEPTH // 32)
        block_scale = steps.movedim(-4, -2).contiguous()
        return {"weight": weight.reshape(*lead, rows, self.cols // 2), "block_scale": block_scale}

    def derive(self, scales: Stored) -> dict[str, Tensor]:
        return {"row_scale": self.scheme.row_scale(scales, self.shape).clone()} | input_scale(self.scheme, scales)


def input_scale_spec(scheme: Scheme, shape: WeightShape) -> dict[str, TensorSpec]:
    return {"input_scale": TensorSpec(shape.dims(), torch.float32)} if scheme.activation == "static" else {}


def input_scale(scheme: Scheme, scales: Stored) -> dict[str, Tensor]:
    """Static scales of the stored ones [experts, shards]: one an expert."""
    if scheme.activation != "static":
        return {}
    stored = scales["input_scale"]
    if not torch.equal(stored[..., :1].expand_as(stored), stored):
        raise UnsupportedError(
            "the runner `triton` quantizes an expert's input once, but its gate and up have unequal input scales",
            ["choose moe_runner='reference', or activation='per_token'"],
        )
    return {"input_scale": stored[..., 0].clone()}


class TritonRunner:
    """Sorts the pairs by expert, then gate and up with SwiGLU, then down, then the sum over a token's choices."""

    name: ClassVar[str] = "triton"
    routes: ClassVar[bool] = False
    shows_w2: ClassVar[bool] = True
    capturable: ClassVar[bool] = True

    def __init__(
        self,
        config: MoeConfig,
        scheme: Scheme,
        capability: Capability,
        dtype: torch.dtype,
        linear_kernel: str = "auto",
    ) -> None:
        self.config, self.scheme = config, scheme
        self.takes_codes = isinstance(scheme, FP8) and scheme.activation == "per_token"
        self.watch_w2: Callable[[Tensor], None] = lambda x: None
        weights = GroupedFP8 if isinstance(scheme, FP8) else GroupedNVFP4
        self.w13, self.w2 = (weights(scheme, shape) for shape in expert_shapes(config))

    @staticmethod
    def unsupported(config: MoeConfig, scheme: Scheme, capability: Capability, dtype: torch.dtype) -> str | None:
        if capability.sm != 90:
            return f"its tiles are for sm90, this is {capability}"
        if "triton" not in capability.libraries:
            return "triton is not installed"
        if dtype != torch.bfloat16:
            return f"computes in bfloat16, not {dtype}"
        if config.bias or config.activation != "silu":
            return "computes plain SwiGLU, without biases"
        if isinstance(scheme, FP8) and scheme.activation in ("per_token", "static"):
            depth = 256
        elif isinstance(scheme, NVFP4) and scheme.activation in ("none", "per_token", "static"):
            depth = DEPTH
        else:
            asked = f"{scheme.name} with activations {scheme.activation!r}"
            return f"computes FP8 and NVFP4 per token or static, and NVFP4 W4A16, not {asked}"
        if config.hidden_size % depth or config.intermediate_size % depth:
            return f"hidden and intermediate sizes are multiples of {depth}"
        return None

    def apply(self, x: Tensor, ids: Tensor, weights: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]) -> Tensor:
        return self._apply(x.contiguous(), ids, weights, w13, w2)

    def apply_codes(
        self, x: FP8Rows, ids: Tensor, weights: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]
    ) -> Tensor:
        return self._apply(x, ids, weights, w13, w2)

    def _apply(
        self, x: Tensor | FP8Rows, ids: Tensor, weights: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]
    ) -> Tensor:
        from ..gpu.grouped_gemm import finalize

        if not len(ids):
            return weights.new_empty(0, self.config.hidden_size, dtype=torch.bfloat16)
        with torch.cuda.device(ids.device) if ids.is_cuda else nullcontext():
            outs = self._products(x, ids.contiguous(), w13, w2)
        return finalize(outs.view(*ids.shape, -1), weights.float().contiguous())

    def _products(self, x: Tensor | FP8Rows, ids: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]) -> Tensor:
        """What the choices of every token give, BF16 [pairs, hidden_size]."""
        from ..gpu import grouped_gemm
        from ..gpu.blocks import make_blocks

        kernels: Any = grouped_gemm  # to a type checker they take no launch options
        fp8 = isinstance(self.scheme, FP8)
        gate_up, down = (kernels.fp8_gate_up, kernels.fp8_down) if fp8 else (kernels.nvfp4_gate_up, kernels.nvfp4_down)
        options = {} if fp8 else {"SCALED": self.scheme.activation != "none", "ASSEMBLY": ids.is_cuda}

        num_pairs, hidden, inner = ids.numel(), self.config.hidden_size, self.config.intermediate_size
        tile = self._tile("w13", num_pairs)
        blocks = make_blocks(ids, self.config.num_experts, tile.tokens)
        values, scale, choices = self._quantize(x, ids, w13, self.config.top_k)
        activated = torch.empty(num_pairs, inner, dtype=torch.bfloat16, device=ids.device)
        gate_up[(inner // tile.rows, len(blocks[1]))](
            values, scale, *_weights(w13), activated, *blocks, num_pairs, hidden, inner,
            TOP_K=choices, **tile.options(), **options,
        )  # fmt: skip
        self.watch_w2(activated)
        other, tile = tile, self._tile("w2", num_pairs)
        assert other.tokens == tile.tokens
        values, scale, _ = self._quantize(activated, ids, w2, 1)
        out = torch.empty(num_pairs, hidden, dtype=torch.bfloat16, device=ids.device)
        down[(hidden // tile.rows, len(blocks[1]))](
            values, scale, *_weights(w2), out, *blocks, num_pairs, inner, hidden, **tile.options(), **options
        )
        return out

    def _quantize(
        self, x: Tensor | FP8Rows, ids: Tensor, packed: dict[str, Tensor], choices: int
    ) -> tuple[Tensor, Tensor, int]:
        """What a product sees of x, a scale a row, and how many pairs read a row in turn.

        With static scales every pair has a row of its own: experts may have unequal ones.
        """
        from ...quant.gpu.quantize import nvfp4_products, quantize_fp8

        if isinstance(x, FP8Rows):
            return x.codes, x.scale, choices
        quantize = quantize_fp8 if isinstance(self.scheme, FP8) else nvfp4_products
        if self.scheme.activation == "none":
            return x, x, choices
        if self.scheme.activation == "per_token":
            return *quantize(x), choices
        return *quantize(x, packed["input_scale"][ids.flatten()], repeat=choices), 1

    def _tile(self, weight: str, num_pairs: int) -> Tile:
        tiles = FP8_TILES if isinstance(self.scheme, FP8) else NVFP4_TILES
        return next(tile for most, tile in tiles[weight] if num_pairs / self.config.num_experts <= most)


def _weights(packed: dict[str, Tensor]) -> list[Tensor]:
    """What a kernel reads of a weight, in its order."""
    return [packed[name] for name in ("weight", "block_scale", "row_scale") if name in packed]
