"""Folders of whole pipelines, their two transformers, and what a base model lends to a file."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from rollmill.engine import EngineConfig, ModelError
from rollmill.engine.dit.checkpoint import DiffusionCheckpoint


@pytest.fixture
def make_pipeline(recorded, tmp_path):
    """`make_pipeline("WanPipeline", transformer="wan-fp8", ...)`: model_index.json and transformer folders."""

    def make(kind, place="pipeline", boundary=None, **parts):
        folder = tmp_path / place
        folder.mkdir()
        index = {"_class_name": kind} | ({} if boundary is None else {"boundary_ratio": boundary})
        for name, part in parts.items():
            shutil.copytree(recorded(part), folder / name)
            index[name] = ["diffusers", recorded.config(part)["_class_name"]]
        (folder / "model_index.json").write_text(json.dumps(index))
        return folder

    return make


def open_checkpoint(path, **config):
    return DiffusionCheckpoint(path, EngineConfig(**config))


def test_both_transformers_of_wan(make_pipeline, recorded, open_float32, reader):
    """High noise in NVFP4 tiles, low noise in FP8: each its own plan, layout and output."""
    place = make_pipeline("WanPipeline", boundary=0.875, transformer="wan-nvfp4-swizzled", transformer_2="wan-fp8")
    engine = open_float32(place)
    assert list(engine.transformers) == ["transformer", "transformer_2"]
    stored = engine.checkpoint.transformers
    assert [stored[name].plan.quant for name in stored] == ["nvfp4", "fp8"]
    assert stored["transformer"].layout.nvfp4.scales == "128x4"
    assert stored["transformer_2"].layout.nvfp4 is None
    assert engine.checkpoint.model_index["boundary_ratio"] == 0.875
    io = recorded.io("wan-fp8")
    for name, part in (("transformer", "wan-nvfp4"), ("transformer_2", "wan-fp8")):
        with torch.no_grad():
            ours = engine.transformers[name].module(**reader.inputs_of(io), return_dict=False)[0]
            alone = open_float32(recorded(part)).transformer(**reader.inputs_of(io), return_dict=False)[0]
        assert torch.equal(ours, alone)


def test_one_transformer_of_a_pipeline(make_pipeline, recorded, open_float32):
    place = make_pipeline("FluxPipeline", transformer="flux1-fp8")
    assert open_checkpoint(place).folder == place
    assert open_float32(place).digest() == open_float32(recorded("flux1-fp8")).digest()


def test_a_pipeline_without_a_transformer(make_pipeline):
    with pytest.raises(ModelError, match="pipeline without a transformer folder"):
        open_checkpoint(make_pipeline("FluxPipeline"))


def test_a_base_pipeline_lends_config_and_parts_to_a_file(make_pipeline, recorded, to_native, write_file):
    base = make_pipeline("FluxPipeline", transformer="flux1-bf16")
    path = write_file(to_native("flux1", recorded.tensors("flux1-bf16")))
    found = open_checkpoint(path, base=str(base))
    assert found.folder == base
    assert found.transformers["transformer"].config == recorded.config("flux1-bf16")
    assert list(found.transformers) == ["transformer"]


def test_a_base_pipeline_lends_the_second_transformer(make_pipeline, recorded):
    """Its boundary needs both."""
    base = make_pipeline("WanPipeline", transformer="wan-bf16", transformer_2="wan-bf16")
    found = open_checkpoint(recorded("wan-nvfp4"), base=str(base))
    assert {name: one.plan and one.plan.quant for name, one in found.transformers.items()} == {
        "transformer": "nvfp4",
        "transformer_2": None,
    }


def test_the_config_beside_the_weights_is_the_models(make_pipeline, recorded):
    """A quantized base says nothing about the file."""
    base = make_pipeline("FluxPipeline", transformer="flux1-nvfp4")
    found = open_checkpoint(recorded("flux1-bf16"), base=str(base)).transformers["transformer"]
    assert found.config == recorded.config("flux1-bf16")
    assert found.plan is None


def test_a_quantized_base_says_nothing_about_a_files_weights(make_pipeline, recorded, to_native, write_file):
    base = make_pipeline("FluxPipeline", transformer="flux1-nvfp4")
    path = write_file(to_native("flux1", recorded.tensors("flux1-bf16")))
    assert open_checkpoint(path, base=str(base)).transformers["transformer"].plan is None


def test_a_base_without_a_config(recorded, to_native, write_file, tmp_path):
    (tmp_path / "base").mkdir()
    path = write_file(to_native("flux1", recorded.tensors("flux1-bf16")))
    with pytest.raises(ModelError, match=r"base='.*' holds no config\.json of a diffusers transformer"):
        open_checkpoint(path, base=str(tmp_path / "base"))
