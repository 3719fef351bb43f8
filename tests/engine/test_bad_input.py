"""Bad input gets one paragraph that says what was wrong and what is possible; nothing is lost."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path

import pytest
import torch

from rollmill.engine import (
    ClosedError,
    ConfigError,
    Engine,
    EngineConfig,
    ModelError,
    QuantSpec,
    RequestError,
    RollmillError,
    SamplingParams,
    UnsupportedError,
)


@pytest.fixture
def folder(hf_model, save):
    return save(hf_model("mixtral"))


@pytest.fixture
def dit_folder():
    return Path(__file__).parents[1] / "data" / "dit" / "flux1-bf16"


def check_message(error, *words):
    message = str(error.value)
    assert isinstance(error.value, RollmillError)
    assert len(message) < 600
    for word in words:
        assert word in message, message


def test_a_path_that_is_no_model(tmp_path):
    for path in (tmp_path, tmp_path / "nothing", "just-a-word"):
        with pytest.raises(ModelError) as error:
            Engine(path)
        check_message(error, str(path), "Hugging Face layout")


def test_a_hub_id_that_cannot_be_had(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as error:
        Engine("nobody/nothing")
    check_message(error, "nobody/nothing", "hub")


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no \\*.safetensors"):
        Engine(folder)


def test_a_torn_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ModelError, match="model.safetensors"):
        Engine(folder)


def test_a_torn_config(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json is no valid JSON"):
        Engine(folder)


def test_an_index_that_names_a_missing_file(hf_model, save):
    folder = save(hf_model("qwen3"), max_shard_size="60KB")
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(ModelError, match="model-00002"):
        Engine(folder)


def test_an_unsupported_architecture(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertModel"]}))
    with pytest.raises(UnsupportedError) as error:
        Engine(folder)
    check_message(error, "BertModel", "MixtralForCausalLM", "Qwen3MoeForCausalLM")


def test_an_unknown_config_field():
    with pytest.raises(ConfigError) as error:
        EngineConfig(quantization="fp8")
    check_message(error, "quantization", "quant", "activation", "keep")


@pytest.mark.parametrize(
    ("field", "value"),
    [("quant", "int4"), ("activation", "sometimes"), ("dtype", "fp32"), ("swap", "live"), ("tp", "two"), ("keep", 3)],
)
def test_a_wrong_config_value(field, value):
    with pytest.raises(ConfigError) as error:
        EngineConfig(**{field: value})
    check_message(error, field, repr(value))


@pytest.mark.parametrize(
    "values",
    [
        {"n": 0},
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"stop": [""]},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"allowed_token_ids": []},
        {"temperature": "hot"},
        {"logprobs": "all"},
        {"stop": 1.5},
    ],
    ids=str,
)
def test_wrong_sampling_parameters(values):
    with pytest.raises(ConfigError) as error:
        SamplingParams(**values)
    check_message(error, next(iter(values)))


@pytest.mark.parametrize(("field", "value"), [("tp", 2), ("ep", 4)])
def test_parallelism_that_is_not_built(folder, field, value):
    with pytest.raises(UnsupportedError) as error:
        Engine(folder, EngineConfig(**{field: value}))
    check_message(error, f"{field}={value}")


@pytest.mark.parametrize("field", ["linear_kernel", "moe_runner"])
def test_an_unknown_kernel(folder, field):
    with pytest.raises(UnsupportedError) as error:
        Engine(folder, EngineConfig(quant="nvfp4", **{field: "warp9"}))
    check_message(error, "warp9", "known: auto")


def test_an_impossible_kernel(folder):
    with pytest.raises(UnsupportedError) as error:
        Engine(folder, EngineConfig(quant="nvfp4", linear_kernel="torch_fp8"))
    check_message(error, "torch_fp8: computes FP8 only")


def test_an_impossible_shape(folder):
    """w2 of a 96-wide expert splits into groups of 16; of a 40-wide one it does not."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
    with pytest.raises(UnsupportedError, match="multiple of 16"):
        Engine(folder, EngineConfig(quant="nvfp4"))


