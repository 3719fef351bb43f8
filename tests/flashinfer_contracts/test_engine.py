"""A whole engine on a Blackwell in software: logits beside ModelOpt's, toggles, swaps, routed experts."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollmill.engine import ConfigError, Engine, EngineConfig, SamplingParams, UnsupportedError, engine as engine_module
from rollmill.engine.env import EXACT_DIVISION, FOUR_OVER_SIX, read_toggles

PER_TOKEN = "ROLLMILL_NVFP4_PER_TOKEN_ACTIVATION"
BACKEND = "ROLLMILL_FP4_GEMM_BACKEND"
UPSTREAM_BACKEND = "SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND"
SMALL = {"max_step_tokens": 64, "max_batch_size": 8}
DIT = Path(__file__).parents[1] / "data" / "dit"
GREEDY = SamplingParams(temperature=0, max_new_tokens=6)


@pytest.fixture(autouse=True)
def on_blackwell(blackwell, monkeypatch):
    monkeypatch.setattr(engine_module, "find_capability", lambda device: blackwell)
    monkeypatch.delenv(EXACT_DIVISION, raising=False)
    return blackwell


def kernels_of(engine):
    return {slot.name.rpartition(".")[2]: slot.packer.name for slot in engine.model.slots if slot.scheme.name != "bf16"}


def runner_of(engine):
    return engine.model.layers[0].mlp.experts.runner.name


def divergence(engine, expected):
    """Mean KL of the stored logits' tokens from the engine's."""
    logq = torch.stack(engine.logits(expected["input_ids"].tolist())).float().log_softmax(-1)
    logp = expected["logits"].float().log_softmax(-1)
    return (logp.exp() * (logp - logq)).sum(-1).mean().item()


def test_modelopts_logits(modelopt_folder, expected_logits):
    """Static NVFP4 through TRTLLM kernels; beside it what BF16 arithmetic costs on a CPU."""
    folder, expected = modelopt_folder("qwen3_moe", "nvfp4"), expected_logits("qwen3_moe", "nvfp4")
    with Engine(folder, EngineConfig(**SMALL)) as engine:
        assert set(kernels_of(engine).values()) == {"flashinfer_trtllm", "trtllm_experts"}
        assert runner_of(engine) == "flashinfer_trtllm_routed"
        found = divergence(engine, expected)
        assert {served.tokens for served in engine.self_checks} == {1, 2, 4, 8, 16, 32, 64}
    with Engine(folder, EngineConfig(**SMALL, linear_kernel="exact")) as engine:
        plain = divergence(engine, expected)
    assert found < 2 * plain + 1e-3, (found, plain)


def test_absurd_scales_destroy_static_output_only(
    modelopt_folder, expected_logits, tmp_path, monkeypatch, on_blackwell
):
    folder = tmp_path / "absurd"
    shutil.copytree(modelopt_folder("qwen3_moe", "nvfp4"), folder)
    tensors = load_file(folder / "model.safetensors")
    shrunk = {name: value / 8 if name.endswith("input_scale") else value for name, value in tensors.items()}
    save_file(shrunk, folder / "model.safetensors")
    found = {}
    for value in ("0", "1", "all"):
        monkeypatch.setenv(PER_TOKEN, value)
        with Engine(folder, EngineConfig(**SMALL)) as engine:
            linear = engine.model.layers[0].attention.qkv.kernel.name
            per_token = "flashinfer_cute_dsl" if on_blackwell.flashinfer.row_alpha else "exact"
            assert linear == (per_token if value == "all" else "flashinfer_trtllm")
            found[value] = divergence(engine, expected_logits("qwen3_moe", "nvfp4"))
    assert found["0"] > 5 * found["all"]
    assert found["0"] > found["1"] > found["all"]


@pytest.mark.parametrize(
    ("environ", "kernel"),
    [
        ({BACKEND: "cutlass"}, "flashinfer_cutlass"),
        ({UPSTREAM_BACKEND: "flashinfer_cudnn"}, "flashinfer_cudnn"),
        ({BACKEND: "flashinfer_trtllm", UPSTREAM_BACKEND: "trtllm"}, "flashinfer_trtllm"),
        ({BACKEND: "AUTO"}, "flashinfer_auto"),
    ],
    ids=["ours", "upstream", "both", "auto"],
)
def test_the_backend_toggle(environ, kernel, modelopt_folder, monkeypatch):
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with Engine(modelopt_folder("qwen3", "nvfp4"), EngineConfig(**SMALL, linear_kernel="exact")) as engine:
        assert set(kernels_of(engine).values()) == {kernel}


def test_the_backend_toggle_is_for_quantized_nvfp4_only(modelopt_folder, monkeypatch):
    monkeypatch.setenv(BACKEND, "cutlass")
    with Engine(modelopt_folder("qwen3", "fp8"), EngineConfig(**SMALL, linear_kernel="exact")) as engine:
        assert set(kernels_of(engine).values()) == {"exact"}


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({BACKEND: "marlin"}, ["'marlin'", "cute-dsl", "flashinfer_trtllm"]),
        ({BACKEND: "trtllm", UPSTREAM_BACKEND: "cutlass"}, ["contradict"]),
        ({BACKEND: "trtllm", "ROLLMILL_LINEAR_KERNEL": "exact"}, ["both name kernels"]),
    ],
    ids=["unknown", "contradiction", "two_toggles"],
)
def test_bad_backends(environ, words):
    with pytest.raises(ConfigError) as error:
        read_toggles(environ)
    assert all(word in str(error.value) for word in words)


def test_a_backend_by_name_that_cannot_scale_tokens_is_refused(modelopt_folder, monkeypatch):
    monkeypatch.setenv(BACKEND, "trtllm")
    monkeypatch.setenv(PER_TOKEN, "all")
    with pytest.raises(UnsupportedError, match="one alpha for all tokens"):
        Engine(modelopt_folder("qwen3", "nvfp4"), EngineConfig(**SMALL))


@pytest.mark.parametrize(
    ("name", "value"), [(EXACT_DIVISION, "0"), (FOUR_OVER_SIX, "1")], ids=["fast_math", "four_over_six"]
)
def test_another_recipe_in_the_environment_is_refused(name, value, modelopt_folder, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=name):
        Engine(modelopt_folder("qwen3", "nvfp4"), EngineConfig(**SMALL))


def test_exact_division_is_asked_for(modelopt_folder, monkeypatch):
    with Engine(modelopt_folder("qwen3", "nvfp4"), EngineConfig(**SMALL)):
        assert os.environ[EXACT_DIVISION] == "1"


@pytest.mark.parametrize("runner", ["flashinfer_trtllm_routed", "flashinfer_trtllm"])
def test_routed_experts_are_the_routers(runner, modelopt_folder):
    """Rows have top_k distinct ids, equal to the router run again over the whole sequence; unknown ones are -1."""
    config = EngineConfig(**SMALL, moe_runner=runner)
    with Engine(modelopt_folder("qwen3_moe", "nvfp4"), config) as engine:
        assert runner_of(engine) == runner
        (out,) = engine.generate([[5, 9, 2, 7, 1]], GREEDY, return_routed_experts=True)
        top_k = engine.model.layers[0].mlp.experts.config.top_k
        assert out.routed_experts.shape == (5 + 6 - 1, 2, top_k)
        assert out.routed_experts.dtype == torch.int16
        assert (out.routed_experts.sort(-1).values.diff(dim=-1) > 0).all()  # distinct
        known = out.routed_experts
        sequence = [5, 9, 2, 7, 1, *out.token_ids[:-1]]
        (again,) = engine.generate(
            [sequence], SamplingParams(temperature=0, max_new_tokens=1), return_routed_experts=True
        )
        agree = (again.routed_experts.sort(-1).values == known.sort(-1).values).all(-1)
        assert agree.float().mean() > 0.9  # sums over keys in another order flip a code now and then
        waiting: list[object] = []
        params = SamplingParams(temperature=0, max_new_tokens=40)
        other = threading.Thread(
            target=lambda: waiting.append(engine.generate([[3, 1, 4]], params, return_routed_experts=True)[0])
        )
        other.start()
        while not engine.info()["requests"]:
            time.sleep(0.001)
        engine.pause("retract")
        engine.abort()
        other.join()
        (aborted,) = waiting
        assert aborted.finish_reason == "abort"
        assert (aborted.routed_experts == -1).all()  # given up with the cache
        engine.resume()


def test_swaps_of_an_engine(modelopt_folder, bf16_weights):
    """BF16 into NVFP4 in kernel layout: a hot swap gives a cold load's bytes at the same addresses."""

    def packed(engine):
        return {
            f"{slot.name}/{key}": tensor.view(torch.uint8).clone()
            for slot in engine.model.slots
            for key, tensor in slot.tensors.items()
        }

    weights = bf16_weights("qwen3_moe")
    with Engine(modelopt_folder("qwen3_moe", "nvfp4"), EngineConfig(**SMALL, activation="per_token")) as engine:
        first, addresses = packed(engine), [t.data_ptr() for s in engine.model.slots for t in s.tensors.values()]
        changed = {name: value * 1.25 for name, value in weights.items()}
        engine.update_weights(changed, version="1")
        hot = packed(engine)
        assert any(not torch.equal(hot[key], first[key]) for key in hot)
        assert [t.data_ptr() for s in engine.model.slots for t in s.tensors.values()] == addresses
        engine.update_weights(weights, version="2")
        again = packed(engine)
        engine.update_weights(weights, version="3")
        assert all(torch.equal(packed(engine)[key], again[key]) for key in again)
    with Engine(modelopt_folder("qwen3_moe", "nvfp4"), EngineConfig(**SMALL, activation="per_token")) as engine:
        engine.update_weights(changed, version="1")
        assert all(torch.equal(packed(engine)[key], hot[key]) for key in hot)


