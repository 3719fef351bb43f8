"""The self-check: what a tactic must compute before it serves, and what is refused by name."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from msgspec import structs

from rollmill.moe import MoeConfig, RoutedExperts
from rollmill.moe.runners.flashinfer_trtllm import FlashInferTrtllmRouted
from rollmill.quant import NVFP4, UnsupportedError, WeightShape, select_kernel
from rollmill.quant.flashinfer_api.guard import bucket_of
from rollmill.quant.flashinfer_api.library import import_flashinfer
from rollmill.quant.flashinfer_api.tactics import Tactic, forced, forced_tactic

GEMM, MOE = "fp4_gemm", "flashinfer::trtllm_fp4_block_scale_moe"
SHAPE, STATIC = WeightShape((256,), 128), NVFP4("static")
CONFIG = MoeConfig(num_experts=4, top_k=2, hidden_size=128, intermediate_size=64)


@pytest.fixture
def linear(blackwell):
    def make(shape=SHAPE):
        kind = select_kernel(STATIC, shape, blackwell, torch.bfloat16, "flashinfer_trtllm")
        return kind(STATIC, shape, torch.bfloat16, blackwell)

    return make


@pytest.fixture
def experts(blackwell):
    return lambda activation="per_token": FlashInferTrtllmRouted(CONFIG, NVFP4(activation), blackwell, torch.bfloat16)


def test_the_librarys_own_choice_serves_where_it_is_right(linear):
    (served,) = linear().guard.prepare(5)
    assert served.tokens == 8
    assert served.tactic.endswith("fallback")
    assert served.refused == ()


@pytest.mark.parametrize("kind", ["nan", "wrong", "raise"])
def test_a_faulty_tactic_is_refused_by_name_and_the_next_one_serves(kind, linear, model_library):
    model_library.faults.add(GEMM, kind, tactic=-1)
    model_library.faults.add(GEMM, kind, tactic=0)
    (served,) = linear().guard.prepare(16)
    assert served.tactic.endswith(" 1")
    words = {"nan": "not finite", "wrong": "off by", "raise": "failed"}[kind]
    assert len(served.refused) == 2
    assert "fallback" in served.refused[0]
    assert all(words in refused for refused in served.refused)


def test_an_error_of_a_librarys_own_type_refuses_a_tactic(linear, monkeypatch, model_library):
    class DSLRuntimeError(Exception):
        pass

    made, tried = linear(), []
    bench = made.guard.make_bench()

    def failing(tokens):
        trial = bench(tokens)

        def run():
            if forced_tactic() is not None and not tried:
                tried.append(forced_tactic())
                raise DSLRuntimeError("no such tile")
            return trial.run()

        return structs.replace(trial, run=run)

    made.guard.make_bench = lambda: failing
    (served,) = made.guard.prepare(4)
    assert served.refused == (f"{tried[0]}: DSLRuntimeError: no such tile, at 4 tokens",)


def test_no_memory_says_nothing_of_a_tactic(linear):
    made = linear()
    bench = made.guard.make_bench()

    def failing(tokens):
        trial = bench(tokens)

        def run():
            if forced_tactic() is not None:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return trial.run()

        return structs.replace(trial, run=run)

    made.guard.make_bench = lambda: failing
    with pytest.raises(torch.OutOfMemoryError):
        made.guard.prepare(4)
    assert not made.guard.served
    made.guard.make_bench = lambda: bench
    assert made.guard.prepare(4)[0].refused == ()


def test_a_failure_is_told_again_without_another_try(linear, model_library):
    model_library.faults.add(GEMM, "nan")
    guard = linear().guard
    for _ in range(2):
        with pytest.raises(UnsupportedError, match="no tactic"):
            guard.prepare(4)
        assert model_library.faults.hits == 4


def test_a_guard_keeps_no_layer_alive(blackwell):
    names = ("gate", "up", "down")
    layer = RoutedExperts("e", names, CONFIG, NVFP4(), capability=blackwell, dtype=torch.bfloat16)
    held = [weakref.ref(tensor) for slot in layer.slots for tensor in slot.tensors.values()]
    del layer
    gc.collect()
    assert all(one() is None for one in held)


def test_what_was_refused_is_not_run_again(linear, model_library, stored_weight):
    model_library.faults.add(GEMM, "nan", tactic=-1)
    made, stored = linear(), stored_weight(STATIC, SHAPE)
    packed = made.prepare(stored) | made.derive(stored)
    made.guard.prepare(3)
    hits = model_library.faults.hits
    out = made.apply(torch.randn(3, 128).bfloat16(), packed)
    assert bool(out.isfinite().all())
    assert model_library.faults.hits == hits


def test_a_tactic_wrong_at_one_number_of_tokens_is_refused_there_only(linear, model_library):
    model_library.faults.add(GEMM, "wrong", tactic=-1, when=lambda tokens: tokens == 33)
    guard = linear().guard
    assert guard.prepare(32)[0].tactic.endswith("fallback")
    assert not guard.prepare(64)[0].tactic.endswith("fallback")  # 33 to 64 tokens: checked at both ends
    assert "33 tokens" in guard.prepare(64)[0].refused[0]


def test_no_tactic_left_names_them_all(linear, model_library):
    model_library.faults.add(GEMM, "nan")
    with pytest.raises(UnsupportedError, match=r"no tactic .* \[256, 128\] for 4 tokens") as error:
        linear().guard.prepare(4)
    assert len(error.value.reasons) == 4
    assert all("not finite" in reason for reason in error.value.reasons)


def test_unprepared_numbers_are_checked_when_they_come(linear, stored_weight):
    made, stored = linear(), stored_weight(STATIC, SHAPE)
    assert not made.guard.served
    made.apply(torch.randn(6, 128).bfloat16(), made.prepare(stored) | made.derive(stored))
    assert list(made.guard.served) == [8]


def test_layers_of_one_shape_share_a_check(linear):
    assert linear().guard is linear().guard
    assert linear().guard is not linear(WeightShape((128,), 128)).guard


@pytest.mark.parametrize(("tokens", "bucket"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (2048, 2048), (2049, 4096)])
def test_tokens_go_by_powers_of_two(tokens, bucket):
    assert bucket_of(tokens) == bucket


def test_experts_known_bad_tactics_are_never_run(experts, model_library):
    """flashinfer#4486: tile 192 with per-token scales; #4588, #4854: the fallback with many tokens."""
    model_library.moe_tactics[:] = [[192, 1], [128, 7]]
    runs = []
    model_library.faults.add(MOE, "wrong", tactic=[192, 1], when=lambda tokens: bool(runs.append(tokens)))
    guard = experts().guard
    bench = guard.make_bench()
    guard.make_bench = lambda: lambda tokens: bench(min(tokens, 8))  # the numbers are told, not computed
    (served,) = guard.prepare(8192)
    assert served.tactic.endswith("[128, 7]")
    assert [("4588" in one, "4486" in one) for one in served.refused] == [(True, False), (False, True)]
    assert not runs
    assert guard.prepare(64)[0].tactic.endswith("fallback")


