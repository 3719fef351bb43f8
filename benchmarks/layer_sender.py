"""A trainer that sends a model layer by layer out of one GPU buffer, with random weights of a version."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Any, Literal

import torch
from random_model import WEIGHT_STD, shapes_of
from torch import Tensor

Form = Literal["stacked", "apart"]
Bucket = list[tuple[str, Tensor]]


class LayerSender:
    """`buckets()` yields what comes before the layers, every layer, and what follows them; all are views of one buffer.

    `apart`: every expert's projections are tensors of their own, 384 a layer for 128 experts. With `churn` the buffer
    changes sign between buckets, so that a bucket which is read too late is read wrongly; its time is the sender's.
    """

    def __init__(self, config: dict[str, Any], form: Form = "stacked", device: str = "cuda") -> None:
        self.form, self.device = form, device
        shapes = shapes_of(config)
        self.layout = [list(group) for _, group in groupby(shapes, key=lambda item: _layer_of(item[0]))]
        sizes = [sum(torch.Size(shape).numel() for _, shape in bucket) for bucket in self.layout]
        self.buffer = torch.empty(max(sizes), dtype=torch.bfloat16, device=device)
        self.ones = torch.ones(config["hidden_size"], dtype=torch.bfloat16, device=device)
        self.num_bytes = 2 * sum(sizes)
        self._views = [self._bucket(bucket) for bucket in self.layout]  # a trainer knows its views, too
        self.num_tensors = sum(len(bucket) for bucket in self._views)

    def fill(self, version: int) -> None:
        """The weights of this version; norms are ones."""
        self.buffer.normal_(0, WEIGHT_STD, generator=torch.Generator(self.device).manual_seed(version))
        if self.device == "cuda":
            torch.cuda.synchronize()

    def buckets(self, *, churn: bool = False) -> Iterator[Bucket]:
        for bucket in self._views:
            if churn:
                self.buffer.neg_()
            yield bucket

    def _bucket(self, shapes: list[tuple[str, tuple[int, ...]]]) -> Bucket:
        bucket, start = [], 0
        for name, shape in shapes:
            size = torch.Size(shape).numel()
            value = self.ones[:size] if len(shape) == 1 else self.buffer[start : start + size].view(shape)
            bucket += self._named(name, value)
            start += size
        return bucket

    def _named(self, name: str, value: Tensor) -> Bucket:
        if self.form == "stacked" or value.ndim != 3:
            return [(name, value)]
        prefix, _, kind = name.rpartition(".")
        parts = {"down_proj": value}
        if kind == "gate_up_proj":
            gate, up = value.chunk(2, dim=1)
            parts = {"gate_proj": gate, "up_proj": up}
        return [(f"{prefix}.{e}.{part}.weight", w[e]) for e in range(len(value)) for part, w in parts.items()]


def _layer_of(name: str) -> str:
    """ "0", "1", ...; what stands before and after the layers is one bucket each."""
    if ".layers." in name:
        return name.split(".layers.")[1].split(".")[0]
    return "before" if "embed" in name else "after"
