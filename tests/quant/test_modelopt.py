"""ModelOpt's configs in every place and form, and exclude patterns over whole dotted names."""

import json

import pytest
import torch
from safetensors import safe_open

from rollmill.quant import ConfigError, ModelError, QuantPlan, UnsupportedError, matches_any, read_quant_plan
from rollmill.quant.modelopt import parse_quant_config

KEEP = ("lm_head", "model.embed_tokens")
FLAT = {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": list(KEEP)}
NESTED = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": list(KEEP)}}
LAYERWISE = {
    "format_version": "1.0",
    "layers": {"blocks.0.to_q": {"format": "nvfp4"}, "blocks.0.ff": {"format": "fp8"}},
}
FP8_KV = {"dynamic": False, "num_bits": 8, "type": "float"}


# where a config is found


def test_no_config_is_no_plan(tmp_path):
    assert read_quant_plan(tmp_path, {"model_type": "llama"}, {"format": "pt"}) is None


def test_config_json_flat(tmp_path):
    assert read_quant_plan(tmp_path, {"quantization_config": FLAT}, {}) == QuantPlan("nvfp4", KEEP)


def test_config_json_nested(tmp_path):
    assert read_quant_plan(tmp_path, {"quantization_config": NESTED}, {}) == QuantPlan("fp8", KEEP)


def test_hf_quant_config_json(tmp_path):
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(NESTED))
    assert read_quant_plan(tmp_path, {}, {}) == QuantPlan("fp8", KEEP)


def test_safetensors_metadata_with_modelopts_config(tmp_path):
    assert read_quant_plan(tmp_path, {}, {"quantization_config": json.dumps(FLAT)}) == QuantPlan("nvfp4", KEEP)


def test_safetensors_metadata_layer_by_layer(tmp_path):
    plan = read_quant_plan(tmp_path, {}, {"_quantization_metadata": json.dumps(LAYERWISE)})
    assert plan is not None
    assert plan.quant_of(["blocks.0.to_q"]) == "nvfp4"
    assert plan.quant_of(["blocks.0.ff"]) == "fp8"
    assert plan.quant_of(["blocks.1.to_q"]) == "bf16"


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        (("config", "file", "metadata", "layerwise"), "nvfp4"),
        (("file", "metadata", "layerwise"), "fp8"),
        (("metadata", "layerwise"), "fp8_channel"),
        (("layerwise",), "bf16"),
    ],
    ids=["config_json_first", "then_hf_quant_config", "then_metadata_config", "then_metadata_layers"],
)
def test_precedence(tmp_path, places, expected):
    config = {"quantization_config": FLAT} if "config" in places else {}
    if "file" in places:
        (tmp_path / "hf_quant_config.json").write_text(json.dumps(NESTED))
    metadata = {}
    if "metadata" in places:
        metadata["quantization_config"] = json.dumps({"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"})
    if "layerwise" in places:
        metadata["_quantization_metadata"] = json.dumps(LAYERWISE)
    plan = read_quant_plan(tmp_path, config, metadata)
    assert plan is not None
    assert plan.quant == expected


@pytest.mark.parametrize("export", ["fp8", "nvfp4", "fp8_kvfp8", "nvfp4_kvfp8"])
@pytest.mark.parametrize("model", ["qwen3", "qwen3_moe"])
def test_modelopts_own_folders_say_the_same_in_both_files(model, export, modelopt_folder):
    folder = modelopt_folder(model, export)
    config = json.loads((folder / "config.json").read_text())
    plan = read_quant_plan(folder, config, {})
    assert plan is not None
    assert plan == read_quant_plan(folder, {}, {})
    assert plan.quant == export.removesuffix("_kvfp8")
    assert plan.kv_cache == ("fp8" if export.endswith("_kvfp8") else None)
    with safe_open(folder / "model.safetensors", "pt") as file:
        dtypes = {name: file.get_tensor(name).dtype for name in file.keys() if name.endswith(".weight")}  # noqa: SIM118
    linears = {n: d for n, d in dtypes.items() if "norm" not in n}
    stored = {"nvfp4": torch.uint8, "fp8": torch.float8_e4m3fn, "bf16": torch.bfloat16}
    assert linears == {name: stored[plan.quant_of([name.removesuffix(".weight")])] for name in linears}


# what a config says


@pytest.mark.parametrize(
    ("algorithm", "quant"),
    [("FP8", "fp8"), ("FP8_PER_CHANNEL_PER_TOKEN", "fp8_channel"), ("NVFP4", "nvfp4"), ("W4A16_NVFP4", "nvfp4_w4a16")],
)
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_every_algorithm(algorithm, quant, nested):
    raw = {"quant_algo": algorithm}
    assert parse_quant_config({"quantization": raw} if nested else raw, "here").quant == quant


@pytest.mark.parametrize("key", ["ignore", "exclude_modules", "modules_to_not_convert"])
def test_every_name_of_the_exclude_list(key):
    assert parse_quant_config({"quant_algo": "FP8", key: ["a.b", "c*"]}, "here").keep == ("a.b", "c*")


