"""What is particular to a family: extra tensors, layouts, dtypes that must stay, configs that are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollmill.engine import Engine, EngineConfig, ShapeError, UnsupportedError
from rollmill.engine.llm.models import FAMILIES

DOCS = Path(__file__).parents[2] / "docs" / "families.md"
CORRECTION = "model.layers.1.mlp.gate.e_score_correction_bias"
STACKED = "model.layers.0.mlp.experts.gate_up_proj"


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def add_tensors(folder, tensors):
    save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("llama", [(2, 16, 16, 16**-0.5, None, None)] * 3),
        ("mistral-window", [(2, 16, 16, 16**-0.5, 5, None)] * 3),
        ("qwen2-window", [(2, 16, 16, 16**-0.5, window, None) for window in (None, 5, 5)]),
        ("gemma2", [(2, 32, 32, 24**-0.5, window, 1.0) for window in (5, None, 5)]),
        ("deepseek_v3", [(4, 24, 16, 24**-0.5 * (0.07 * 1.3862943611 + 1) ** 2, None, None)] * 3),
        ("gpt_oss", [(2, 32, 32, 32**-0.5, window, None) for window in (5, None, 5)]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_attention_specs(family, expected, hf_model, save):
    with Engine(save(hf_model(family))) as engine:
        specs = engine.model.attention_specs
    assert [spec.layer for spec in specs] == [0, 1, 2]
    for spec, (kv_heads, key_dim, value_dim, scale, window, softcap) in zip(specs, expected, strict=True):
        assert (spec.num_kv_heads, spec.key_dim, spec.value_dim) == (kv_heads, key_dim, value_dim)
        assert spec.scale == pytest.approx(scale)
        assert (spec.window, spec.softcap) == (window, softcap)


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize("quant", ["bf16", "nvfp4"])
def test_correction_biases_stay_float32(family, quant, hf_model, save):
    with Engine(save(hf_model(family)), EngineConfig(quant=quant)) as engine:
        bias = torch.linspace(0.1, 0.2, 8)
        engine.update_weights({CORRECTION: bias})
        assert torch.equal(engine.model.layers[1].mlp.correction_bias, bias)
        fine = engine.digest()
        engine.update_weights({CORRECTION: bias.bfloat16()})
        assert engine.digest() != fine


def split_experts(tensors):
    """gpt-oss' stacks as single experts: gate and up are the even and odd columns of [hidden, 2 * inner]."""
    single = {}
    for name, tensor in tensors.items():
        prefix, _, stack = name.rpartition(".")
        if ".experts." not in name:
            single[name] = tensor
            continue
        kind = "bias" if stack.endswith("_bias") else "weight"
        for expert, value in enumerate(tensor):
            rows = value if kind == "bias" else value.T
            parts = {"down_proj": rows}
            if stack.startswith("gate_up"):
                parts = {"gate_proj": rows[0::2], "up_proj": rows[1::2]}
            single |= {f"{prefix}.{expert}.{part}.{kind}": v.contiguous() for part, v in parts.items()}
    return single


@pytest.mark.parametrize("quant", ["bf16", "fp8", "nvfp4"])
def test_gpt_oss_stacks_equal_single_experts(quant, hf_model, save):
    config, target = EngineConfig(quant=quant), hf_model("gpt_oss", seed=1)
    with Engine(save(hf_model("gpt_oss")), config) as engine, Engine(save(target, "target"), config) as expected:
        engine.update_weights(split_experts(target.state_dict()))
        assert engine.digest() == expected.digest()
        for slot, other in zip(engine.model.slots, expected.model.slots, strict=True):
            assert all(torch.equal(t, other.tensors[k]) for k, t in slot.tensors.items())


def test_gpt_oss_stacks_in_the_usual_layout_are_refused(hf_model, save):
    model = hf_model("gpt_oss")
    with Engine(save(model)) as engine:
        before, stack = engine.digest(), model.state_dict()[STACKED]
        with pytest.raises(ShapeError, match="expected 192 rows"):
            engine.update_weights({STACKED: stack.mT.contiguous()})
        assert engine.digest() == before


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
def test_layers_that_predict_further_tokens_are_left_out(family, hf_model, save):
    folder = save(hf_model(family))
    with Engine(folder) as engine:
        digest = engine.digest()
    add_tensors(folder, {"model.layers.3.eh_proj.weight": torch.ones(64, 128)})
    with Engine(folder) as engine:
        assert engine.digest() == digest
        assert any("1 tensors ignored: layers that predict" in warning for warning in engine.info()["warnings"])


def test_modelopts_kv_scales_of_latent_attention_are_left_out(hf_model, save):
    """ModelOpt names scales after modules that latent attention does not have."""
    folder = save(hf_model("deepseek_v3"))
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": quantization}))
    scales = [f"model.layers.{i}.self_attn.{x}_proj.{x}_scale" for i in range(3) for x in "kv"]
    add_tensors(folder, {name: torch.tensor(0.01) for name in scales})
    with Engine(folder) as engine:
        assert engine.info()["quant"] == ["bf16", "fp8"]
        assert any("6 tensors ignored: latent attention" in warning for warning in engine.info()["warnings"])


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    [
        ("olmoe", {"clip_qkv": 8.0}, ["clip_qkv 8.0", "null"]),
        ("llama", {"hidden_act": "relu"}, ["hidden_act 'relu'", "silu", "gelu_pytorch_tanh"]),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, ["dynamic", "yarn"]),
        ("gemma2", {"use_bidirectional_attention": True}, ["bidirectional", "causal"]),
        ("gemma3", {"attn_logit_softcapping": 50.0}, ["attn_logit_softcapping", "null"]),
        ("qwen3", {"layer_types": ["chunked_attention"] * 3}, ["chunked_attention", "sliding_attention"]),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, ["mxfp4", "BF16 checkpoint"]),
    ],
    ids=["clip", "activation", "rope", "bidirectional", "softcap", "layer_types", "mxfp4"],
)
def test_what_is_not_computed_is_refused(family, changes, words, hf_model, save):
    folder = save(hf_model(family))
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedError) as error:
        Engine(folder)
    for word in words:
        assert word in str(error.value)


def test_the_docs_list_every_architecture():
    listed = set(re.findall(r"`(\w+ForCausalLM)`", DOCS.read_text()))
    assert listed == {name for family in FAMILIES for name in family.ARCHITECTURES}
