"""NVFP4 x NVFP4 through FlashInfer's `mm_fp4`: one kernel a backend, all from the same stored weights.

| backend | weight rows | block scales | alpha |
|---|---|---|---|
| trtllm | shuffled in blocks of 32 | shuffled alike, 128x4 tiles | one |
| cute-dsl | in order | 128x4 tiles | one, or one a token |
| cutlass, cudnn, auto | in order | 128x4 tiles | one |
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from .. import layout
from ..device import Capability
from ..errors import UnsupportedError
from ..flashinfer_api.activation import quantize_nvfp4
from ..flashinfer_api.guard import Bench, TacticGuard, Trial, shared_guard
from ..flashinfer_api.library import import_flashinfer
from ..flashinfer_api.trials import INPUT_AMAX, random_input, random_stored
from ..scheme import GROUP_SIZE, NVFP4, Scheme, Stored, TensorSpec, WeightShape
from .reference import ReferenceKernel

SCALE_ROWS = 128  # of a tile of block scales
DATACENTER = (100, 103, 107)
CONSUMER = (120, 121)


class FlashInferFP4:
    """Codes and scales zero-padded to what the backend takes; results are cut back to the weight's rows."""

    name: ClassVar[str]
    backend: ClassVar[str]
    sms: ClassVar[tuple[int, ...]]
    row_multiple: ClassVar[int] = 32
    col_multiple: ClassVar[int] = 32
    row_alpha_sms: ClassVar[tuple[int, ...]] = ()  # where it takes an alpha a token

    def __init__(self, scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability) -> None:
        assert isinstance(scheme, NVFP4)
        assert shape.cols is not None
        self.scheme, self.shape, self.dtype, self.capability = scheme, shape, dtype, capability
        self.rows = _ceil(shape.num_rows, self.row_multiple)
        self.cols = _ceil(shape.cols, self.col_multiple)
        product = f"{self.name} nvfp4 {scheme.activation} [{shape.num_rows}, {shape.cols}]"
        make = partial(type(self).make_bench, scheme, shape.unit, dtype, capability)
        key = (self.name, scheme, shape.unit, capability)
        self.guard = shared_guard(key, lambda: TacticGuard(product, make))

    @classmethod
    def unsupported(cls, scheme: Scheme, shape: WeightShape, dtype: torch.dtype, capability: Capability) -> str | None:
        if not isinstance(scheme, NVFP4):
            return "computes NVFP4 only"
        if scheme.activation not in ("static", "per_token"):
            return f"quantizes activations statically or per token, not {scheme.activation!r}"
        if capability.sm not in cls.sms:
            return f"runs on {', '.join(f'sm{sm}' for sm in cls.sms)}, this is {capability}"
        if capability.flashinfer is None:
            return capability.no_flashinfer
        if dtype != torch.bfloat16:
            return f"gives BF16 results, not {dtype}"
        return cls._no_row_alpha(capability) if scheme.activation == "per_token" else None

    @classmethod
    def _no_row_alpha(cls, capability: Capability) -> str | None:
        """Why this backend cannot scale every token by its own factor, or None."""
        if not cls.row_alpha_sms:
            return "takes one alpha for all tokens, and per-token activations need one a token"
        if capability.sm not in cls.row_alpha_sms:
            wanted = " and ".join(f"sm{sm}" for sm in cls.row_alpha_sms)
            return f"takes one alpha a token on {wanted}, this is {capability}"
        assert capability.flashinfer is not None
        if not capability.flashinfer.row_alpha:
            version = capability.flashinfer.version
            return f"flashinfer {version} takes one alpha for all tokens (since 0.7.1 one a token)"
        return None

    @staticmethod
    def batch_dependent(capability: Capability) -> str | None:
        return "FlashInfer chooses a tactic by the number of tokens"

    def packed(self) -> dict[str, TensorSpec]:
        scale_dims = _ceil(self.rows, SCALE_ROWS), _ceil(self.cols // GROUP_SIZE, 4)
        specs = {
            "weight": TensorSpec(self.shape.dims(self.rows, self.cols // 2), torch.uint8),
            "block_scale": TensorSpec(self.shape.dims(*scale_dims), torch.uint8),
            "alpha": TensorSpec(self.shape.dims(1), torch.float32),
        }
        if self.scheme.activation == "static":
            specs["encode"] = TensorSpec(self.shape.dims(1), torch.float32)
        return specs

    def prepare(self, matrices: Stored) -> dict[str, Tensor]:
        codes = layout.pad_to(matrices["weight"], rows=self.row_multiple, cols=self.col_multiple // 2)
        scales = matrices["weight_scale"].view(torch.uint8)
        scales = layout.pad_to(scales, rows=self.row_multiple, cols=self.cols // GROUP_SIZE)
        codes, scales = self._order_rows(codes), self._order_rows(scales)
        return {"weight": codes.clone(), "block_scale": layout.swizzle_scales(scales)}

    def _order_rows(self, x: Tensor) -> Tensor:
        return x

    def derive(self, scales: Stored) -> dict[str, Tensor]:
        """alpha = weight_scale_2, times input_scale where that is static: the kernel multiplies sums with it."""
        alpha = self._one(scales, "weight_scale_2")
        if self.scheme.activation != "static":
            return {"alpha": alpha}
        input_scale = self._one(scales, "input_scale")
        return {"alpha": alpha * input_scale, "encode": input_scale.reciprocal()}

    def _one(self, scales: Stored, name: str) -> Tensor:
        """[..., 1] of scales [..., num_shards] that are equal."""
        first = scales[name][..., :1]
        if not torch.equal(first.expand_as(scales[name]), scales[name]):
            raise UnsupportedError(
                f"{self.name} takes one {name} for a fused weight, but its shards have unequal ones",
                ["choose linear_kernel='exact', which keeps them"],
            )
        return first.clone()

    def apply(self, x: Tensor, packed: Stored, bias: Tensor | None = None) -> Tensor:
        if not len(x):
            return x.new_empty(0, self.shape.num_rows, dtype=self.dtype)
        with self.guard.serving(len(x)):
            out = self._multiply(x, packed)
        return out if bias is None else out + bias

    def _multiply(self, x: Tensor, packed: Stored) -> Tensor:
        codes, scales, token_scale = quantize_nvfp4(
            layout.pad_to(x, cols=self.col_multiple), packed.get("encode"), "128x4", self.capability
        )
        out = import_flashinfer().mm_fp4(
            codes,
            packed["weight"].t(),
            scales,
            packed["block_scale"].t(),
            packed["alpha"] if token_scale is None else token_scale * packed["alpha"],
            torch.bfloat16,
            backend=self.backend,
        )
        return out[:, : self.shape.num_rows]

    @classmethod
    def make_bench(cls, scheme: Scheme, unit: WeightShape, dtype: torch.dtype, capability: Capability) -> Bench:
        """Random weights, and what makes a product with them: beside the float32 reference of it."""
        assert unit.cols is not None
        cols, device = unit.cols, capability.device
        stored = random_stored(scheme, unit, device, INPUT_AMAX)
        kernel = cls(scheme, unit, dtype, capability)
        packed = kernel.prepare({key: stored[key] for key in scheme.matrices(unit)})
        packed |= kernel.derive({key: stored[key] for key in scheme.scales(unit)})
        reference = ReferenceKernel(scheme, unit, torch.float32, capability)

        def trial(tokens: int) -> Trial:
            x = random_input(tokens, cols, device)
            return Trial(partial(kernel._multiply, x, packed), reference.apply(x, stored), error=0.01)

        return trial


class FlashInferTrtllm(FlashInferFP4):
    """TensorRT-LLM's kernels; rows 0 4 8 ... 28, 1 5 ... of every 32, as their epilogue wants them."""

    name: ClassVar[str] = "flashinfer_trtllm"
    backend: ClassVar[str] = "trtllm"
    sms: ClassVar[tuple[int, ...]] = DATACENTER
    row_multiple: ClassVar[int] = 128
    col_multiple: ClassVar[int] = 64

    def _order_rows(self, x: Tensor) -> Tensor:
        return layout.gather_rows(x, layout.shuffle_rows_index(self.rows, epilogue_tile=128))


class FlashInferCuteDsl(FlashInferFP4):
    """CuTe DSL kernels: on sm100 and sm103 with an alpha a token."""

    name: ClassVar[str] = "flashinfer_cute_dsl"
    backend: ClassVar[str] = "cute-dsl"
    sms: ClassVar[tuple[int, ...]] = (*DATACENTER, *CONSUMER)
    row_multiple: ClassVar[int] = 64
    col_multiple: ClassVar[int] = 64
    row_alpha_sms: ClassVar[tuple[int, ...]] = (100, 103)


class FlashInferCutlass(FlashInferFP4):
    """CUTLASS kernels."""

    name: ClassVar[str] = "flashinfer_cutlass"
    backend: ClassVar[str] = "cutlass"
    sms: ClassVar[tuple[int, ...]] = (*DATACENTER, 110, *CONSUMER)


class FlashInferCudnn(FlashInferFP4):
    """cuDNN's kernels."""

    name: ClassVar[str] = "flashinfer_cudnn"
    backend: ClassVar[str] = "cudnn"
    sms: ClassVar[tuple[int, ...]] = (*DATACENTER, 110, *CONSUMER)


class FlashInferAuto(FlashInferFP4):
    """Whatever FlashInfer takes by itself of the kernels that read rows in order; per token, the CuTe DSL ones."""

    name: ClassVar[str] = "flashinfer_auto"
    backend: ClassVar[str] = "auto"
    sms: ClassVar[tuple[int, ...]] = (*DATACENTER, 110, *CONSUMER)
    row_alpha_sms: ClassVar[tuple[int, ...]] = (100, 103)


FP4_BACKENDS: dict[str, type[FlashInferFP4]] = {
    kernel.backend: kernel
    for kernel in (FlashInferTrtllm, FlashInferCuteDsl, FlashInferCutlass, FlashInferCudnn, FlashInferAuto)
}


def _ceil(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
