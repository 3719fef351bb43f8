"""The drift meter: what an engine with static scales clips, layer by layer, from one swap to the next."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollmill.engine import Engine, EngineConfig, PoisonedError

QKV, W2 = "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.experts.w2"


@pytest.fixture
def shrunk(modelopt_folder, tmp_path):
    """An export whose input scales are `factor` times what they were."""

    def make(export, factor):
        folder = tmp_path / f"{export}-{factor}"
        shutil.copytree(modelopt_folder("qwen3_moe", export), folder)
        tensors = load_file(folder / "model.safetensors")
        scales = {name: t * factor for name, t in tensors.items() if name.endswith("input_scale")}
        save_file(tensors | scales, folder / "model.safetensors")
        return folder

    return make


@pytest.fixture
def prompts(expected_logits):
    return expected_logits("qwen3_moe", "fp8")["input_ids"].tolist()


def normed_embeddings(tensors, prompts):
    """What enters the first layer's q, k and v: RMS-normed embeddings, in float64."""
    x = tensors["model.embed_tokens.weight"].double()[torch.tensor(prompts)]
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * tensors["model.layers.0.input_layernorm.weight"]


@pytest.mark.parametrize(("export", "code_max"), [("fp8", 448), ("nvfp4", 2688)])
def test_the_first_layer_counts_what_its_scale_clips(export, code_max, shrunk, prompts):
    folder = shrunk(export, 0.25)
    tensors = load_file(folder / "model.safetensors")
    limit = tensors["model.layers.0.self_attn.q_proj.input_scale"].item() * code_max
    expected = (normed_embeddings(tensors, prompts).abs() > limit).double().mean().item()
    with Engine(folder, EngineConfig(dtype="float32")) as engine:
        engine.score(prompts)
        found = engine.info()["clipping"]
    static = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.experts.w13", "mlp.experts.w2")
    assert found.keys() == {f"model.layers.{layer}.{name}" for layer in (0, 1) for name in static}
    assert 0.001 < expected < 0.5
    assert found[QKV] == pytest.approx(expected, abs=1e-12)
    assert all(share > 0 for share in found.values())


@pytest.mark.parametrize("swap", ["staged", "streamed"])
def test_the_report_carries_the_previous_versions(swap, shrunk, prompts, bf16_weights):
    with Engine(shrunk("nvfp4", 0.25), EngineConfig(swap=swap)) as engine:
        assert engine.load_report.clipping == {}
        assert set(engine.info()["clipping"].values()) == {0.0}
        engine.score(prompts)
        before = engine.info()["clipping"]
        assert engine.info()["clipping"] == before  # looking changes nothing
        report = engine.update_weights(bf16_weights("qwen3_moe"), version="1")
        assert report.clipping == before
        assert set(engine.info()["clipping"].values()) == {0.0}
        engine.score(prompts)
        assert engine.info()["clipping"] == before  # the same weights, and scales that were kept
        json.dumps(report.clipping)


def test_counting_goes_on_through_a_swap_that_fails_or_changes_nothing(shrunk, prompts, bf16_weights):
    weights = bf16_weights("qwen3_moe")
    with Engine(shrunk("nvfp4", 0.25)) as engine:
        engine.update_weights(weights, version="1")
        engine.score(prompts)
        before = engine.info()["clipping"]
        with pytest.raises(Exception, match="duplicate|missing|tensor"):
            engine.update_weights(dict(list(weights.items())[:5]), version="2")
        assert engine.info()["clipping"] == before
        assert engine.update_weights(weights, version="1").clipping == {}
        assert engine.info()["clipping"] == before


def test_new_scales_are_counted_against(shrunk, prompts):
    with Engine(shrunk("fp8", 1.0)) as engine:
        engine.score(prompts)
        wide = engine.info()["clipping"]
        engine.update_weights(load_file(shrunk("fp8", 0.25) / "model.safetensors"), version="1")
        engine.score(prompts)
        assert all(share > wide[name] for name, share in engine.info()["clipping"].items())


def test_engines_without_static_scales_count_nothing(modelopt_folder, prompts, bf16_weights):
    for folder, config in (
        (modelopt_folder("qwen3_moe", "nvfp4"), EngineConfig(activation="per_token")),
        (modelopt_folder("qwen3_moe", "bf16"), EngineConfig(quant="fp8")),
        (modelopt_folder("qwen3_moe", "bf16"), EngineConfig()),
    ):
        with Engine(folder, config) as engine:
            engine.score(prompts)
            assert engine.info()["clipping"] == {}
            assert all(slot.meter is None for slot in engine.model.slots)
            assert engine.update_weights(bf16_weights("qwen3_moe"), version="1").clipping == {}


def test_a_poisoned_engine_still_counts_for_its_next_version(shrunk, prompts, bf16_weights):
    weights = bf16_weights("qwen3_moe")
    with Engine(shrunk("nvfp4", 0.25), EngineConfig(swap="streamed")) as engine:
        engine.score(prompts)
        with pytest.raises(Exception, match="missing"):
            engine.update_weights(dict(list(weights.items())[:5]), version="1")
        with pytest.raises(PoisonedError):
            engine.score(prompts)
        assert engine.update_weights(weights, version="2").clipping == {}  # no version served in between
        assert set(engine.info()["clipping"].values()) == {0.0}
