"""Where CUDA libraries and CuTe-DSL kernels stand below FlashInfer's Python: the same functions on CPU tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .decoding import Layout, write_scales
from .faults import Faults
from .gemms import bmm_fp8, mm_fp4, require
from .quantizers import quantize_nvfp4, quantize_nvfp4_per_token

LAYOUTS: dict[int, Layout] = {0: "128x4", 1: "8x4", 2: "linear"}  # SfLayout


class NativeQuantization:
    """Stands for the module that `get_fp4_quantization_module` loads."""

    def __init__(self, sm: int) -> None:
        self.sm = sm

    def require_blackwell(self) -> None:
        require(
            self.sm >= 100, f"the FP4 quantization kernels are empty below sm100; they leave garbage on sm{self.sm}"
        )

    def fp4_quantize(self, x: Tensor, global_scale: Tensor | None, out: Tensor, out_scale: Tensor, *rest: Any) -> None:
        """Per tensor, or per row where `global_scale` has a value for each row."""
        group, ue8m0, swizzled, rows_of_8, inversed = rest[:5]
        self.require_blackwell()
        check_input(x)
        if group != 16 or ue8m0:
            raise NotImplementedError("the model quantizes NVFP4 (groups of 16, E4M3 scales) only")
        require(global_scale is not None, "global_scale is required")
        scale: Tensor = global_scale  # pyright: ignore[reportAssignmentType]
        rows = x.numel() // x.shape[-1]
        require(scale.numel() in (1, rows), f"global_scale has 1 or {rows} elements, not {scale.numel()}")
        scale = 1.0 / scale if inversed else scale
        codes, blocks = quantize_nvfp4(x.reshape(rows, -1), scale.reshape(-1, 1))
        out.copy_(codes.view_as(out))
        layout: Layout = ("8x4" if rows_of_8 else "128x4") if swizzled else "linear"
        buffer = write_scales(blocks, layout)
        out_scale[: buffer.numel()] = buffer

    def nvfp4_quant_and_per_token_scale(
        self,
        x: Tensor,
        scale_inv: float,
        out: Tensor,
        out_scale: Tensor,
        per_token: Tensor,
        permuted: Tensor | None,
        layout: int,
        *_: Any,
    ) -> None:
        self.require_blackwell()
        check_input(x)
        if permuted is not None:
            raise NotImplementedError("the model has no row map")
        codes, blocks, scales = quantize_nvfp4_per_token(x, scale_inv)
        out.copy_(codes)
        out_scale.copy_(write_scales(blocks, LAYOUTS[layout]).view_as(out_scale))
        per_token.copy_(scales)

    def block_scale_interleave_sm100(self, scales: Tensor, out: Tensor) -> None:
        require(scales.dtype == torch.uint8, "the model interleaves uint8 scales")
        require(scales.is_contiguous() and out.is_contiguous(), "block scales must be contiguous")
        experts = scales if scales.ndim == 3 else scales[None]
        out.copy_(torch.cat([write_scales(expert, "128x4") for expert in experts]))


def check_input(x: Tensor) -> None:
    require(x.dtype in (torch.bfloat16, torch.float16), f"the model quantizes bfloat16 and float16, not {x.dtype}")
    require(x.shape[-1] % 16 == 0, f"K must be a multiple of 16, not {x.shape[-1]}")
    require(x.is_contiguous(), "the quantized tensor must be contiguous")


def gemm_runner(base: type, op: str, tactics: list[Any], faults: Faults, compute: Any) -> Any:
    """A TunableRunner (`base`) whose forward is `compute(inputs) -> out`, with the model's tactics and faults."""

    class ModelRunner(base):
        def get_valid_tactics(self, inputs: list[Any], profile: Any) -> list[Any]:
            return list(tactics)

        def forward(self, inputs: list[Any], tactic: Any = -1, do_preparation: bool = False, **_: Any) -> Tensor:
            out = compute(inputs)
            check_tactic(op, tactic, tactics)
            faults.apply(op, tactic, len(inputs[0]), out)
            return out

    return ModelRunner()


def check_tactic(op: str, tactic: Any, tactics: list[Any]) -> None:
    require(tactic == -1 or tactic in tactics, f"{op}: invalid tactic {tactic}; this model has {tactics}")


def fp4_runner(base: type, backend: str, tactics: list[Any], faults: Faults) -> Any:
    """mm_fp4's runner of a backend that is not a C++ module: cute-dsl, cudnn."""

    def compute(inputs: list[Any]) -> Tensor:
        a, b, a_scale, b_scale, alpha, _, out, _, use_nvfp4, _ = inputs
        require(use_nvfp4, "the model has NVFP4 only")
        mm_fp4(a, b, a_scale, b_scale, alpha, out, backend)
        return out

    return gemm_runner(base, "fp4_gemm", tactics, faults, compute)


def fp8_runner(base: type, tactics: list[Any], faults: Faults) -> Any:
    def compute(inputs: list[Any]) -> Tensor:
        a, b, a_scale, b_scale, out, _ = inputs
        bmm_fp8(a, b, a_scale, b_scale, out)
        return out

    return gemm_runner(base, "fp8_gemm", tactics, faults, compute)


def native_cutlass(tactics: list[int], faults: Faults) -> SimpleNamespace:
    """`fp4_gemm` of fp4_gemm_cutlass.cu; FlashInfer numbers its tactics from 0."""

    def fp4_gemm(
        a: Tensor, w: Tensor, a_scale: Tensor, w_scale: Tensor, alpha: Tensor, out: Tensor, *rest: Any
    ) -> None:
        require(a_scale.dtype == w_scale.dtype == torch.uint8, "cutlass: scales reach the kernel as uint8")
        require(alpha is None or alpha.numel() == 1, "cutlass: alpha has one element")
        mm_fp4(a, w.T, a_scale, w_scale.T, alpha, out, "cutlass")
        check_tactic("fp4_gemm", rest[-1], tactics)
        faults.apply("fp4_gemm", rest[-1], len(a), out)

    return SimpleNamespace(fp4_gemm=fp4_gemm, fp4_gemm_tactic_num=lambda: len(tactics))


def native_trtllm(tactics: list[int], faults: Faults) -> SimpleNamespace:
    """`trtllm_gemm` and `trtllm_gemm_tactics` of trtllm_gemm_runner.cu."""

    def trtllm_gemm(*arguments: Any) -> None:
        _, _, workspace, a, w, a_scale, w_scale, alpha, out, rows_of_8, tactic = arguments
        require(a.dtype == torch.uint8, "trtllm: the model has FP4 only")
        require(workspace.ndim == 1, "trtllm: the workspace is flat")
        require(alpha is None or alpha.numel() == 1, "trtllm: alpha has one element")
        mm_fp4(a, w.T, a_scale, w_scale.T, alpha, out, "trtllm", "8x4" if rows_of_8 else "128x4")
        check_tactic("fp4_gemm", tactic, tactics)
        faults.apply("fp4_gemm", tactic, len(a), out)

    return SimpleNamespace(trtllm_gemm=trtllm_gemm, trtllm_gemm_tactics=lambda *_: list(tactics))
