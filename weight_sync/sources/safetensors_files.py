"""A folder of safetensors files, single or sharded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ...quant import ModelError

INDEX = "model.safetensors.index.json"
DIFFUSERS_INDEX = "diffusion_pytorch_model.safetensors.index.json"


class SafetensorsSource:
    """Yields every tensor of a safetensors file, or of the files of a folder (those of its index, if it has one)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = _find_files(path)

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for file in self.files:
            with _open(file) as tensors:
                for name in tensors.keys():  # noqa: SIM118 (a safetensors handle is no dict)
                    yield name, tensors.get_tensor(name)

    def names(self) -> set[str]:
        """All tensor names, from the headers alone."""
        names: set[str] = set()
        for file in self.files:
            with _open(file) as tensors:
                names.update(tensors.keys())
        return names

    def metadata(self) -> dict[str, str]:
        """The header metadata of all files."""
        merged: dict[str, str] = {}
        for file in self.files:
            with _open(file) as tensors:
                merged.update(tensors.metadata() or {})
        return merged


def _open(file: Path) -> Any:  # safe_open has no importable type
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file.name} is no readable safetensors file: {error}") from error


def _find_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ModelError(f"{path} does not exist; give a folder with safetensors files")
    index = next((path / name for name in (INDEX, DIFFUSERS_INDEX) if (path / name).is_file()), None)
    if index is None:
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise ModelError(f"{path} holds no *.safetensors file")
        return files
    try:
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index.name} is no valid index: {error!r}") from error
    missing = [name for name in names if not (path / name).is_file()]
    if missing:
        raise ModelError(f"{index.name} names files that are not there: {', '.join(missing)}")
    return [path / name for name in names]
