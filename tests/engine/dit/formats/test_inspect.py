"""`rollmill inspect` of diffusion files: scheme, layout and bytes of every layer, from headers alone."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.torch import load_file

from rollmill.engine import inspect_checkpoint
from rollmill.engine.cli import main

FOLDERS = ["flux1-bf16", "flux1-fp8", "flux1-nvfp4", "wan-fp8", "wan-nvfp4", "wan-nvfp4-swizzled"]


def assert_all_listed(found, tensors):
    """Shapes and bytes of every tensor; tensors without a module stand by themselves."""
    listed = {}
    for module in found.modules:
        for key, tensor in module.tensors.items():
            name = f"{module.name}.{key}" if f"{module.name}.{key}" in tensors else module.name
            listed[name] = tensor.shape, tensor.bytes
    assert listed == {name: (tuple(t.shape), t.nbytes) for name, t in tensors.items()}
    assert found.bytes == sum(t.nbytes for t in tensors.values())


@pytest.mark.parametrize("name", FOLDERS)
def test_every_tensor_is_accounted_for(name, recorded):
    found, tensors = inspect_checkpoint(recorded(name)), recorded.tensors(name)
    assert_all_listed(found, tensors)
    quant = name.split("-")[1]
    scaled = {n.removesuffix(".weight_scale") for n in tensors if n.endswith(".weight_scale")}
    assert {m.name for m in found.modules if m.scheme == quant} >= scaled
    assert {m.name for m in found.modules if m.is_quantized} == scaled
    assert found.architectures == [recorded.config(name)["_class_name"]]
    assert found.quant == (None if quant == "bf16" else quant)
    assert found.warnings == []
    order = "128x4" if name.endswith("swizzled") else "linear"
    packing = {f"low nibble first, scales {order}"} if quant == "nvfp4" else {None}
    assert {m.packing for m in found.modules if m.is_quantized} <= packing


@pytest.mark.parametrize("model", ["flux1", "wan"])
def test_weights_are_counted_alike_in_every_format(model, recorded):
    counts = {inspect_checkpoint(recorded(f"{model}-{quant}")).weights for quant in ("fp8", "nvfp4")}
    bf16 = {n: t for n, t in recorded.tensors(f"{model}-bf16").items() if not n.endswith(".bias")}
    assert counts == {inspect_checkpoint(recorded(f"{model}-bf16")).weights} == {sum(t.numel() for t in bf16.values())}


def test_a_comfy_file_in_its_own_names(recorded, capsys, monkeypatch):
    found = inspect_checkpoint(recorded.comfy)
    assert_all_listed(found, load_file(recorded.comfy))
    assert found.architectures == ["Flux2Transformer2DModel"]
    packed = {m.name: m for m in found.modules if m.is_quantized}
    assert len(packed) == 11
    assert {m.packing for m in packed.values()} == {"high nibble first, scales 128x4"}
    assert packed["double_blocks.0.img_attn.qkv"].weights == 576 * 192
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["inspect", str(recorded.comfy)]) == 0
    printed = capsys.readouterr().out
    assert "single_blocks.0-1.linear1" in printed
    assert "high nibble first, scales 128x4" in printed
    assert main(["inspect", str(recorded.comfy), "--json"]) == 0
    modules = {m["name"]: m for m in json.loads(capsys.readouterr().out)["modules"]}
    assert modules["single_blocks.1.linear2"]["packing"] == "high nibble first, scales 128x4"
    assert modules["txt_in"]["packing"] is None


def test_a_layout_is_found_by_comparison(recorded, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    command = ["inspect", str(recorded("wan-nvfp4-swizzled")), "--against", str(recorded("wan-bf16").parent)]
    assert main(command) == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    (fits,) = [row for row in rows if row[3:] == ["yes"]]
    assert fits[0] == "low nibble first, scales 128x4"
    assert float(fits[1]) > 0.99
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] == {"nibbles": "low_first", "scales": "128x4"}
    assert len(found["readings"]) == 4


def test_a_pipeline_lists_both_transformers(recorded, tmp_path):
    for component, name in (("transformer", "wan-nvfp4"), ("transformer_2", "wan-fp8")):
        shutil.copytree(recorded(name), tmp_path / component)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    found = inspect_checkpoint(tmp_path)
    assert found.architectures == ["WanTransformer3DModel"] * 2
    schemes = {m.name: m.scheme for m in found.modules}
    assert schemes["transformer.blocks.1.attn1.to_q"] == "nvfp4"
    assert schemes["transformer_2.blocks.1.attn1.to_q"] == "fp8"
    assert found.files == 2
    assert (found.quant, found.warnings) == ("mixed", [])


def test_what_cannot_be_served_is_listed_with_the_reason(recorded, copied):
    def silence(tensors, config):
        del config["quantization_config"]

    found = inspect_checkpoint(copied("flux1-nvfp4", silence))
    assert_all_listed(found, recorded.tensors("flux1-nvfp4"))
    (warning,) = found.warnings
    assert "neither ModelOpt's config" in warning
    assert found.totals["nvfp4"].modules == 26


def test_where_tensors_are_not_what_the_config_says(copied):
    def keep(tensors, config):
        config["quantization_config"]["ignore"].append("*.norm1.linear")

    (warning,) = inspect_checkpoint(copied("flux1-fp8", keep)).warnings
    assert warning == "1 modules are stored as fp8, but the config says bf16: transformer_blocks.0.norm1.linear"


def test_a_file_without_a_config(recorded, write_file):
    """Names and headers are enough to list it."""
    tensors = recorded.tensors("flux1-fp8")
    found = inspect_checkpoint(write_file(tensors))
    assert_all_listed(found, tensors)
    assert found.architectures == ["unknown model"]
    assert found.totals["fp8"].modules == 26
