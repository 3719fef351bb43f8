"""`triton`: all experts in two launches, BF16, FP8, NVFP4 W4A16 or the twin of NVFP4 W4A4, on Hopper."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ...quant import BF16, FP8, NVFP4, Capability, FP8Rows, Plain, Scheme, TensorSpec, UnsupportedError, WeightShape
from ...quant.kernels.nvfp4_packing import DEPTH, NVFP4Packer
from ...quant.kernels.plain import PlainKernel
from ...quant.scheme import Stored
from ..choices import Choices
from ..config import MoeConfig
from .reference import expert_shapes
from .triton_tiles import BF16_TILES, FP8_TILES, MANY_FROM, MULTIPLE, NVFP4_TILES, Tile, Tiles

TILES: dict[type, dict[str, Tiles]] = {Plain: BF16_TILES, FP8: FP8_TILES, NVFP4: NVFP4_TILES}


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


class GroupedNVFP4(NVFP4Packer):
    """As linears are packed, but with one input scale an expert."""

    name: ClassVar[str] = "triton_nvfp4"

    def __init__(self, scheme: Scheme, shape: WeightShape) -> None:
        assert isinstance(scheme, NVFP4)
        super().__init__(scheme, shape)

    def packed(self) -> dict[str, TensorSpec]:
        return super().packed() | input_scale_spec(self.scheme, self.shape)

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
    leaves_sum: ClassVar[bool] = True

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
        self.tiles, self.many_from = TILES[type(scheme)], MANY_FROM
        self.w13, self.w2 = (_packer(scheme, shape, dtype, capability) for shape in expert_shapes(config))

    @staticmethod
    def unsupported(config: MoeConfig, scheme: Scheme, capability: Capability, dtype: torch.dtype) -> str | None:
        sms = (90, 100, 103) if isinstance(scheme, Plain) else (90,)
        if capability.sm not in sms:
            return f"its tiles are for {', '.join(f'sm{sm}' for sm in sms)}, this is {capability}"
        if "triton" not in capability.libraries:
            return "triton is not installed"
        if dtype != torch.bfloat16:
            return f"computes in bfloat16, not {dtype}"
        if config.bias or config.activation != "silu":
            return "computes plain SwiGLU, without biases"
        modes = {Plain: ("none",), FP8: ("per_token", "static"), NVFP4: ("none", "per_token", "static")}
        if scheme.activation not in modes[type(scheme)] or (isinstance(scheme, Plain) and scheme != BF16):
            asked = f"{scheme.name} with activations {scheme.activation!r}"
            return f"computes BF16, FP8 and NVFP4 per token or static, and NVFP4 W4A16, not {asked}"
        depth = DEPTH if isinstance(scheme, NVFP4) else 64
        if config.hidden_size % depth or config.intermediate_size % depth:
            return f"hidden and intermediate sizes are multiples of {depth}"
        return None

    @staticmethod
    def batch_dependent(capability: Capability) -> str | None:
        return None if capability.sm == 90 else f"its tiles were seen to sum alike on sm90, and this is {capability}"

    def apply(self, x: Tensor, ids: Tensor, weights: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]) -> Tensor:
        return self.choices(x, ids, weights, w13, w2).sum()

    def choices(
        self, x: Tensor | FP8Rows, ids: Tensor, weights: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]
    ) -> Choices:
        if isinstance(x, FP8Rows) and self.takes_blocks(ids.numel()):
            return self._choices_of_many(x, ids.contiguous(), weights, w13, w2)
        x = x if isinstance(x, FP8Rows) else x.contiguous()
        with torch.cuda.device(ids.device) if ids.is_cuda else nullcontext():
            outs = self._products(x, ids.contiguous(), w13, w2)
        return Choices(outs, weights.float().contiguous())

    def takes_blocks(self, num_pairs: int) -> bool:
        """Whether codes of so many pairs go block by block. No meter looks at what comes in codes."""
        whole = self.config.hidden_size % MULTIPLE == self.config.intermediate_size % (MULTIPLE // 2) == 0
        return whole and num_pairs > self.many_from * self.config.num_experts

    def _choices_of_many(
        self, x: FP8Rows, ids: Tensor, weights: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]
    ) -> Choices:
        """Sorted once: what lies between the products stays block after block."""
        from ...quant.gpu.quantize import quantize_fp8
        from ..gpu.blocks import make_placed_blocks
        from ..gpu.fp8_many import TOKENS, multiply_down, multiply_gate_up

        pairs, experts, places, used = make_placed_blocks(ids, self.config.num_experts, TOKENS)
        codes, scale = quantize_fp8(
            multiply_gate_up(x.codes, x.scale, w13["weight"], w13["row_scale"], pairs, experts, ids.numel())
        )
        out = multiply_down(codes, scale, w2["weight"], w2["row_scale"], experts, used)
        return Choices(out, weights.float().contiguous(), places.view(ids.shape))

    def _products(self, x: Tensor | FP8Rows, ids: Tensor, w13: dict[str, Tensor], w2: dict[str, Tensor]) -> Tensor:
        """What the choices of every token give, BF16 [pairs, hidden_size]."""
        from ..gpu.blocks import make_blocks

        num_pairs, hidden, inner = ids.numel(), self.config.hidden_size, self.config.intermediate_size
        if not num_pairs:
            return torch.empty(0, hidden, dtype=torch.bfloat16, device=ids.device)
        first, second = self._tile("w13", num_pairs), self._tile("w2", num_pairs)
        alone = len(ids) == 1 or num_pairs <= self.config.num_experts // 4  # few share an expert: sorting takes longer
        blocks = (ids, ids.view(-1)) if alone else make_blocks(ids, self.config.num_experts, first.tokens)
        values, scale, choices = self._quantize(x, ids, w13, self.config.top_k)
        activated = torch.empty(num_pairs, inner, dtype=torch.bfloat16, device=ids.device)
        self._launch("w13", first, values, scale, w13, activated, blocks, num_pairs, SORTED=not alone, TOP_K=choices)
        self.watch_w2(activated)
        if second.tokens != first.tokens and not alone:
            blocks = make_blocks(ids, self.config.num_experts, second.tokens)
        values, scale, _ = self._quantize(activated, ids, w2, 1)
        out = torch.empty(num_pairs, hidden, dtype=torch.bfloat16, device=ids.device)
        self._launch("w2", second, values, scale, w2, out, blocks, num_pairs, SORTED=not alone)
        return out

    def _launch(
        self,
        weight: Literal["w13", "w2"],
        tile: Tile,
        x: Tensor,
        scale: Tensor,
        packed: dict[str, Tensor],
        out: Tensor,
        blocks: tuple[Tensor, Tensor],
        num_pairs: int,
        **options: int,
    ) -> None:
        """One grouped product of x, in BF16, FP8 or products of NVFP4 codes and scales, with a scale a row or none."""
        from ...quant.gpu.early import early
        from ...quant.gpu.nvfp4_words import in_word_order
        from ..gpu import grouped_gemm, nvfp4_grouped, nvfp4_grouped_many

        kernels: Any = grouped_gemm  # to a type checker they take no launch options
        num_rows, weights = out.shape[1], _weights(packed)
        tile = tile.fitting(num_rows, x.shape[1])
        if not isinstance(self.scheme, NVFP4):
            options["DEPTH"] = tile.depth
        elif tile.takes_large_instruction:
            kernels, options["ASSEMBLY"] = nvfp4_grouped_many, x.is_cuda
            x = in_word_order(x)
            weights[:2] = (part.view(torch.int32) for part in weights[:2])
        else:
            kernels, options["ASSEMBLY"] = nvfp4_grouped, x.is_cuda
            options["WORDS"] = tile.rows < 32 * tile.warps  # less than four bytes of scales a thread
            if options["WORDS"]:
                weights[1] = weights[1].view(torch.int32)
        kernel = kernels.grouped_gate_up if weight == "w13" else kernels.grouped_down
        kernel[(num_rows // tile.rows, len(blocks[1]))](
            x, scale, *weights, out, *blocks, num_pairs, x.shape[1], num_rows,
            SCALED=self.scheme.activation != "none", **tile.options(), **options, **early(x),
        )  # fmt: skip

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
        return next(tile for most, tile in self.tiles[weight] if num_pairs / self.config.num_experts <= most)


def _weights(packed: dict[str, Tensor]) -> list[Tensor]:
    """What a kernel reads of a weight, in its order; BF16 has no scales, so that nothing is read of the last."""
    present = [packed[name] for name in ("weight", "block_scale", "row_scale") if name in packed]
    return present if "row_scale" in packed else [*present, packed["weight"]]


def _packer(
    scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability
) -> GroupedFP8 | GroupedNVFP4 | PlainKernel:
    if isinstance(scheme, Plain):
        return PlainKernel(scheme, shape, dtype, capability)
    return GroupedFP8(scheme, shape) if isinstance(scheme, FP8) else GroupedNVFP4(scheme, shape)
