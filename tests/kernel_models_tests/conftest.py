"""Weights as FlashInfer's own helpers lay them out: the other side of what the model reads back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kernel_models.library import ModelLibrary
from torch import Tensor


@dataclass
class Fp4Experts:
    """Kernel-ready NVFP4 experts and the float32 weights that their bytes mean."""

    arguments: dict[str, Any]
    up: Tensor  # [E, I, H]
    gate: Tensor
    down: Tensor  # [E, H, I]


@pytest.fixture
def nvfp4(model_library: ModelLibrary) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """x -> (codes, linear scale bytes, float32 values): a global scale of 1."""
    from flashinfer.quantization import fp4_quantization as flashinfer
    from flashinfer.quantization.fp4_quantization import _e2m1_and_ufp8sf_scale_to_float_cpu

    def quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        codes, scales = flashinfer.fp4_quantize(x.bfloat16(), torch.ones(1), is_sf_swizzled_layout=False)
        values = _e2m1_and_ufp8sf_scale_to_float_cpu(codes, scales, torch.ones(1), 16, 1, False)
        model_library.calls.clear()
        return codes, scales, values.view(x.shape)

    return quantize


@pytest.fixture
def fp4_experts(nvfp4: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]) -> Callable[..., Fp4Experts]:
    """`fp4_experts(num_experts, hidden_size, intermediate_size)`, shuffled by FlashInfer's own index functions."""
    from flashinfer.fused_moe.core import _maybe_get_cached_w3_w1_permute_indices, get_w2_permute_indices_with_cache
    from flashinfer.quantization import fp4_quantization as flashinfer

    def make(experts: int = 4, hidden: int = 256, intermediate: int = 128) -> Fp4Experts:
        cache: dict[Any, Tensor] = {}
        packed: dict[str, list[Tensor]] = {"w13": [], "s13": [], "w2": [], "s2": []}
        values: list[tuple[Tensor, Tensor]] = []
        for _ in range(experts):
            codes, scales, w13 = nvfp4(torch.randn(2 * intermediate, hidden) / 8)  # [up, gate]
            rows = _maybe_get_cached_w3_w1_permute_indices(cache, codes, 128)
            rows_of_scales = _maybe_get_cached_w3_w1_permute_indices(cache, scales, 128, num_elts_per_sf=16)
            packed["w13"].append(codes[rows])
            packed["s13"].append(flashinfer.block_scale_interleave(scales[rows_of_scales].contiguous()))
            codes, scales, w2 = nvfp4(torch.randn(hidden, intermediate) / 8)
            rows = get_w2_permute_indices_with_cache(cache, codes, 128)
            rows_of_scales = get_w2_permute_indices_with_cache(cache, scales, 128, num_elts_per_sf=16)
            packed["w2"].append(codes[rows])
            packed["s2"].append(flashinfer.block_scale_interleave(scales[rows_of_scales].contiguous()))
            values.append((w13, w2))
        arguments = {
            "gemm1_weights": torch.stack(packed["w13"]),
            "gemm1_weights_scale": torch.stack(packed["s13"]).view(torch.float8_e4m3fn).view(experts, -1, hidden // 16),
            "gemm2_weights": torch.stack(packed["w2"]),
            "gemm2_weights_scale": torch.stack(packed["s2"]).view(torch.float8_e4m3fn).view(experts, hidden, -1),
            "output1_scale_scalar": torch.rand(experts) + 0.5,
            "output1_scale_gate_scalar": torch.rand(experts) + 0.5,
            "output2_scale_scalar": torch.rand(experts) + 0.5,
            "num_experts": experts,
            "local_num_experts": experts,
            "intermediate_size": intermediate,
        }
        up_gate = torch.stack([w13 for w13, _ in values])
        up, gate = up_gate[:, :intermediate], up_gate[:, intermediate:]
        return Fp4Experts(arguments, up, gate, torch.stack([w2 for _, w2 in values]))

    return make
