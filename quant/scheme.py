"""What a checkpoint stores for one weight, and how BF16 becomes it.

*stored* follows ModelOpt: decode scales (`weight ~ codes * scale`), linear scale order, low nibble = even k.
Names per weight: `weight`, `weight_scale`, `weight_scale_2`, `input_scale`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import ClassVar, Literal, Protocol

import torch
from msgspec import Struct
from torch import Tensor

from . import numerics
from .errors import UnsupportedError

Activation = Literal["none", "static", "per_tensor", "per_token"]
Stored = Mapping[str, Tensor]

GROUP_SIZE = 16  # K elements that share one E4M3 block scale in NVFP4


class TensorSpec(Struct, frozen=True):
    """Shape and dtype of one tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class WeightShape(Struct, frozen=True):
    """One weight as a GEMM reads it: shards stacked along rows; `units` of them in a stack (experts).

    `cols` is None for what no GEMM reads: vectors (norms, biases), or tensors with more dimensions behind the rows,
    `trailing` (convolutions, tables). `one_scale` says that the shards of a unit share a per-tensor scale even where
    the scheme would keep them apart (an expert's gate and up in ModelOpt's FP8).
    """

    rows: tuple[int, ...]
    cols: int | None = None
    units: int | None = None
    one_scale: bool = False
    trailing: tuple[int, ...] = ()

    @property
    def num_rows(self) -> int:
        return sum(self.rows)

    @property
    def num_units(self) -> int:
        return 1 if self.units is None else self.units

    @property
    def unit(self) -> WeightShape:
        """The shape of one unit of the stack."""
        return WeightShape(self.rows, self.cols, one_scale=self.one_scale, trailing=self.trailing)

    def dims(self, *tail: int) -> tuple[int, ...]:
        """`tail` behind the stack dimension, where there is one."""
        return tail if self.units is None else (self.units, *tail)

    @property
    def matrix(self) -> tuple[int, ...]:
        return self.dims(self.num_rows, *self.trailing) if self.cols is None else self.dims(self.num_rows, self.cols)

    def shard_slice(self, shard: int) -> slice:
        start = sum(self.rows[:shard])
        return slice(start, start + self.rows[shard])

    def per_row(self, per_shard: Tensor) -> Tensor:
        """Spread one value a shard over the shard's rows: [..., num_shards] -> [..., num_rows]."""
        shards = per_shard.split(1, dim=-1)
        return torch.cat([s.expand(*s.shape[:-1], rows) for s, rows in zip(shards, self.rows, strict=True)], dim=-1)


class Scheme(Protocol):
    """What is stored for one weight. `matrices` are as big as the weight, `scales` are few and float32."""

    name: ClassVar[str]
    code_max: ClassVar[float]  # a decode scale is amax / code_max

    @property
    def activation(self) -> Activation: ...

    def matrices(self, shape: WeightShape) -> dict[str, TensorSpec]:
        """Stored tensors that have rows; raises `UnsupportedError` for a shape that the format cannot hold."""
        ...

    def scales(self, shape: WeightShape) -> dict[str, TensorSpec]:
        """Stored float32 scales: one a shard, or one a row; `input_scale` where activations are static."""
        ...

    def quantize(self, weight: Tensor, shape: WeightShape) -> dict[str, Tensor]:
        """BF16 [..., num_rows, cols] -> matrices and weight scales; any number of leading units."""
        ...

    def dequantize(self, stored: Stored, shape: WeightShape) -> Tensor:
        """Stored -> float32 [..., num_rows, cols]."""
        ...


def input_scale_spec(activation: Activation, shape: WeightShape) -> dict[str, TensorSpec]:
    if activation != "static":
        return {}
    return {"input_scale": TensorSpec(shape.dims(len(shape.rows)), torch.float32)}


