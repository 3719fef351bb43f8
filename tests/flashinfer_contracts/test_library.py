"""What is read off the installed FlashInfer, and that our layouts are its own."""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import get_args

import pytest
import torch

flashinfer = pytest.importorskip("flashinfer")
from flashinfer import fused_moe  # noqa: E402
from flashinfer.fused_moe import core  # noqa: E402

from rollmill.moe import MoeConfig  # noqa: E402
from rollmill.moe.runners.flashinfer_trtllm import routing_method  # noqa: E402
from rollmill.quant import FP4_BACKENDS, layout  # noqa: E402
from rollmill.quant.flashinfer_api.library import describe, find_flashinfer  # noqa: E402

FACTS = {  # version -> row_alpha, routing_pairs, declares_scale_layout, fp8_per_tensor_routed, fp8_per_channel
    "0.6.11.post1": (False, False, False, False, False),
    "0.7.2.post1": (True, True, True, True, True),
}


def test_features_of_the_versions_that_we_know():
    found = find_flashinfer()
    features = found.row_alpha, found.routing_pairs, found.declares_scale_layout
    assert FACTS[flashinfer.__version__] == (*features, found.fp8_per_tensor_routed, found.fp8_per_channel)
    assert describe(flashinfer) == found


def test_an_alpha_a_row_is_what_the_library_itself_accepts():
    """`row_alpha` is told by another function's parameter; the library's own check of `mm_fp4` must agree."""
    from flashinfer.gemm.gemm_base import _check_mm_fp4_problem_size as check

    codes, scales = torch.zeros(2, 16, dtype=torch.uint8), torch.zeros(128, 4, dtype=torch.uint8)
    weight, alpha = torch.zeros(32, 16, dtype=torch.uint8).t(), torch.ones(2)
    accepts = True
    try:
        check(codes, weight, scales, scales, alpha, backend="cute-dsl")
    except ValueError:
        accepts = False
    assert accepts == find_flashinfer().row_alpha


def test_an_unknown_library_is_described_by_its_signatures():
    module, moe = ModuleType("flashinfer"), ModuleType("fused_moe")
    module.__version__, module.fused_moe = "9", moe
    module.nvfp4_quantize = lambda a, a_global_sf, out_scale=None: None
    moe.trtllm_fp4_block_scale_routed_moe = lambda topk_ids: None
    found = describe(module)
    assert (found.row_alpha, found.routing_pairs, found.declares_scale_layout) == (True, False, False)
    assert (found.fp8_per_tensor_routed, found.fp8_per_channel) == (False, False)


@pytest.mark.parametrize("backend", FP4_BACKENDS)
def test_backends_are_the_librarys(backend):
    assert backend in get_args(inspect.signature(flashinfer.mm_fp4).parameters["backend"].annotation)


@pytest.mark.parametrize("rows", [128, 256, 384, 1536])
def test_row_orders_equal_the_librarys_tables(rows):
    weight = torch.zeros(rows, 64, dtype=torch.uint8)
    shuffle = layout.shuffle_rows_index(rows, 128)
    gated = layout.gated_reorder_index(rows)[shuffle]
    assert torch.equal(core.get_w2_permute_indices_with_cache({}, weight, 128), shuffle)
    assert torch.equal(core.get_w2_permute_indices_with_cache({}, weight, 128, num_elts_per_sf=16), shuffle)
    assert torch.equal(core._maybe_get_cached_w3_w1_permute_indices({}, weight, 128), gated)
    assert torch.equal(core._maybe_get_cached_w3_w1_permute_indices({}, weight, 128, num_elts_per_sf=16), gated)
    coded = torch.arange(rows * 64).remainder(251).to(torch.uint8).view(rows, 64)
    assert torch.equal(flashinfer.shuffle_matrix_a(coded, 128), layout.gather_rows(coded, shuffle))


@pytest.mark.parametrize(
    ("config", "method"),
    [
        (MoeConfig(8, 2, 64, 32), "RenormalizeNaive"),
        (MoeConfig(8, 2, 64, 32, renormalize=False), "Default"),
        (MoeConfig(8, 2, 64, 32, scoring="sigmoid", n_group=4, topk_group=2, routed_scaling_factor=2.5), "DeepSeekV3"),
        (MoeConfig(8, 2, 64, 32, scoring="sigmoid", renormalize=False), None),
        (MoeConfig(8, 2, 64, 32, routed_scaling_factor=2.0), None),
    ],
    ids=["qwen3", "qwen2", "deepseek", "sigmoid", "scaled"],
)
def test_routing_methods_are_members_of_the_librarys_enum(config, method):
    assert routing_method(config) == method
    assert method is None or method in fused_moe.RoutingMethodType.__members__
