"""`triton`: all experts in two launches, FP8, NVFP4 W4A16 or the twin of NVFP4 W4A4, on Hopper."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...quant import FP8, NVFP4, Capability, Scheme, TensorSpec, WeightShape
from ...quant.kernels.nvfp4_packing import ue5m3
from ...quant.scheme import Stored
from ..config import MoeConfig
from .reference import expert_shapes

DEPTH = 128  # along K: of one step of an NVFP4 product, whose weights are packed for it

# Average pairs an expert, at the most -> rows, tokens, depth, warps, stages. Measured on an H100 at Qwen3-30B-A3B's
# shape: benchmarks/NOTES.md.
Tiles = tuple[tuple[float, tuple[int, int, int, int, int]], ...]
FP8_TILES: dict[str, Tiles] = {
    "w13": (
        (12, (64, 16, 256, 4, 3)),
        (24, (128, 32, 256, 4, 3)),
        (96, (128, 32, 128, 8, 3)),
        (float("inf"), (128, 128, 128, 8, 4)),
    ),
    "w2": (
        (12, (128, 16, 256, 8, 2)),
        (24, (128, 32, 256, 8, 2)),
        (96, (128, 32, 128, 4, 3)),
        (float("inf"), (128, 128, 128, 4, 3)),
    ),
}
NVFP4_TILES: dict[str, Tiles] = {
    "w13": (
        (12, (64, 16, DEPTH, 2, 3)),
        (24, (128, 32, DEPTH, 4, 2)),
        (96, (64, 64, DEPTH, 4, 3)),
        (float("inf"), (64, 128, DEPTH, 4, 3)),
    ),
    "w2": (
        (12, (128, 16, DEPTH, 4, 3)),
        (24, (128, 32, DEPTH, 4, 3)),
        (96, (128, 64, DEPTH, 4, 3)),
        (float("inf"), (128, 128, DEPTH, 4, 3)),
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
        return {"weight": weight, "row_scale": TensorSpec(self.shape.dims(self.shape.num_rows), torch.float32)}

    def prepare(self, matrices: Stored) -> dict[str, Tensor]:
        return {"weight": matrices["weight"]}

    def derive(self, scales: Stored) -> dict[str, Tensor]:
        return {"row_scale": self.scheme.row_scale(scales, self.shape).clone()}


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
        }

    def prepare(self, matrices: Stored) -> dict[str, Tensor]:
        codes, scales = matrices["weight"], matrices["weight_scale"]
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
        return {"row_scale": self.scheme.row_scale(scales, self.shape).clone()}


class TritonRunner:
    """Sorts the pairs by expert, then gate and up with SwiGLU, then down, then the sum over a token's choices."""

    name: ClassVar[str] = "triton"
    routes: ClassVar[bool] = False
    shows_w2: ClassVar[bool] = True

    def __init__(
        self,
        config: MoeConfig,
        scheme: Scheme,
        capability: Capability,
        dtype: torch.dtype,
        linear_kernel: str = "auto",
    ) -> None:
        self.config, self.scheme = config, scheme
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
        if isinstance(scheme, FP8) and scheme.activation == "per_token":
            depth = 256
        elif isinstance(scheme, NVFP4) and scheme.activation in ("none", "per_token"):
            depth = DEPTH
        else:
            asked = f"{scheme.name} with activations {scheme.activation!r}"
            return f"computes FP8 per token and NVFP4 per token or W4A16, not {asked}"
        if config.hidden_size % depth or config.intermediate_size % depth:
            return f"hidden and intermediate sizes are multiples of {depth}"
        return None

    def apply(self, x: Tensor, ids: Tensor, weights: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]) -> Tensor:
        from ..gpu.grouped_gemm import finalize

        if not len(x):
            return x
        products = self._fp8 if isinstance(self.scheme, FP8) else self._nvfp4
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            outs = products(x.contiguous(), ids.contiguous(), w13, w2)
        return finalize(outs.view(*ids.shape, -1), weights.float().contiguous())

    def _tile(self, tiles: dict[str, Tiles], weight: str, num_pairs: int) -> tuple[int, int, int, int, int]:
        average = num_pairs / self.config.num_experts
        return next(tile for most, tile in tiles[weight] if average <= most)

    def _fp8(self, x: Tensor, ids: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]) -> Tensor:
        from ...quant.gpu.quantize import quantize_fp8
        from ..gpu import grouped_gemm
        from ..gpu.blocks import make_blocks

        kernels: Any = grouped_gemm  # to a type checker they take no launch options

        config, num_pairs = self.config, ids.numel()
        hidden, inner = config.hidden_size, config.intermediate_size
        rows, tokens, depth, warps, stages = self._tile(FP8_TILES, "w13", num_pairs)
        pairs, experts = make_blocks(ids, config.num_experts, tokens)
        codes, scale = quantize_fp8(x)
        activated = x.new_empty(num_pairs, inner)
        kernels.fp8_gate_up[(inner // rows, len(experts))](
            codes, scale, w13["weight"], w13["row_scale"], activated, pairs, experts, num_pairs, hidden, inner,
            TOP_K=config.top_k, ROWS=rows, TOKENS=tokens, DEPTH=depth, STAGES=stages, num_warps=warps,
        )  # fmt: skip
        self.watch_w2(activated)
        rows, other, depth, warps, stages = self._tile(FP8_TILES, "w2", num_pairs)
        assert other == tokens
        codes, scale = quantize_fp8(activated)
        out = x.new_empty(num_pairs, hidden)
        kernels.fp8_down[(hidden // rows, len(experts))](
            codes, scale, w2["weight"], w2["row_scale"], out, pairs, experts, num_pairs, inner, hidden,
            ROWS=rows, TOKENS=tokens, DEPTH=depth, STAGES=stages, num_warps=warps,
        )  # fmt: skip
        return out

    def _nvfp4(self, x: Tensor, ids: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]) -> Tensor:
        from ..gpu import grouped_gemm
        from ..gpu.blocks import make_blocks

        kernels: Any = grouped_gemm  # to a type checker they take no launch options

        config, num_pairs = self.config, ids.numel()
        hidden, inner = config.hidden_size, config.intermediate_size
        rows, tokens, depth, warps, stages = self._tile(NVFP4_TILES, "w13", num_pairs)
        pairs, experts = make_blocks(ids, config.num_experts, tokens)
        options = {"SCALED": self.scheme.activation == "per_token", "ASSEMBLY": x.is_cuda}
        activated = x.new_empty(num_pairs, inner)
        kernels.nvfp4_gate_up[(inner // rows, len(experts))](
            *self._nvfp4_input(x), w13["weight"], w13["block_scale"], w13["row_scale"], activated, pairs, experts,
            num_pairs, hidden, inner, TOP_K=config.top_k, ROWS=rows, TOKENS=tokens, DEPTH=depth, STAGES=stages,
            **options, num_warps=warps,
        )  # fmt: skip
        self.watch_w2(activated)
        rows, other, depth, warps, stages = self._tile(NVFP4_TILES, "w2", num_pairs)
        assert other == tokens
        out = x.new_empty(num_pairs, hidden)
        kernels.nvfp4_down[(hidden // rows, len(experts))](
            *self._nvfp4_input(activated), w2["weight"], w2["block_scale"], w2["row_scale"], out, pairs, experts,
            num_pairs, inner, hidden, ROWS=rows, TOKENS=tokens, DEPTH=depth, STAGES=stages,
            **options, num_warps=warps,
        )  # fmt: skip
        return out

    def _nvfp4_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """BF16 as it is, or the products of its codes and block scales, and the scale of every row."""
        from ...quant.gpu.quantize import nvfp4_products

        return nvfp4_products(x) if self.scheme.activation == "per_token" else (x, x)
