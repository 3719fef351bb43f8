"""Adapters in diffusers' and PEFT's names, merged into the kept BF16 weights and requantized."""

from __future__ import annotations

import json

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from rollmill.engine import ConfigError, CoverageError, ShapeError, UnsupportedError

ALPHA, RANK = 8.0, 4
MODULES = {
    "flux1": [
        "transformer_blocks.0.attn.to_q",
        "transformer_blocks.0.attn.add_v_proj",
        "transformer_blocks.0.norm1.linear",
        "single_transformer_blocks.1.proj_out",
        "x_embedder",
    ],
    "wan": [
        "blocks.0.attn1.to_v",
        "blocks.1.attn2.to_k",
        "blocks.1.ffn.net.2",
        "condition_embedder.time_embedder.linear_1",
    ],
}
PREFIXES = {
    "diffusers": "transformer.",
    "bare": "",
    "peft": "base_model.model.",
    "peft-of-a-pipeline": "base_model.model.transformer.",
}


@pytest.fixture
def adapter(weights_of, model):
    """module -> (A [rank, in], B [out, rank])"""
    generator = torch.Generator().manual_seed(1)
    weights = weights_of(model)
    pairs = {}
    for module in MODULES[model]:
        rows, cols = weights[f"{module}.weight"].shape
        pairs[module] = tuple(torch.randn(shape, generator=generator) * 0.2 for shape in ((RANK, cols), (rows, RANK)))
    return pairs


def named(adapter, prefix="transformer."):
    return {
        f"{prefix}{module}.lora_{side}.weight": value
        for module, pair in adapter.items()
        for side, value in zip("AB", pair, strict=True)
    }


def merged(weights, adapter):
    """Apart from the engine: float32, rounded once to the dtype of the weight."""
    out = dict(weights)
    for module, (a, b) in adapter.items():
        weight = weights[f"{module}.weight"]
        out[f"{module}.weight"] = (weight.float() + ALPHA / RANK * (b @ a)).to(weight.dtype)
    return out


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
def test_in_and_out_returns_the_base_bytes(prefix, model, quant, dit, open_engine, adapter, snapshot, forward):
    engine = open_engine(dit(model), quant=quant, master="host")
    base, output, digest = snapshot(engine), forward(engine, model), engine.digest()
    report = engine.update_lora(named(adapter, prefix), alpha=ALPHA, rank=RANK, version="1")
    assert report.digest == engine.digest() != digest
    assert snapshot(engine).keys() == base.keys()
    assert not torch.equal(forward(engine, model), output)
    assert engine.remove_lora(version="2").digest == digest
    assert snapshot(engine) == base
    assert torch.equal(forward(engine, model), output)
    assert engine.weight_version == "2"


@pytest.mark.parametrize("kernel", ["reference", "exact"])
def test_merged_equals_a_cold_load_of_merged_weights(
    kernel, model, quant, dit, open_engine, save, adapter, weights_of, snapshot, forward
):
    settings = {"quant": quant, "linear_kernel": kernel}
    cold = open_engine(save(model, merged(weights_of(model), adapter)), **settings)
    hot = open_engine(dit(model), master="host", **settings)
    assert hot.update_lora(named(adapter), alpha=ALPHA, rank=RANK).digest == cold.digest()
    assert snapshot(hot) == snapshot(cold)
    assert torch.equal(forward(hot, model), forward(cold, model))


def test_an_adapter_follows_its_successor(model, dit, open_engine, adapter):
    engine = open_engine(dit(model), quant="nvfp4", master="host")
    first, *rest = adapter.items()
    engine.update_lora(named(dict([first])), alpha=ALPHA, rank=RANK)
    both = engine.update_lora(named(dict(rest)), alpha=ALPHA, rank=RANK).digest
    fresh = open_engine(dit(model), quant="nvfp4", master="host")
    assert fresh.update_lora(named(dict(rest)), alpha=ALPHA, rank=RANK).digest == both


