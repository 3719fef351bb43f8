"""Files stay below their bound, hold every tensor once, and are listed in an index."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from rollmill.engine.export.shards import ShardWriter

INDEX = "model.safetensors.index.json"


@pytest.fixture
def tensors():
    """Ten of 400 bytes, one of 4000, and a transposed view into a larger one."""
    made = {f"t{i}": torch.full((100,), float(i)) for i in range(10)}
    return made | {"big": torch.arange(1000.0), "view": torch.arange(60.0).view(6, 10).t()[2:5]}


@pytest.mark.parametrize(("max_bytes", "files"), [(10**9, 1), (1000, 7), (1, 12)])
def test_files(max_bytes, files, tensors, tmp_path):
    writer = ShardWriter(tmp_path, max_bytes)
    held = 0
    for name, value in tensors.items():
        writer.add(name, value)
        held = max(held, writer.pending_bytes)
    assert writer.close() == files
    assert held <= max(max_bytes, 4000)
    names = (
        [f"model-{i + 1:05}-of-{files:05}.safetensors" for i in range(files)] if files > 1 else ["model.safetensors"]
    )
    assert {file.name for file in tmp_path.iterdir()} == {*names, *([INDEX] if files > 1 else [])}
    found = {name: load_file(tmp_path / name) for name in names}
    assert sum(map(len, found.values())) == len(tensors)
    for parts in found.values():
        for name, value in parts.items():
            assert torch.equal(value, tensors[name])
    if files > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["weight_map"] == {tensor: name for name, parts in found.items() for tensor in parts}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
