"""`CanonicalSource`: the tensors of any file as *stored*: diffusers' names and shapes, low nibble = even k, linear
block scales. One tensor of the file is in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ....quant import ModelError
from ....quant.layout import swap_nibbles, unswizzle_scales
from .files import WeightFiles
from .layers import FileLayer
from .layout import LINEAR, FileLayout
from .native import Placement, leaf_of, place_module

Shapes = Mapping[str, tuple[int, ...]]  # parameter of the diffusers model -> shape
PER_TENSOR = ("weight_scale_2", "input_scale")


class CanonicalSource:
    """A `WeightSource` over a file's tensors; `get` reads one by its stored name.

    `shapes` says how many rows and columns a weight has: files pad them (to 16, scales to tiles of 128x4), and a
    packed weight is split where the model's linears end.
    """

    def __init__(self, files: WeightFiles, layout: FileLayout, layers: Mapping[str, FileLayer], shapes: Shapes) -> None:
        self.files, self.layout, self.layers, self.shapes = files, layout, layers, shapes
        self._owners = {stored: name for name in files.tensors for stored in self.stored_names(name)}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, value in self.files:
            stored = self.stored_names(name)
            if stored:
                yield from zip(stored, self._split(name, self._canonical(name, value)), strict=True)

    def names(self) -> set[str]:
        """All stored names, from the headers alone."""
        return set(self._owners)

    def metadata(self) -> dict[str, str]:
        return dict(self.files.metadata)

    def get(self, stored: str) -> Tensor:
        """One stored tensor."""
        name = self._owners[stored]
        parts = self._split(name, self._canonical(name, self.files.read(name)))
        return parts[self.stored_names(name).index(stored)]

    def stored_names(self, name: str) -> list[str]:
        """What becomes of a file's tensor: several where it packs several linears, none of a marker."""
        if not name.startswith(self.layout.prefix):
            return []  # another component's
        module, leaf = self._parts(name)
        if leaf == "comfy_quant":
            return []
        leaf = leaf_of(leaf, self.layout.names)
        return [f"{target}.{leaf}" if target else leaf for target in self._place(module).modules]

    def _parts(self, name: str) -> tuple[str, str]:
        module, _, leaf = name.removeprefix(self.layout.prefix).rpartition(".")
        return module, leaf

    def _place(self, module: str) -> Placement:
        return place_module(module, self.layout.names)

    # values

    def _canonical(self, name: str, value: Tensor) -> Tensor:
        """Rows and columns as the model has them, in the order of the file."""
        module, leaf = self._parts(name)
        layer = self.layers.get(module)
        if layer is None or leaf not in ("weight", "weight_scale"):
            return value
        if layer.is_nvfp4:
            return self._nvfp4(layer, leaf, value)
        if leaf == "weight":
            return value.view(torch.float8_e4m3fn)
        return value.reshape(-1) if layer.quant == "fp8_channel" else value

    def _nvfp4(self, layer: FileLayer, leaf: str, value: Tensor) -> Tensor:
        rows, cols = self._logical(layer)
        nvfp4 = self.layout.nvfp4
        assert nvfp4 is not None
        if leaf == "weight":
            codes = value[:rows, : cols // 2]
            return codes if nvfp4.nibbles == "low_first" else swap_nibbles(codes)
        if nvfp4.scales == LINEAR:
            return value[:rows, : cols // 16]
        return unswizzle_scales(value, rows, cols // 16)

    def _logical(self, layer: FileLayer) -> tuple[int, int]:
        """Rows and columns of the diffusers linears that this weight holds."""
        rows, cols = layer.shape("weight")[0], layer.shape("weight")[1] * 2
        known = [self.shapes.get(f"{target}.weight") for target in self._place(layer.name).modules]
        if None in known or not known:
            return rows, cols  # of no module of the model: the session will say so
        shapes = [shape for shape in known if shape is not None]
        want = sum(shape[0] for shape in shapes), shapes[0][1]
        padded = [{size, -(-size // 16) * 16, -(-size // 32) * 32} for size in want]
        if rows not in padded[0] or cols not in padded[1]:
            raise ModelError(
                f"{layer.name}.weight holds {rows} x {cols} NVFP4 values, but the model has {want[0]} x {want[1]} there"
            )
        return want

    def _split(self, name: str, value: Tensor) -> Sequence[Tensor]:
        module, leaf = self._parts(name)
        place = self._place(module)
        rowless = leaf in PER_TENSOR or value.ndim == 0 or leaf == "weight_scale" and value.numel() == 1
        if rowless:
            return [value] * len(place.modules)
        if place.swapped:
            return [_swap_halves(value)]
        if len(place.modules) == 1:
            return [value]
        rows = [self._rows(target) for target in place.modules]
        if sum(rows) != len(value):
            raise ModelError(f"{name} has {len(value)} rows, but {' + '.join(place.modules)} have {sum(rows)}")
        return [_rows_of(value, sum(rows[:i]), count) for i, count in enumerate(rows)]

    def _rows(self, module: str) -> int:
        shape = self.shapes.get(f"{module}.weight")
        if shape is None:
            raise ModelError(f"the model has no {module}, which the file holds")
        return shape[0]


def _rows_of(value: Tensor, start: int, count: int) -> Tensor:
    return value[start : start + count]


def _swap_halves(value: Tensor) -> Tensor:
    """Rows [first, second] -> [second, first]; one-byte floats go through their bits."""
    raw = value.view(torch.uint8) if value.element_size() == 1 else value
    return torch.cat(raw.chunk(2)[::-1]).view(value.dtype)