def test_a_folder_as_peft_saves_it(model, quant, dit, open_engine, adapter, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    save_file(named(adapter, "base_model.model."), folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["to_q"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    engine = open_engine(dit(model), quant=quant, master="host")
    digest = engine.update_lora(folder, version="1").digest
    assert engine.update_lora(named(adapter), alpha=ALPHA, rank=RANK, version="2").digest == digest


def test_an_adapter_on_weights_that_came_by_a_swap(model, quant, dit, open_engine, save, adapter, other_weights):
    """A quantized checkpoint has no master; BF16 weights that a trainer sends become it."""
    engine = open_engine(dit(model, quant), master="host", activation="per_token")
    engine.update_weights(other_weights(model), version="1")
    digest = engine.update_lora(named(adapter), alpha=ALPHA, rank=RANK, version="2").digest
    cold = open_engine(save(model, merged(other_weights(model), adapter)), quant=quant)
    assert digest == cold.digest()


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda pairs: pairs | {"transformer.ghost.lora_A.weight": torch.zeros(RANK, 8)}, CoverageError, "ghost"),
        (lambda pairs: dict(list(pairs.items())[1:]), CoverageError, "missing"),
        (
            lambda pairs: {name: value[:, :-1] if "lora_A" in name else value for name, value in pairs.items()},
            ShapeError,
            "expected shape",
        ),
        (
            lambda pairs: {name.replace("transformer.", "text_encoder.", 1): value for name, value in pairs.items()},
            CoverageError,
            "text_encoder",
        ),
    ],
    ids=["unknown", "half", "misshaped", "of-another-component"],
)
def test_a_bad_adapter_changes_nothing(change, error, says, model, dit, open_engine, adapter, unchanged):
    engine = open_engine(dit(model), quant="nvfp4", master="host")
    check = unchanged(engine, model)
    with pytest.raises(error, match=says):
        engine.update_lora(change(named(adapter)), alpha=ALPHA, rank=RANK, version="1")
    check()


def test_without_a_master(dit, open_engine, adapter, model):
    engine = open_engine(dit(model), quant="fp8")
    with pytest.raises(ConfigError, match="master='host'"):
        engine.update_lora(named(adapter), alpha=ALPHA, rank=RANK)


@pytest.mark.parametrize("place", ["folder", "file"])
def test_a_file_as_diffusers_saves_it(place, model, dit, open_engine, adapter, tmp_path):
    pipeline = getattr(diffusers, {"flux1": "FluxPipeline", "wan": "WanPipeline"}[model])
    config = {"r": RANK, "lora_alpha": ALPHA, "peft_type": "LORA", "bias": "none", "target_modules": ["to_q"]}
    layers = {name: value.contiguous() for name, value in named(adapter, "").items()}
    pipeline.save_lora_weights(tmp_path, layers, transformer_lora_adapter_metadata=config)
    source = tmp_path if place == "folder" else tmp_path / "pytorch_lora_weights.safetensors"
    engine = open_engine(dit(model), quant="nvfp4", master="host")
    digest = engine.update_lora(source, version="1").digest
    assert engine.update_lora(named(adapter), alpha=ALPHA, rank=RANK, version="2").digest == digest


@pytest.mark.parametrize(
    ("config", "error", "says"),
    [
        (None, ConfigError, "rank"),
        ({"transformer.r": RANK, "transformer.use_dora": True}, UnsupportedError, "DoRA"),
        ({"transformer.r": RANK, "text_encoder.r": RANK}, UnsupportedError, "one component"),
    ],
)
def test_a_file_without_a_config_or_with_another_one(config, error, says, model, dit, open_engine, adapter, tmp_path):
    metadata = None if config is None else {"lora_adapter_metadata": json.dumps(config)}
    save_file(named(adapter), tmp_path / "pytorch_lora_weights.safetensors", metadata)
    engine = open_engine(dit(model), quant="nvfp4", master="host")
    with pytest.raises(error, match=says):
        engine.update_lora(tmp_path, version="1")
    if config is None:
        assert engine.update_lora(tmp_path, alpha=ALPHA, rank=RANK, version="1").version == "1"
