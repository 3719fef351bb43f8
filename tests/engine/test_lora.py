"""Adapters seen from outside: an engine with one merged in, against an engine opened on merged weights."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollmill.engine import ClosedError, ConfigError, Engine, EngineConfig, SamplingParams

PROMPT = [[3, 14, 15, 92]]
ALPHA, RANK = 8, 4
MODULES = {
    "qwen3": ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj", "model.layers.2.mlp.up_proj"],
    "qwen3_moe": [
        "model.layers.0.self_attn.v_proj",
        "model.layers.0.mlp.experts.3.gate_proj",
        "model.layers.2.mlp.experts.7.down_proj",
        "model.layers.1.mlp.down_proj",
    ],
}


@pytest.fixture(params=MODULES)
def family(request):
    return request.param


@pytest.fixture
def folder(hf_model, save, family):
    return save(hf_model(family))


def make_adapter(folder, modules):
    generator = torch.Generator().manual_seed(1)
    weights, adapter = load_file(folder / "model.safetensors"), {}
    for module in modules:
        rows, cols = weights[f"{module}.weight"].shape
        for side, shape in {"A": (RANK, cols), "B": (rows, RANK)}.items():
            name = f"base_model.model.{module}.lora_{side}.weight"
            adapter[name] = torch.randn(shape, generator=generator) * 0.2
    return adapter


def save_merged(folder, target, modules, adapter):
    """A BF16 folder with the adapter merged in, apart from the engine: float32, rounded once."""
    shutil.copytree(folder, target)
    weights = load_file(folder / "model.safetensors")
    for module in modules:
        a, b = (adapter[f"base_model.model.{module}.lora_{side}.weight"] for side in "AB")
        weights[f"{module}.weight"] = (weights[f"{module}.weight"].float() + ALPHA / RANK * (b @ a)).bfloat16()
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    return target


def observe(engine):
    outs = engine.generate(PROMPT, SamplingParams(n=2, max_new_tokens=6, seed=4))
    return engine.digest(), [out.token_ids for out in outs], engine.logits(PROMPT)[0].tolist()


@pytest.mark.parametrize("quant", ["bf16", "fp8", "nvfp4"])
def test_an_adapter_equals_an_engine_opened_on_merged_weights(quant, family, folder, tmp_path):
    adapter = make_adapter(folder, MODULES[family])
    with Engine(save_merged(folder, tmp_path / "merged", MODULES[family], adapter), EngineConfig(quant=quant)) as other:
        expected = observe(other)
    with Engine(folder, EngineConfig(quant=quant, master="host")) as engine:
        base = observe(engine)
        assert engine.info()["master_bytes"] == sum(
            t.nbytes for t in load_file(folder / "model.safetensors").values() if t.is_floating_point()
        )
        assert engine.update_lora(adapter, alpha=ALPHA, rank=RANK, version="1").version == "1"
        assert observe(engine) == expected != base
        errors = engine.quantization_error()
        assert bool(errors) == (quant != "bf16")
        assert all(0 < error < 0.15 for error in errors.values())
        assert engine.remove_lora(version="2").digest == base[0]
        assert observe(engine) == base
        assert engine.weight_version == "2"


@pytest.mark.parametrize("family", ["qwen3"], indirect=True)
def test_a_folder_as_peft_saves_it(folder, family, tmp_path):
    adapter = make_adapter(folder, MODULES[family])
    peft = tmp_path / "adapter"
    peft.mkdir()
    save_file(adapter, peft / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj"], "bias": "none"}
    (peft / "adapter_config.json").write_text(json.dumps(settings))
    with Engine(folder, EngineConfig(quant="nvfp4", master="host")) as engine:
        digest = engine.update_lora(peft, version="1").digest
        engine.remove_lora()
        assert engine.update_lora(adapter, ALPHA, RANK).digest == digest


@pytest.mark.parametrize("family", ["qwen3"], indirect=True)
def test_engines_that_take_no_adapter(folder):
    with pytest.raises(ConfigError, match=r"EngineConfig\.master"):
        EngineConfig(master="disk")
    with Engine(folder) as engine:
        assert engine.info()["master_bytes"] == 0
        with pytest.raises(ConfigError, match="master='host'"):
            engine.update_lora({}, 1.0, 1)
    for call in (lambda: engine.update_lora({}, 1.0, 1), engine.remove_lora, engine.quantization_error):
        with pytest.raises(ClosedError):
            call()
