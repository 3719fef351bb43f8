"""Which files of a folder are opened: shards together, alternatives never."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from rollmill.engine import ModelError
from rollmill.engine.dit.formats import WeightFiles, open_transformer

STEM = "diffusion_pytorch_model"


@pytest.fixture
def folder(tmp_path):
    """`folder("a.safetensors", ...)`: files with a tensor each, named after the file or by `**names`."""

    def make(*files, **names):
        for file in files:
            save_file({names.get(file.split(".")[0], file): torch.ones(1)}, tmp_path / file)
        return tmp_path

    return make


def index(folder, *files, name=f"{STEM}.safetensors.index.json"):
    (folder / name).write_text(json.dumps({"weight_map": {file: file for file in files}}))


def opened(place):
    return {path.name for path in WeightFiles(place).paths}


def shards(count, tail="", variant=""):
    return [f"{STEM}{variant}-{n:05d}-of-{count:05d}{tail}.safetensors" for n in range(1, count + 1)]


def test_a_sharded_folder_equals_a_single_file(recorded, tmp_path, open_float32):
    tensors = recorded.tensors("flux1-nvfp4")
    names = sorted(tensors)  # a weight and its scales in different files
    parts = {file: names[i::2] for i, file in enumerate(shards(2))}
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (tmp_path / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(recorded.config("flux1-nvfp4")))
    save_file({"old.weight": torch.ones(1)}, tmp_path / "left-behind.safetensors")
    assert open_float32(tmp_path).digest() == open_float32(recorded("flux1-nvfp4")).digest()


@pytest.mark.parametrize("tail", ["", ".fp16"])
def test_shards_without_an_index(tail, folder):
    assert opened(folder(*shards(3, tail))) == set(shards(3, tail))


@pytest.mark.parametrize("tail", ["", ".fp16"])
def test_a_shard_that_is_missing(tail, folder):
    with pytest.raises(ModelError, match=f"not there: {STEM}-00002-of-00003{tail}.safetensors"):
        opened(folder(*(name for name in shards(3, tail) if "00002" not in name)))


def test_mixed_files_are_preferred_to_their_alternatives(folder):
    """The same layers in more BF16; they are no further shards."""
    place = folder("flux2-dev-nvfp4.safetensors", "flux2-dev-nvfp4-mixed.safetensors")
    assert opened(place) == {"flux2-dev-nvfp4-mixed.safetensors"}


def test_mixed_shards(folder):
    files = ["a-mixed-00001-of-00002.safetensors", "a-mixed-00002-of-00002.safetensors"]
    assert opened(folder("a.safetensors", *files)) == set(files)


def test_all_files_mixed_are_all_files(folder):
    assert opened(folder("a-mixed.safetensors")) == {"a-mixed.safetensors"}


def test_variants_are_not_mixed_with_others(folder):
    place = folder(f"{STEM}.fp16.safetensors", f"{STEM}.safetensors")
    assert opened(place) == {f"{STEM}.safetensors"}


@pytest.mark.parametrize("files", [[f"{STEM}.fp16.safetensors"], shards(2, variant=".fp16")], ids=["single", "shards"])
def test_a_variant_alone_is_opened(files, folder):
    assert opened(folder(*files)) == set(files)


def test_variants_alone_must_be_chosen(folder):
    place = folder(f"{STEM}.fp16.safetensors", f"{STEM}.bf16.safetensors")
    with pytest.raises(ModelError, match=r"variants bf16, fp16; give the path"):
        opened(place)
    assert opened(place / f"{STEM}.bf16.safetensors") == {f"{STEM}.bf16.safetensors"}


def test_an_index_belongs_to_its_variant(folder):
    place = folder(*shards(2), *shards(2, variant=".fp16"))
    index(place, *shards(2, variant=".fp16"), name=f"{STEM}.safetensors.index.fp16.json")
    index(place, *shards(2))
    assert opened(place) == set(shards(2))


def test_an_index_of_files_that_are_not_there(folder):
    place = folder(*shards(2)[:1])
    index(place, *shards(2))
    with pytest.raises(ModelError, match="not there: .*00002-of-00002"):
        opened(place)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', "{}"])
def test_a_torn_index(text, folder):
    place = folder(*shards(2))
    (place / f"{STEM}.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match="no valid index"):
        opened(place)


def test_files_that_hold_the_same_tensor_are_alternatives(folder):
    place = folder("dev.safetensors", "schnell.safetensors", dev="x.weight", schnell="x.weight")
    with pytest.raises(ModelError, match=r"x\.weight lies in dev\.safetensors and in schnell\.safetensors"):
        opened(place)
    assert opened(folder("other.safetensors") / "other.safetensors") == {"other.safetensors"}


def test_no_files(tmp_path):
    with pytest.raises(ModelError, match=r"holds no \*\.safetensors"):
        opened(tmp_path)


def test_a_torn_file(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelError, match=r"a\.safetensors is no readable"):
        opened(tmp_path)


def test_a_file_takes_the_config_beside_it(recorded):
    opened_file = open_transformer(recorded("wan-nvfp4-swizzled") / f"{STEM}.safetensors")
    assert opened_file.config == recorded.config("wan-nvfp4-swizzled")
    assert str(opened_file.layout) == "diffusers names, NVFP4 low nibble first, scales 128x4"