class Plain(Struct, frozen=True):
    """A tensor stored as it is: weights in BF16; routing biases and KV scales in float32."""

    name: ClassVar[str] = "bf16"
    code_max: ClassVar[float] = 1.0
    dtype: torch.dtype = torch.bfloat16
    tensor: str = "weight"

    @property
    def activation(self) -> Activation:
        return "none"

    def matrices(self, shape: WeightShape) -> dict[str, TensorSpec]:
        return {self.tensor: TensorSpec(shape.matrix, self.dtype)}

    def scales(self, shape: WeightShape) -> dict[str, TensorSpec]:
        return {}

    def quantize(self, weight: Tensor, shape: WeightShape) -> dict[str, Tensor]:
        return {self.tensor: weight.to(self.dtype)}

    def dequantize(self, stored: Stored, shape: WeightShape) -> Tensor:
        return stored[self.tensor].float()


BF16 = Plain()


class FP8(Struct, frozen=True):
    """FP8 E4M3 weights with one scale a tensor (ModelOpt `FP8`) or one a row (`FP8_PER_CHANNEL_PER_TOKEN`).

    Shards of a fused weight keep their own per-tensor scale, but for an expert's gate and up.
    """

    name: ClassVar[str] = "fp8"
    code_max: ClassVar[float] = numerics.E4M3_MAX
    activation: Activation = "per_token"
    per_channel: bool = False

    def matrices(self, shape: WeightShape) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec(shape.matrix, torch.float8_e4m3fn)}

    def scales(self, shape: WeightShape) -> dict[str, TensorSpec]:
        count = shape.num_rows if self.per_channel else len(shape.rows)
        weight_scale = TensorSpec(shape.dims(count), torch.float32)
        return {"weight_scale": weight_scale, **input_scale_spec(self.activation, shape)}

    def quantize(self, weight: Tensor, shape: WeightShape) -> dict[str, Tensor]:
        if has_kernels(weight):
            return self._quantize_on_gpu(weight, shape)
        if self.per_channel:
            scale = numerics.decode_scale(row_amax(weight).float(), numerics.E4M3_MAX)
            return {"weight": numerics.quantize_fp8(weight, scale), "weight_scale": scale}
        scale = shard_scale(row_amax(weight), shape, numerics.E4M3_MAX, shared=shape.one_scale)
        codes = numerics.quantize_fp8(weight, shape.per_row(scale), bf16_quotient=True)
        return {"weight": codes, "weight_scale": scale}

    def _quantize_on_gpu(self, weight: Tensor, shape: WeightShape) -> dict[str, Tensor]:
        """The same bytes from few kernels: a launch for all units and shards, or one a shard."""
        from .gpu.convert import fp8_weight

        stack = weight.reshape(-1, *weight.shape[-2:])
        if self.per_channel:
            codes, scale = fp8_weight(stack, per_row=True)
        elif shape.one_scale or len(shape.rows) == 1:
            codes, unit_scale = fp8_weight(stack, per_row=False)
            scale = unit_scale[:, None].expand(-1, len(shape.rows)).contiguous()
        else:
            shards = [fp8_weight(shard, per_row=False) for shard in stack.split(shape.rows, dim=1)]
            codes = torch.cat([codes for codes, _ in shards], dim=1)
            scale = torch.stack([scale for _, scale in shards], dim=1)
        lead = weight.shape[:-2]
        return {"weight": codes.view(weight.shape), "weight_scale": scale.view(*lead, scale.shape[-1])}

    def row_scale(self, stored: Stored, shape: WeightShape) -> Tensor:
        """float32 [..., num_rows]: what an epilogue multiplies the rows of the output with."""
        scale = stored["weight_scale"]
        return scale if self.per_channel else shape.per_row(scale)

    def dequantize(self, stored: Stored, shape: WeightShape) -> Tensor:
        return numerics.decode_fp8(stored["weight"]) * self.row_scale(stored, shape)[..., None]