@pytest.mark.parametrize(
    "raw",
    [
        {"quant_algo": "INT4_AWQ"},
        {"quant_algo": "W4A8_AWQ", "quant_method": "modelopt"},
        {"quant_algo": "nvfp4"},
        {"quant_algo": None},
        {"quant_method": "modelopt"},
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        {"quant_method": "gptq", "quant_algo": "FP8"},
        {"format_version": "1.0", "layers": {"a": {"format": "int8"}}},
        {"format_version": "1.0", "layers": {"a": {}}},
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "INT8_SQ"}}},
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {}}},
    ],
    ids=lambda raw: json.dumps(raw),
)
def test_unknown_algorithms_are_refused_with_the_known_ones(raw):
    with pytest.raises(UnsupportedError, match=r"config\.json") as error:
        parse_quant_config(raw, "config.json")
    assert any("NVFP4" in reason and "FP8" in reason for reason in error.value.reasons)


@pytest.mark.parametrize(
    "raw",
    [
        {"quant_algo": "NVFP4", "group_size": 32},
        {"quantization": {"quant_algo": "NVFP4", "group_size": 128}},
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "NVFP4", "group_size": 32}}},
        {"quant_algo": "NVFP4", "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": 32}}}},
    ],
    ids=["flat", "nested", "mixed", "config_groups"],
)
def test_a_group_size_other_than_16_is_refused(raw):
    with pytest.raises(UnsupportedError, match="group_size (32|128)"):
        parse_quant_config(raw, "here")


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({}, None),
        ({"kv_cache_quant_algo": None}, None),
        ({"kv_cache_scheme": None}, None),
        ({"kv_cache_scheme": {}}, None),
        ({"kv_cache_quant_algo": "FP8"}, "fp8"),
        ({"kv_cache_scheme": FP8_KV}, "fp8"),
        ({"kv_cache_scheme": FP8_KV, "kv_cache_quant_algo": "FP8"}, "fp8"),
    ],
    ids=["absent", "null_algo", "null_scheme", "empty_scheme", "algo", "scheme", "both"],
)
@pytest.mark.parametrize("algorithm", ["NVFP4", "MIXED_PRECISION"])
def test_kv_cache_schemes(algorithm, extra, expected):
    assert parse_quant_config({"quant_algo": algorithm, **extra}, "here").kv_cache == expected


@pytest.mark.parametrize(
    "extra",
    [
        {"kv_cache_quant_algo": "NVFP4"},
        {"kv_cache_quant_algo": "INT8"},
        {"kv_cache_scheme": {"num_bits": 8, "type": "int"}},
        {"kv_cache_scheme": {"num_bits": 4, "type": "float"}},
        {"kv_cache_scheme": FP8_KV, "kv_cache_quant_algo": "NVFP4"},
    ],
    ids=["nvfp4", "int8", "int8_scheme", "fp4_scheme", "contradiction"],
)
def test_other_kv_caches_are_refused(extra):
    with pytest.raises(UnsupportedError, match="KV cache"):
        parse_quant_config({"quant_algo": "FP8", **extra}, "here")


@pytest.mark.parametrize(
    "content",
    [b"{", b"", b"[]", b"null", b'"NVFP4"', b"\xff\xfe\x00{"],
    ids=["torn", "empty", "list", "null", "string", "no_text"],
)
def test_a_file_that_holds_no_config_is_a_model_error_that_names_it(tmp_path, content):
    (tmp_path / "hf_quant_config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"hf_quant_config\.json"):
        read_quant_plan(tmp_path, {}, {})


@pytest.mark.parametrize("key", ["quantization_config", "_quantization_metadata"])
def test_metadata_that_is_no_json_is_a_model_error_that_names_its_key(tmp_path, key):
    with pytest.raises(ModelError, match=f"safetensors metadata {key}"):
        read_quant_plan(tmp_path, {}, {key: "{torn"})


@pytest.mark.parametrize("value", ["NVFP4", ["NVFP4"]], ids=["string", "list"])
def test_a_quantization_config_that_is_no_object_is_a_model_error(tmp_path, value):
    with pytest.raises(ModelError, match="quantization_config"):
        read_quant_plan(tmp_path, {"quantization_config": value}, {})


@pytest.mark.parametrize(
    "raw",
    [
        {"layers": ["blocks.0"]},
        {"layers": {"blocks.0": "nvfp4"}},
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": ["blocks.0"]},
        {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"blocks.0": "FP8"}},
        {"quant_algo": "FP8", "kv_cache_scheme": "FP8"},
        {"quant_algo": "FP8", "ignore": "lm_head"},
    ],
    ids=["layers_list", "layer_string", "mixed_list", "mixed_string", "kv_string", "ignore_string"],
)
def test_a_misshaped_config_is_an_error_of_ours(raw):
    """A string for a list of names would exclude modules named `l`, `m`, `_` ... and quantize the rest."""
    with pytest.raises((ModelError, ConfigError, UnsupportedError)):
        parse_quant_config(raw, "here")


