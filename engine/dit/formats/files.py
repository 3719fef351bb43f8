"""Which safetensors files of a folder make up one transformer: shards belong together, alternatives do not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ....quant import ModelError
from ...headers import StoredTensor, read_header

INDEX = re.compile(r".*\.safetensors\.index(\.[A-Za-z]\w*)?\.json")
MIXED = re.compile(r".*-mixed(-\d+-of-\d+)?\.safetensors")  # more layers in BF16; preferred where both lie there
SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<variant>\.\w+)?")
VARIANT = re.compile(r"\.(fp16|fp32|bf16|fp8|non_ema|ema|no_ema)(?=$|-\d{5}-of-)")


class WeightFiles:
    """The files of one transformer: headers of all of them, tensors one by one."""

    def __init__(self, place: Path) -> None:
        self.paths = find_weight_files(place)
        self.tensors: dict[str, StoredTensor] = {}
        self.metadata: dict[str, str] = {}
        self._file_of: dict[str, Path] = {}
        for path in self.paths:
            self._read_header(path)

    def _read_header(self, path: Path) -> None:
        with open_file(path) as handle:
            self.metadata |= handle.metadata() or {}
        for name, tensor in read_header(path):
            if name in self._file_of:
                raise ModelError(
                    f"{name} lies in {self._file_of[name].name} and in {path.name}: these files are alternatives; "
                    "give the path of the one to open"
                )
            self.tensors[name], self._file_of[name] = tensor, path

    def read(self, name: str) -> Tensor:
        """One tensor, whole."""
        with open_file(self._file_of[name]) as handle:
            return handle.get_tensor(name)

    def read_rows(self, name: str, count: int) -> Tensor:
        """The first `count` rows of one tensor."""
        with open_file(self._file_of[name]) as handle:
            return handle.get_slice(name)[:count]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, file by file, in the order of the file."""
        for path in self.paths:
            with open_file(path) as handle:
                for name in (name for name, owner in self._file_of.items() if owner == path):
                    yield name, handle.get_tensor(name)


def open_file(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path.name} is no readable safetensors file: {error}") from error


def find_weight_files(place: Path) -> list[Path]:
    """A file as it is; of a folder the `-mixed` files if it holds others, too; never two variants (`.fp16`)."""
    if place.is_file():
        return [place]
    found = sorted(place.glob("*.safetensors"))
    indexes = {path.name: _indexed(path) for path in sorted(place.glob("*.json")) if INDEX.fullmatch(path.name)}
    if not found and not indexes:
        raise ModelError(f"{place} holds no *.safetensors file")
    mixed = [path for path in found if MIXED.fullmatch(path.name)]
    if mixed and len(mixed) < len(found):
        return _complete(mixed)
    variants = _by_variant([*(path.name for path in found), *(n for names in indexes.values() for n in names)])
    if "" not in variants and len(variants) > 1:
        raise ModelError(f"{place} holds the variants {', '.join(variants)}; give the path of the file to open")
    chosen = variants.get("") or next(iter(variants.values()))
    listed = [names for names in indexes.values() if set(names) <= chosen]
    if len(listed) > 1:
        raise ModelError(f"{place} holds several indexes: {', '.join(indexes)}; keep one")
    names = sorted(listed[0] if listed else chosen)
    _check_there(place, names, "its index names")
    return [place / name for name in names] if listed else _complete([place / name for name in names])


def _by_variant(names: Sequence[str]) -> dict[str, set[str]]:
    grouped: dict[str, set[str]] = {}
    for name in names:
        found = VARIANT.search(name.removesuffix(".safetensors"))
        grouped.setdefault(found[1] if found else "", set()).add(name)
    return grouped


def _indexed(index: Path) -> Sequence[str]:
    """The files that an index names."""
    try:
        weight_map: Mapping[str, str] = json.loads(index.read_bytes())["weight_map"]
        return sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index.name} is no valid index: {error!r}") from error


def _complete(paths: Sequence[Path]) -> list[Path]:
    """Shards without an index: all that their names count must be there."""
    for path in paths:
        shard = SHARD.fullmatch(path.stem)
        if shard:
            tail = shard["variant"] or ""
            numbers = range(1, int(shard["count"]) + 1)
            names = [f"{shard['stem']}-{n:05d}-of-{shard['count']}{tail}.safetensors" for n in numbers]
            _check_there(path.parent, names, f"{path.name} has siblings")
    return list(paths)


def _check_there(folder: Path, names: Sequence[str], why: str) -> None:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder}: {why} that are not there: {', '.join(missing)}")
