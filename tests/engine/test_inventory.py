"""An inventory tells what the files hold, from headers alone."""

from __future__ import annotations

import json
import resource
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollmill.engine import ModelError, inspect_checkpoint

MODELS = ["qwen3", "qwen3_moe"]
EXPORTS = ["bf16", "fp8", "nvfp4", "fp8_kvfp8", "nvfp4_kvfp8"]


@pytest.mark.parametrize("export", EXPORTS)
@pytest.mark.parametrize("model", MODELS)
def test_every_tensor_is_accounted_for(model, export, modelopt_folder):
    """Shapes and bytes against the loaded tensors; schemes against the export's name."""
    folder = modelopt_folder(model, export)
    tensors, found = load_file(folder / "model.safetensors"), inspect_checkpoint(folder)
    listed = {f"{m.name}.{key}": (t.shape, t.bytes) for m in found.modules for key, t in m.tensors.items()}
    assert listed == {name: (tuple(t.shape), t.nbytes) for name, t in tensors.items()}
    assert found.bytes == sum(t.nbytes for t in tensors.values())
    quant = export.removesuffix("_kvfp8")
    linears = {n.removesuffix(".weight") for n in tensors if n.endswith("_proj.weight")}
    assert {m.name for m in found.modules if m.scheme == quant} >= linears
    assert {m.scheme for m in found.modules} == {quant, "bf16"}
    assert found.kv_cache == ("fp8" if export.endswith("_kvfp8") else None)
    assert found.warnings == []


@pytest.mark.parametrize("model", MODELS)
def test_weights_are_counted_alike_in_every_format(model, modelopt_folder):
    """Two NVFP4 codes lie in a byte."""
    counts = {inspect_checkpoint(modelopt_folder(model, export)).weights for export in EXPORTS}
    bf16 = load_file(modelopt_folder(model, "bf16") / "model.safetensors")
    assert counts == {sum(t.numel() for t in bf16.values())}


def test_kept_modules_and_static_scales(modelopt_folder):
    found = inspect_checkpoint(modelopt_folder("qwen3_moe", "nvfp4"))
    assert found.quant == "nvfp4"
    assert found.kept == [
        "lm_head",
        "model.embed_tokens",
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.gate",
    ]
    assert found.totals["nvfp4"].modules == found.totals["nvfp4"].static == 56
    bf16 = inspect_checkpoint(modelopt_folder("qwen3_moe", "bf16"))
    assert (bf16.quant, bf16.kept, bf16.totals.keys()) == (None, [], {"bf16"})


@pytest.fixture
def mixed(modelopt_folder, tmp_path):
    """Attention in FP8, experts of layer 0 in NVFP4, those of layer 1 in BF16."""
    parts = {q: load_file(modelopt_folder("qwen3_moe", q) / "model.safetensors") for q in ("bf16", "fp8", "nvfp4")}
    layers, tensors = {}, {}
    for name in parts["bf16"]:
        module = name.removesuffix(".weight")
        quant = "fp8" if "self_attn" in name and "norm" not in name else "bf16"
        quant = "nvfp4" if ".layers.0.mlp.experts." in name else quant
        if quant != "bf16":
            layers[module] = {"quant_algo": quant.upper()}
        tensors |= {key: t for key, t in parts[quant].items() if key.startswith(module + ".")}
    config = json.loads((modelopt_folder("qwen3_moe", "bf16") / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": layers,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_mixed_precision(mixed):
    found = inspect_checkpoint(mixed)
    schemes = {module.name: module.scheme for module in found.modules}
    assert found.quant == "mixed"
    assert schemes["model.layers.1.self_attn.q_proj"] == "fp8"
    assert schemes["model.layers.0.mlp.experts.5.up_proj"] == "nvfp4"
    assert schemes["model.layers.1.mlp.experts.5.up_proj"] == "bf16"
    assert {name: total.modules for name, total in found.totals.items()} == {"bf16": 37, "fp8": 8, "nvfp4": 24}
    assert found.warnings == []


def test_a_config_that_says_otherwise_is_a_warning(mixed):
    config = json.loads((mixed / "config.json").read_text())
    config["quantization_config"]["quantized_layers"] = {"model.layers.0.self_attn.q_proj": {"quant_algo": "NVFP4"}}
    (mixed / "config.json").write_text(json.dumps(config))
    warnings = "\n".join(inspect_checkpoint(mixed).warnings)
    assert "1 modules are stored as fp8, but the config says nvfp4: model.layers.0.self_attn.q_proj" in warnings
    assert "24 modules are stored as nvfp4, but the config says bf16" in warnings


def test_a_scale_that_is_missing_shows(modelopt_folder, tmp_path):
    shutil.copytree(modelopt_folder("qwen3", "nvfp4"), tmp_path / "x")
    tensors = load_file(tmp_path / "x" / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_scale_2"], tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, tmp_path / "x" / "model.safetensors")
    schemes = {m.name: m.scheme for m in inspect_checkpoint(tmp_path / "x").modules}
    assert schemes["model.layers.0.mlp.up_proj"] == "u8 of an unknown layout"
    assert schemes["model.layers.1.mlp.up_proj"] == "u8 without weight_scale"


def test_only_headers_are_read(tmp_path):
    """8 GB of BF16 that take no room on the disk, and none in memory."""
    rows, cols = 4_000, 1_000_000
    entry = {"dtype": "BF16", "shape": [rows, cols], "data_offsets": [0, rows * cols * 2]}
    header = json.dumps({"model.layers.10.big.weight": entry}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + rows * cols * 2)
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    found = inspect_checkpoint(tmp_path)
    assert (found.weights, found.bytes) == (rows * cols, rows * cols * 2)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_stacked_experts_are_modules_without_an_ending(tmp_path):
    save_file({"a.experts.gate_up_proj": torch.zeros(2, 4, 8, dtype=torch.bfloat16)}, tmp_path / "m.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (module,) = inspect_checkpoint(tmp_path).modules
    assert (module.name, module.scheme, module.weights) == ("a.experts.gate_up_proj", "bf16", 64)


def test_a_foreign_config_is_a_warning(modelopt_folder, tmp_path):
    shutil.copytree(modelopt_folder("qwen3", "fp8"), tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "awq"}
    (tmp_path / "x" / "config.json").write_text(json.dumps(config))
    found = inspect_checkpoint(tmp_path / "x")
    assert found.totals["fp8"].modules == 14
    assert any("awq" in warning for warning in found.warnings)


def test_no_model_is_an_error(tmp_path):
    with pytest.raises(ModelError, match=r"config\.json"):
        inspect_checkpoint(tmp_path)
