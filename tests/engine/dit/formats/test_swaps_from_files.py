"""A swap from a path reads the file as a cold load does: any names, any layout."""

from __future__ import annotations

import json
import shutil

import pytest

from rollmill.engine import NVFP4Layout, UnsupportedError


def test_a_swizzled_folder_is_swapped_in_as_it_is_loaded(recorded, open_float32):
    """Its scales have the shapes of linear ones."""
    engine = open_float32(recorded("wan-nvfp4"))
    before = engine.digest()
    assert engine.digest(recorded("wan-nvfp4-swizzled")) == before
    engine.update_weights({name: value + 1 for name, value in recorded.tensors("wan-bf16").items()})
    assert engine.digest() != before
    engine.update_weights(str(recorded("wan-nvfp4-swizzled")))
    assert engine.digest() == before
    engine.update_weights(recorded("wan-bf16"))  # requantized as ModelOpt does
    assert engine.digest() == before


@pytest.mark.parametrize("family", ["flux1", "flux2"])
def test_native_names_are_swapped_in(family, tiny, to_native, write_file, write_folder, open_float32):
    config, tensors = tiny(family)
    engine = open_float32(write_folder(tensors, config))
    changed = {name: value + 1 for name, value in tensors.items()}
    expected = engine.digest(changed)
    path = write_file(to_native(family, changed))
    engine.update_weights(path, version="9")
    assert engine.digest() == expected
    assert engine.weight_version == "9"


def test_the_models_config_stands_for_a_file_without_one(recorded, to_native, write_file, open_float32):
    engine = open_float32(recorded("flux1-bf16"))
    before = engine.digest()
    engine.update_weights(write_file(to_native("flux1", recorded.tensors("flux1-bf16"))))
    assert engine.digest() == before


def test_a_pipeline_is_swapped_in_part_by_part(recorded, tmp_path, open_float32):
    for component, name in (("transformer", "wan-nvfp4"), ("transformer_2", "wan-fp8")):
        shutil.copytree(recorded(name), tmp_path / component)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    engine = open_float32(tmp_path)
    before = engine.digest()
    changed = {name: value + 1 for name, value in recorded.tensors("wan-bf16").items()}
    engine.update_weights(changed, module="transformer_2")
    assert engine.digest() != before
    engine.update_weights(tmp_path / "transformer_2", module="transformer_2")
    assert engine.digest() == before
    engine.update_weights(changed, module="transformer")
    engine.update_weights(tmp_path)
    assert engine.digest() == before


def test_a_file_of_an_unknown_layout_changes_nothing(recorded, copied, open_float32):
    def silence(tensors, config):
        del config["quantization_config"]

    engine = open_float32(recorded("flux1-nvfp4"))
    before, silent = engine.digest(), copied("flux1-nvfp4", silence)
    with pytest.raises(UnsupportedError, match="neither ModelOpt's config"):
        engine.update_weights(silent)
    assert engine.digest() == before
    told = open_float32(recorded("flux1-nvfp4"), layout=NVFP4Layout("low_first", "linear"))
    told.update_weights(silent)
    assert told.digest() == before
