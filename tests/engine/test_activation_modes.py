"""Static, per-token and forced per-token activations: what the checkpoint, the config and the toggle decide."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollmill.engine import ConfigError, Engine, EngineConfig, UnsupportedError
from rollmill.engine.env import TOGGLES, read_toggle_rows, read_toggles
from rollmill.engine.schemes import merge_plans
from rollmill.quant import QuantPlan

TOGGLE = "ROLLMILL_NVFP4_PER_TOKEN_ACTIVATION"
UPSTREAM = "SGLANG_FLASHINFER_NVFP4_PER_TOKEN_ACTIVATION"


@pytest.fixture
def edited(modelopt_folder, tmp_path):
    """A copy of an export whose tensors went through `edit(tensors)`."""

    def make(export, edit):
        folder = tmp_path / export
        shutil.copytree(modelopt_folder("qwen3_moe", export), folder)
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")
        return folder

    return make


def modes(engine):
    return {slot.name: slot.scheme.activation for slot in engine.model.slots if slot.scheme.name != "bf16"}


def test_the_checkpoints_scales_are_taken(modelopt_folder):
    with Engine(modelopt_folder("qwen3_moe", "nvfp4")) as engine:
        assert set(modes(engine).values()) == {"static"}
        assert not engine.info()["warnings"]


def test_a_layer_without_input_scale_goes_per_token_and_is_listed(edited):
    def drop(tensors):
        del tensors["model.layers.1.mlp.experts.3.up_proj.input_scale"]
        del tensors["model.layers.0.self_attn.o_proj.input_scale"]

    folder = edited("nvfp4", drop)
    with Engine(folder) as engine:
        found = modes(engine)
        assert found["model.layers.1.mlp.experts.w13"] == found["model.layers.0.self_attn.o_proj"] == "per_token"
        assert found["model.layers.0.mlp.experts.w13"] == "static"
        assert any("model.layers.1.mlp.experts.3.up_proj" in warning for warning in engine.info()["warnings"])
    with pytest.raises(UnsupportedError) as error:
        Engine(folder, EngineConfig(activation="static"))
    assert "model.layers.0.self_attn.o_proj" in str(error.value)


@pytest.mark.parametrize("export", ["fp8", "nvfp4"])
def test_per_token_by_config_ignores_the_scales_loudly(export, modelopt_folder):
    with Engine(modelopt_folder("qwen3_moe", export), EngineConfig(activation="per_token")) as engine:
        assert set(modes(engine).values()) == {"per_token"}
        assert any("ignored" in w for w in engine.info()["warnings"])
        assert all("input_scale" not in slot.tensors for slot in engine.model.slots)


@pytest.mark.parametrize(
    ("value", "linears", "experts"),
    [
        ("1", "static", "per_token"),
        ("moe", "static", "per_token"),
        ("all", "per_token", "per_token"),
        ("0", "static", "static"),
    ],
)
@pytest.mark.parametrize("name", [TOGGLE, UPSTREAM])
def test_the_toggle(name, value, linears, experts, modelopt_folder, monkeypatch):
    monkeypatch.setenv(name, value)
    with Engine(modelopt_folder("qwen3_moe", "nvfp4")) as engine:
        found = modes(engine)
    assert found["model.layers.0.self_attn.qkv_proj"] == linears
    assert found["model.layers.0.mlp.experts.w13"] == found["model.layers.0.mlp.experts.w2"] == experts


def test_the_toggle_leaves_fp8_alone(modelopt_folder, monkeypatch):
    monkeypatch.setenv(TOGGLE, "all")
    with Engine(modelopt_folder("qwen3_moe", "fp8")) as engine:
        assert set(modes(engine).values()) == {"static"}


def test_absurd_scales_destroy_static_output_but_not_per_token(edited, expected_logits, monkeypatch):
    """An activation scale 8 times too small clips; online scales do not look at it."""

    def shrink(tensors):
        for name in tensors:
            if name.endswith("input_scale"):
                tensors[name] = tensors[name] / 8

    folder, expected = edited("nvfp4", shrink), expected_logits("qwen3_moe", "nvfp4")
    kl = {}
    for value in ("0", "all"):
        monkeypatch.setenv(TOGGLE, value)
        with Engine(folder, EngineConfig(dtype="float32")) as engine:
            logq = torch.stack(engine.logits(expected["input_ids"].tolist())).log_softmax(-1)
        logp = expected["logits"].log_softmax(-1)
        kl[value] = (logp.exp() * (logp - logq)).sum(-1).mean().item()
    print(kl)
    assert kl["0"] > 5 * kl["all"]


def test_contradictory_names(modelopt_folder, monkeypatch):
    monkeypatch.setenv(TOGGLE, "1")
    monkeypatch.setenv(UPSTREAM, "0")
    with pytest.raises(ConfigError, match="contradict"):
        Engine(modelopt_folder("qwen3_moe", "nvfp4"))


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({TOGGLE: "yes"}, [TOGGLE, "'yes'", "moe"]),
        ({UPSTREAM: "2"}, [UPSTREAM, "'2'"]),
        ({"ROLLMILL_TURBO": "1"}, ["ROLLMILL_TURBO", TOGGLE]),
    ],
    ids=["value", "upstream", "unknown"],
)
def test_bad_toggles(environ, words):
    with pytest.raises(ConfigError) as error:
        read_toggles(environ)
    for word in words:
        assert word in str(error.value)


def test_toggles_override_the_config(modelopt_folder, monkeypatch):
    monkeypatch.setenv("ROLLMILL_LINEAR_KERNEL", "reference")
    with Engine(modelopt_folder("qwen3", "nvfp4"), EngineConfig(linear_kernel="exact")) as engine:
        assert engine.model.layers[0].mlp.down.kernel.name == "reference"


def test_every_toggle_has_a_row():
    rows = read_toggle_rows({TOGGLE: "moe"})
    assert [row[0] for row in rows] == [toggle.name for toggle in TOGGLES]
    assert rows[0][1] == "moe"


def test_mixed_precision_checkpoints(modelopt_folder, tmp_path):
    """Layer by layer: attention as one export stores it, experts as another does, the last layer in BF16."""
    parts = {"fp8": load_file(modelopt_folder("qwen3_moe", "fp8") / "model.safetensors")}
    parts["nvfp4"] = load_file(modelopt_folder("qwen3_moe", "nvfp4") / "model.safetensors")
    parts["bf16"] = load_file(modelopt_folder("qwen3_moe", "bf16") / "model.safetensors")
    layers, tensors = {}, {}
    for name in parts["bf16"]:
        module = name.removesuffix(".weight")
        source = "bf16"
        if module + ".input_scale" in parts["fp8"] and ".layers.0." in name:
            source = "nvfp4" if ".experts." in name else "fp8"
            layers[module] = {"quant_algo": source.upper()}
        tensors |= {k: v for k, v in parts[source].items() if k.startswith(module + ".")}
    config = json.loads((modelopt_folder("qwen3_moe", "fp8") / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": layers,
        "ignore": ["lm_head"],
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    with Engine(tmp_path) as engine:
        found = {slot.name: slot.scheme.name for slot in engine.model.slots}
        digest = engine.digest()
        assert found["model.layers.0.self_attn.qkv_proj"] == "fp8"
        assert found["model.layers.0.mlp.experts.w2"] == "nvfp4"
        assert found["model.layers.1.mlp.experts.w2"] == found["model.layers.1.self_attn.o_proj"] == "bf16"
        engine.update_weights(parts["bf16"])
        assert engine.digest() == digest


def test_a_quantized_checkpoint_says_itself_what_it_keeps():
    stored = QuantPlan("fp8", keep=("*.gate",))
    assert merge_plans(EngineConfig(), stored).quant_of(["lm_head"]) == "fp8"
    assert merge_plans(EngineConfig(keep=["lm_head"]), stored).quant_of(["lm_head"]) == "bf16"
    assert merge_plans(EngineConfig(quant="fp8"), None).quant_of(["lm_head"]) == "bf16"