def test_a_kernel_that_computes_wrongly_stops_the_engine_with_the_reason(modelopt_folder, model_library):
    model_library.faults.add("flashinfer::trtllm_fp4_block_scale_moe", "nan")
    with pytest.raises(UnsupportedError, match="no tactic of FlashInfer") as error:
        Engine(modelopt_folder("qwen3_moe", "nvfp4"), EngineConfig(**SMALL))
    assert "not finite" in str(error.value)


@pytest.mark.parametrize("folder", ["flux1-nvfp4", "wan-nvfp4", "wan-nvfp4-swizzled"])
@pytest.mark.parametrize("backend", ["trtllm", "cutlass"])
def test_a_diffusion_transformer(folder, backend):
    """q, k and v split over kernels. BF16 arithmetic is some percent off float32's in a network of random weights; with
    these kernels it is no further off than with exact BF16 products."""
    recorded = load_file(DIT / folder / "io.safetensors")

    def forward(**config):
        with Engine(DIT / folder / "transformer", EngineConfig(**config)) as engine, torch.no_grad():
            inputs = {
                name.removeprefix("in."): value.to(engine.dtype) if value.is_floating_point() else value
                for name, value in recorded.items()
                if name.startswith("in.")
            }
            return engine.transformer(**inputs, return_dict=False)[0].float()

    truth = forward(dtype="float32")
    error, exact = (
        ((forward(linear_kernel=kernel) - truth).norm() / truth.norm()).item()
        for kernel in (f"flashinfer_{backend}", "exact")
    )
    assert error < 1.3 * exact, (error, exact)
