"""Where steps spend their time: kernels' names tell what they are for."""

from __future__ import annotations

import pytest
import torch

from rollmill.engine.step_profile import kind_of, profile_steps, sum_by_kind


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void flashinfer::BatchPrefillWithPagedKVCacheKernel<flashinfer::KernelTraits<...", "attention"),
        ("_qkv_kernel", "attention"),
        ("nvfp4_gate_up", "experts"),
        ("fp8_down", "experts"),
        ("_softmax_kernel", "routing"),
        ("logits_kernel", "routing"),
        ("word_order_kernel", "experts"),
        ("nvjet_sm90_qqtst_128x128_128x6_1x1_h_bz_coopA_algo2_ovscale_TNT", "linears"),
        ("_few_tokens", "linears"),
        ("_fp8_kernel", "quantizers"),
        ("_norm_kernel", "norms and activations"),
        ("_draw_kernel", "sampling"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("something_else", "other"),
    ],
)
def test_kinds(name: str, kind: str):
    assert kind_of(name) == kind


def test_sums_come_longest_first():
    assert list(sum_by_kind([("nvjet_a", 1.0), ("fp8_down", 3.0), ("nvjet_b", 1.5)]).items()) == [
        ("experts", 3.0),
        ("linears", 2.5),
    ]


def test_a_run_is_profiled():
    x = torch.randn(256, 256)
    spent = profile_steps(lambda: x @ x, torch.device("cpu"))
    assert spent.largest[0][0].startswith("aten::")
    assert 0 < spent.by_kind["linears"] < spent.seconds
