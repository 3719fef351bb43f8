"""`WeightSource`: anything that yields (name, tensor), in any order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor

from ..quant import ConfigError
from .sources.safetensors_files import SafetensorsSource
from .sources.tensors import TensorSource


class WeightSource(Protocol):
    """A tensor need be valid only until the next one is asked for: a session copies it."""

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


Source = WeightSource | Mapping[str, Tensor] | Iterable[tuple[str, Tensor]] | str | Path


def open_source(source: Source) -> WeightSource:
    """A dict, an iterable of (name, tensor), a safetensors folder or file, or a ready source."""
    if isinstance(source, str | Path):
        return SafetensorsSource(Path(source))
    if isinstance(source, Mapping):
        return TensorSource(cast(Mapping[str, Tensor], source).items())
    if isinstance(source, Iterable):
        return cast(WeightSource, source)
    raise ConfigError(
        f"cannot take weights from {type(source).__name__}: give a dict of tensors, an iterator of (name, tensor), "
        "or the path of a safetensors folder"
    )