# which module is what


@pytest.mark.parametrize(
    ("pattern", "module", "expected"),
    [
        ("lm_head", "lm_head", True),
        ("lm_head", "model.lm_head", False),
        ("lm_head", "lm_head.extra", False),
        ("gate", "model.layers.0.mlp.gate", False),
        ("model.layers.0.mlp.gate", "model.layers.0.mlp.gate_proj", False),
        ("model.layers.1", "model.layers.1.mlp", False),
        ("model.layers.1", "model.layers.10", False),
        ("model.layers.1.*", "model.layers.10.mlp.gate", False),
        ("model.layers.1.*", "model.layers.1.mlp.gate", True),
        ("model.layers.1*", "model.layers.10.mlp.gate", True),
        ("*.gate", "model.layers.0.mlp.gate", True),
        ("*.gate", "model.layers.0.mlp.gate_proj", False),
        ("*.gate", "gate", False),
        ("*gate", "gate", True),
        ("*", "anything.at.all", True),
        ("*self_attn*", "model.layers.3.self_attn.q_proj", True),
        ("model.*.mlp.*_proj", "model.layers.0.mlp.up_proj", True),
        ("model.*.mlp.*_proj", "model.layers.0.mlp.up_proj.extra", False),
        ("a.b", "aXb", False),
        ("a+b", "aab", False),
        ("norm_out[0]", "norm_out0", False),
        ("proj_out", "PROJ_OUT", False),
    ],
)
def test_patterns_match_whole_dotted_names(pattern, module, expected):
    assert matches_any(module, (pattern,)) is expected
    assert (QuantPlan("fp8", keep=("first", pattern)).quant_of([module]) == "bf16") is expected


def test_no_patterns_match_nothing():
    assert not matches_any("lm_head", ())


def test_fused_shards_are_quantized_alike():
    qkv = [f"model.layers.0.self_attn.{name}_proj" for name in "qkv"]
    assert QuantPlan("nvfp4", keep=("lm_head",)).quant_of(qkv) == "nvfp4"
    assert QuantPlan("nvfp4", keep=("*.self_attn.*",)).quant_of(qkv) == "bf16"


@pytest.mark.parametrize(
    "plan",
    [
        QuantPlan("fp8", keep=("*.up_proj",)),
        QuantPlan("bf16", layers={"mlp.gate_proj": "fp8"}),
        QuantPlan("bf16", layers={"mlp.gate_proj": "fp8", "mlp.up_proj": "nvfp4"}),
        QuantPlan("fp8", patterns=(("*.up_proj", "nvfp4"),)),
    ],
    ids=["one_excluded", "one_listed", "two_formats", "one_by_pattern"],
)
def test_fused_shards_that_differ_are_an_error_that_names_them(plan):
    with pytest.raises(ConfigError, match=r"mlp\.gate_proj: .*mlp\.up_proj: "):
        plan.quant_of(["mlp.gate_proj", "mlp.up_proj"])


def test_mixed_precision_names_layers_one_by_one():
    raw = {
        "quant_algo": "MIXED_PRECISION",
        "exclude_modules": ["lm_head"],
        "quantized_layers": {
            "model.layers.0.mlp.down_proj": {"quant_algo": "NVFP4", "group_size": 16},
            "model.layers.1.mlp.down_proj": {"quant_algo": "FP8"},
            "lm_head": {"quant_algo": "FP8"},
        },
    }
    plan = parse_quant_config(raw, "here")
    assert plan.quant_of(["model.layers.0.mlp.down_proj"]) == "nvfp4"
    assert plan.quant_of(["model.layers.1.mlp.down_proj"]) == "fp8"
    assert plan.quant_of(["model.layers.2.mlp.down_proj"]) == "bf16"
    assert plan.quant_of(["lm_head"]) == "bf16"


def test_keep_comes_before_layers_before_patterns_before_the_rest():
    plan = QuantPlan(
        "fp8",
        keep=("a", "b.kept"),
        layers={"a": "nvfp4", "b.named": "nvfp4_w4a16"},
        patterns=(("b.*", "nvfp4"), ("b.last", "fp8_channel")),
    )
    found = {module: plan.quant_of([module]) for module in ("a", "b.kept", "b.named", "b.last", "c")}
    assert found == {"a": "bf16", "b.kept": "bf16", "b.named": "nvfp4_w4a16", "b.last": "nvfp4", "c": "fp8"}


def test_unused_patterns_are_those_that_match_no_module():
    plan = QuantPlan("fp8", keep=("lm_head", "*.gate", "gate", "model.layers.9.*"))
    assert plan.unused_patterns(["lm_head", "model.layers.0.mlp.gate"]) == ["gate", "model.layers.9.*"]
