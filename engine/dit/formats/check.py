"""How an NVFP4 file lies, by comparison: dequantize layers in every possible reading against BF16 weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from msgspec import Struct
from torch import Tensor

from ....quant import NVFP4, ModelError, WeightShape
from ...config import NVFP4Layout
from .files import WeightFiles
from .layers import FileLayer, find_layers
from .layout import READINGS, possible_scales
from .native import find_names, place_module
from .stored_transformer import StoredTransformer, open_transformer

# NVFP4 rounds weights by a tenth. Read with scales in the wrong order they are off by a third, with nibbles swapped
# by more than their own size.
LARGEST_ERROR, SMALLEST_LEAD = 0.2, 1.5


class Reading(Struct, frozen=True):
    """One way to read a file. `correlation` with the reference; `error`: ||read - BF16|| / ||BF16||."""

    layout: NVFP4Layout
    correlation: float
    error: float


class LayoutCheck(Struct, frozen=True):
    """`readings`, best first; `fits`: the one that is right beyond doubt, if there is one; `modules`: what was read."""

    readings: list[Reading]
    fits: NVFP4Layout | None
    modules: list[str]


def check_layout(place: Path | str, reference: Path | str, num_layers: int = 3) -> LayoutCheck:
    """Read `num_layers` NVFP4 layers of a file or folder in every way that their shapes admit.

    `reference`: the same model's BF16 weights (pipeline, transformer folder or file), whatever their names.
    `ModelError`: nothing is NVFP4, or the reference lacks a layer.
    """
    place, known = _transformer_in(place), open_transformer(_transformer_in(reference))
    files = WeightFiles(place)
    names, prefix = find_names(files.tensors)
    packed = [layer for layer in find_layers(files, prefix).values() if layer.is_nvfp4]
    if not packed:
        raise ModelError(f"{place} holds no NVFP4 weights")
    modules = [m for layer in _spread(packed, num_layers) for m in place_module(layer.name, names).modules]
    expected = [_reference_weight(known, module) for module in modules]
    scales = possible_scales(packed)
    readings = [
        _compare(open_transformer(place, layout, known.config), layout, modules, expected)
        for layout in READINGS
        if layout.scales in scales
    ]
    readings.sort(key=lambda reading: reading.error)
    best, *others = readings
    clear = best.error < LARGEST_ERROR and all(other.error > SMALLEST_LEAD * best.error for other in others)
    return LayoutCheck(readings, best.layout if clear else None, modules)


def _transformer_in(place: Path | str) -> Path:
    """The first transformer of a pipeline; another place as it is."""
    inner = Path(place) / "transformer"
    return inner if inner.is_dir() else Path(place)


def _spread(layers: Sequence[FileLayer], count: int) -> list[FileLayer]:
    """`count` of them, from first to last."""
    count = min(count, len(layers))
    return [layers[i * len(layers) // count] for i in range(count)]


def _reference_weight(known: StoredTransformer, module: str) -> Tensor:
    name = f"{module}.weight"
    if name not in known.tensor_names:
        raise ModelError(f"the reference has no {name}: it is another model")
    weight = known.source.get(name)
    if weight.element_size() == 1:
        raise ModelError(f"the reference's {name} is quantized itself; give BF16 weights")
    return weight.float()


def _compare(
    opened: StoredTransformer, layout: NVFP4Layout, modules: Sequence[str], expected: Sequence[Tensor]
) -> Reading:
    read = [_dequantized(opened, module) for module in modules]
    ours, theirs = (torch.cat([weight.flatten() for weight in side]) for side in (read, expected))
    correlation = torch.corrcoef(torch.stack([ours, theirs]))[0, 1].item()
    return Reading(layout, correlation, ((ours - theirs).norm() / theirs.norm()).item())


def _dequantized(opened: StoredTransformer, module: str) -> Tensor:
    """float32 [rows, cols]"""
    stored = {key: opened.source.get(f"{module}.{key}") for key in ("weight", "weight_scale", "weight_scale_2")}
    rows, half = stored["weight"].shape
    stored["weight_scale_2"] = stored["weight_scale_2"].float().reshape(1)
    return NVFP4().dequantize(stored, WeightShape((rows,), half * 2))