class NVFP4(Struct, frozen=True):
    """NVFP4: E2M1 codes, an E4M3 scale for 16 along K, one global scale shared by the shards of a fused weight.

    `activation="none"` is W4A16. Shards that arrive with unequal global scales keep them.
    """

    name: ClassVar[str] = "nvfp4"
    code_max: ClassVar[float] = numerics.NVFP4_MAX
    activation: Activation = "per_token"

    def matrices(self, shape: WeightShape) -> dict[str, TensorSpec]:
        if shape.cols is None or shape.cols % GROUP_SIZE:
            raise UnsupportedError(
                f"NVFP4 needs a 2-D weight with K a multiple of {GROUP_SIZE}, got {list(shape.matrix)}",
                ["keep this module in BF16 with `keep=[...]`, or choose FP8"],
            )
        return {
            "weight": TensorSpec(shape.dims(shape.num_rows, shape.cols // 2), torch.uint8),
            "weight_scale": TensorSpec(shape.dims(shape.num_rows, shape.cols // GROUP_SIZE), torch.float8_e4m3fn),
        }

    def scales(self, shape: WeightShape) -> dict[str, TensorSpec]:
        weight_scale_2 = TensorSpec(shape.dims(len(shape.rows)), torch.float32)
        return {"weight_scale_2": weight_scale_2, **input_scale_spec(self.activation, shape)}

    def quantize(self, weight: Tensor, shape: WeightShape) -> dict[str, Tensor]:
        if has_kernels(weight):
            return self._quantize_on_gpu(weight, shape)
        block_amax = numerics.group_amax(weight, GROUP_SIZE)
        scale_2 = shard_scale(block_amax.amax(-1), shape, numerics.NVFP4_MAX, shared=True)
        codes, block_scale = numerics.quantize_nvfp4_weight(weight, block_amax, shape.per_row(scale_2))
        return {"weight": codes, "weight_scale": block_scale, "weight_scale_2": scale_2}

    def _quantize_on_gpu(self, weight: Tensor, shape: WeightShape) -> dict[str, Tensor]:
        """The same bytes from one launch."""
        from .gpu.convert import nvfp4_weight

        lead, rows = weight.shape[:-2], weight.shape[-2]
        codes, block_scale, unit_scale = nvfp4_weight(weight.reshape(-1, *weight.shape[-2:]))
        return {
            "weight": codes.view(*lead, rows, -1),
            "weight_scale": block_scale.view(*lead, rows, -1),
            "weight_scale_2": unit_scale[:, None].expand(-1, len(shape.rows)).contiguous().view(*lead, len(shape.rows)),
        }

    def row_scale(self, stored: Stored, shape: WeightShape) -> Tensor:
        """float32 [..., num_rows]: what an epilogue multiplies the rows of the output with."""
        return shape.per_row(stored["weight_scale_2"])

    def dequantize(self, stored: Stored, shape: WeightShape) -> Tensor:
        products = numerics.nvfp4_products(stored["weight"], stored["weight_scale"], torch.float32)
        return products.mul_(self.row_scale(stored, shape)[..., None])


def has_kernels(x: Tensor) -> bool:
    """Whether `quant/gpu` quantizes x: the same bytes, faster. Before sm89 there are no FP8 casts to do it with."""
    return x.is_cuda and _has_fp8_casts(x.get_device())


@cache
def _has_fp8_casts(device: int) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 9)


def row_amax(weight: Tensor) -> Tensor:
    """max |w| of each row: BF16 [..., num_rows, cols] -> BF16 [..., num_rows]."""
    return numerics.group_amax(weight, weight.shape[-1]).squeeze(-1)


def shard_scale(row_amax: Tensor, shape: WeightShape, code_max: float, *, shared: bool) -> Tensor:
    """Decode scales float32 [..., num_shards] from row amax [..., num_rows]; equal in a unit if `shared`."""
    shards = row_amax.float().split(shape.rows, dim=-1)
    amax = torch.stack([shard.amax(-1) for shard in shards], dim=-1)
    if shared:
        amax = amax.amax(dim=-1, keepdim=True).expand_as(amax)
    return numerics.decode_scale(amax, code_max).contiguous()


QuantName = Literal["bf16", "fp8", "fp8_channel", "nvfp4", "nvfp4_w4a16"]


def make_scheme(name: QuantName, activation: Activation = "per_token") -> Scheme:
    """The scheme that `quant="..."` of `EngineConfig` names."""
    match name:
        case "bf16":
            return BF16
        case "fp8":
            return FP8(activation=activation)
        case "fp8_channel":
            return FP8(activation=activation, per_channel=True)
        case "nvfp4":
            return NVFP4(activation=activation)
        case "nvfp4_w4a16":
            return NVFP4(activation="none")