def test_a_config_that_contradicts_the_weights(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(RollmillError) as error:
        Engine(folder)
    check_message(error, "missing", "model.layers.3.")


def test_a_gpu_that_is_not_there(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="sees no GPU"):
        Engine(folder, EngineConfig(device="cuda"))


def test_requantizing_a_quantized_checkpoint_is_refused(modelopt_folder):
    with pytest.raises(UnsupportedError) as error:
        Engine(modelopt_folder("qwen3", "fp8"), EngineConfig(quant="nvfp4"))
    check_message(error, "the checkpoint stores fp8", "BF16 checkpoint")


@pytest.mark.parametrize("given", [{"max_denoise_batch": 4}, {"dual": "bf16", "base": "pipeline"}], ids=str)
def test_settings_of_diffusion_transformers_are_refused(folder, given):
    with pytest.raises(UnsupportedError) as error:
        Engine(folder, EngineConfig(**given))
    check_message(error, *(f"{name}={value!r}" for name, value in given.items()), "for diffusion transformers")


@pytest.mark.parametrize("given", [{"kv_cache_dtype": "fp8"}, {"overlap": False, "max_batch_size": 4}], ids=str)
def test_settings_of_language_models_are_refused(dit_folder, given):
    with pytest.raises(UnsupportedError) as error:
        Engine(dit_folder, EngineConfig(**given))
    check_message(error, *(f"{name}={value!r}" for name, value in given.items()), "for language models")


def test_partly_kept_shards_are_refused(folder):
    with pytest.raises(ConfigError) as error:
        Engine(folder, EngineConfig(quant="fp8", keep=["*.q_proj"]))
    check_message(error, "q_proj: bf16", "k_proj: fp8")


def test_static_scales_that_are_not_there(folder):
    with pytest.raises(UnsupportedError) as error:
        Engine(folder, EngineConfig(quant="nvfp4", activation="static"))
    check_message(error, "input_scale", "model.layers.0.self_attn.q_proj", "per_token")


@pytest.mark.parametrize(
    ("prompts", "words"),
    [
        ([], ["empty batch"]),
        ([[]], ["empty"]),
        ([[1, 2], []], ["prompt 1 is empty"]),
        ([[1] * 64], ["64 tokens", "context is 64", "63"]),
        ([[1, 200]], ["token id 200", "0..199"]),
        ([[-1]], ["token id -1"]),
        ("hello", ["no tokenizer", "token ids"]),
        ([[1.5]], ["list of token ids"]),
        ([None], ["NoneType"]),
        (7, ["int"]),
    ],
    ids=str,
)
def test_bad_prompts(folder, prompts, words):
    with Engine(folder) as engine:
        with pytest.raises(RequestError) as error:
            engine.generate(prompts)
        check_message(error, *words)
        assert engine.generate([[1, 2]], SamplingParams(max_new_tokens=2))[0].finish_reason == "length"


def test_a_wrong_source(folder):
    with Engine(folder) as engine:
        with pytest.raises(ConfigError, match="cannot take weights from int"):
            engine.update_weights(7)
        with pytest.raises(ModelError, match="does not exist"):
            engine.update_weights("no/such/folder")
        assert engine.weight_version == "initial"


def test_a_closed_engine_frees_its_weights(folder):
    engine = Engine(folder)
    weight = weakref.ref(engine.model.slots[0].tensors["weight"])
    engine.close()
    gc.collect()
    assert weight() is None
    for call in (engine.info, engine.digest):
        with pytest.raises(ClosedError):
            call()


def test_a_closed_engine(folder):
    engine = Engine(folder)
    engine.close()
    engine.close()
    for call in (lambda: engine.generate([[1]]), lambda: engine.update_weights({}), lambda: engine.weight_session()):
        with pytest.raises(ClosedError):
            call()


def test_quant_spec_by_pattern(folder):
    spec = QuantSpec(quant="nvfp4", layers={"*.self_attn.*": "fp8", "model.layers.1.*": "bf16"})
    with Engine(folder, EngineConfig(quant=spec)) as engine:
        schemes = {slot.name: slot.scheme.name for slot in engine.model.slots}
    assert schemes["model.layers.0.self_attn.qkv_proj"] == "fp8"
    assert schemes["model.layers.1.self_attn.qkv_proj"] == "fp8"
    assert schemes["model.layers.0.block_sparse_moe.experts.w13"] == "nvfp4"
    assert schemes["model.layers.1.block_sparse_moe.experts.w2"] == "bf16"
