"""Memory for the packed weights when an engine starts: an error that says what would fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..quant import ConfigError

GIB = 2**30


@contextmanager
def naming_weight_memory(quant: object) -> Iterator[None]:
    """`ConfigError` instead of torch's error where a GPU has no room for the weights of `EngineConfig(quant=...)`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"no memory for the packed weights with quant={quant!r}: {_memory()}. A weight takes 2 bytes in bf16, 1 in "
            "fp8, 0.56 in nvfp4: choose a smaller format, or end what else holds the GPU's memory"
        ) from error


def _memory() -> str:
    if not torch.cuda.is_available():
        return "none is left"
    free, total = torch.cuda.mem_get_info()
    held = torch.cuda.memory_allocated()
    return f"{held / GIB:.1f} GiB are held so far, {free / GIB:.1f} of {total / GIB:.1f} GiB are free"
