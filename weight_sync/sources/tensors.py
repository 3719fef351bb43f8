"""Tensors of this process: a trainer's state dict."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor


class TensorSource:
    """Yields the pairs it was given."""

    def __init__(self, pairs: Iterable[tuple[str, Tensor]]) -> None:
        self.pairs = pairs

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.pairs:
            yield name, value.detach()