def test_static_scales_may_use_what_is_bad_per_token_only(experts, model_library):
    model_library.moe_tactics[:] = [[192, 1]]
    model_library.faults.add(MOE, "nan", tactic=-1)
    assert experts("static").guard.prepare(8)[0].tactic.endswith("[192, 1]")


@pytest.mark.parametrize("kind", ["nan", "wrong"])
def test_faulty_experts_are_refused(kind, experts, model_library):
    model_library.faults.add(MOE, kind, tactic=-1)
    model_library.faults.add(MOE, kind, tactic=[8, 0])
    (served,) = experts().guard.prepare(16)
    assert served.tactic.endswith("[8, 1]")
    assert len(served.refused) == 2


def test_outside_of_a_guard_the_library_decides_as_before(blackwell, linear, model_library):
    """`autotune` still works for others: what it learned is kept, and what it measures is its own."""
    from flashinfer.autotuner import AutoTuner

    flashinfer, before = import_flashinfer(), AutoTuner.get()
    before.marked = True
    linear().guard.prepare(4)
    assert AutoTuner.get().marked
    x = torch.randn(4, 128).bfloat16()
    codes, scales = flashinfer.nvfp4_quantize(x, torch.ones(1), sfLayout=flashinfer.SfLayout.layout_128x4)
    weight = torch.zeros(32, 64, dtype=torch.uint8)
    with flashinfer.autotune(True):
        flashinfer.mm_fp4(codes, weight.t(), scales, torch.zeros(128, 8, dtype=torch.uint8).t(), torch.ones(1),
                          torch.bfloat16, backend="cutlass")  # fmt: skip
    assert {tactic for op, tactic, _ in model_library.profiled if op == GEMM} >= {0, 1, 2}


def test_a_tactic_of_another_runner_is_refused(linear, stored_weight):
    made, stored = linear(), stored_weight(STATIC, SHAPE)
    packed = made.prepare(stored) | made.derive(stored)
    with forced(Tactic("NoSuchRunner", 0)), pytest.raises(UnsupportedError, match="no runner NoSuchRunner"):
        made._multiply(torch.randn(2, 128).bfloat16(), packed)
