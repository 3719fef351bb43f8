"""`FileLayout`: how a file's tensors are called and how its NVFP4 weights lie; decided once for the whole file.

A layout is said by the user, else by the file's metadata and names. Shapes can only contradict, or rule out. Where
ModelOpt's header leaves the order of scales open, and shapes do, too, values are measured (`scale_order.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from msgspec import Struct

from ....quant import ModelError, UnsupportedError
from ...config import NVFP4Layout
from .layers import FileLayer

Names = Literal["diffusers", "flux1", "flux2"]  # the last two: Black Forest Labs' own

ScaleOrder = Literal["linear", "128x4"]
LINEAR: ScaleOrder = "linear"
TILES: ScaleOrder = "128x4"
SCALE_ORDERS: tuple[ScaleOrder, ScaleOrder] = (LINEAR, TILES)
NIBBLES: tuple[Literal["low_first"], Literal["high_first"]] = ("low_first", "high_first")
COMFY = "Black Forest Labs' and Comfy's files have"
SILENT = "neither ModelOpt's config, nor Black Forest Labs' names, nor comfy_quant markers tell how they lie"
OPEN = "ModelOpt's header stands over scales in rows and in tiles alike, and neither shapes nor values tell which"
READINGS = tuple(NVFP4Layout(n, s) for n in NIBBLES for s in SCALE_ORDERS)


class FileLayout(Struct, frozen=True):
    """`names`: whose they are; `prefix`: what every name begins with; `nvfp4`: None where nothing is NVFP4."""

    names: Names = "diffusers"
    prefix: str = ""
    nvfp4: NVFP4Layout | None = None

    def __str__(self) -> str:
        packed = "" if self.nvfp4 is None else f", NVFP4 {say(self.nvfp4)}"
        return f"{self.names} names{packed}"


class Evidence(Struct, frozen=True):
    """What a file says about itself. `modelopt`: a ModelOpt config stands in or beside it; `post_processed`: the header
    holds that config or a list of layers; `comfy`: layers carry a `comfy_quant` marker."""

    names: Names
    modelopt: bool
    post_processed: bool
    comfy: bool


Measure = Callable[[Sequence[FileLayer]], ScaleOrder | None]  # the order of the layers' scales, as their values tell it


def decide_layout(
    layers: Mapping[str, FileLayer], evidence: Evidence, wanted: NVFP4Layout | None, measure: Measure
) -> NVFP4Layout | None:
    """The layout of a file's NVFP4 layers, None if it has none; `measure` is called only where nothing else tells.

    `UnsupportedError`: the file does not tell, or the shapes contradict `wanted` or what the file says.
    """
    packed = [layer for layer in layers.values() if layer.is_nvfp4]
    if not packed:
        return None
    possible = possible_scales(packed)
    if not possible:
        raise ModelError(_odd_shapes(packed))
    if wanted is not None:
        return _checked(wanted, possible, packed, "EngineConfig(layout=...) says")
    if evidence.comfy or evidence.names != "diffusers":
        return _checked(NVFP4Layout("high_first", TILES), possible, packed, COMFY)
    if evidence.modelopt:
        return NVFP4Layout("low_first", _modelopt_scales(packed, possible, evidence, measure))
    raise _unknown(possible, SILENT, NIBBLES)


def _modelopt_scales(
    packed: Sequence[FileLayer], possible: Sequence[ScaleOrder], evidence: Evidence, measure: Measure
) -> ScaleOrder:
    """An export lies in rows. ModelOpt's post-processing writes its config into the header, the list of layers on
    demand, and moves scales into tiles on demand, each by itself: the header does not say which of them it did."""
    if len(possible) == 1:
        return possible[0]
    if not evidence.post_processed:
        return LINEAR
    measured = measure(packed)
    if measured is None:
        raise _unknown(possible, OPEN, NIBBLES[:1])
    return measured


def possible_scales(packed: Sequence[FileLayer]) -> list[ScaleOrder]:
    """The orders of block scales that the shapes of all layers admit."""
    return [scales for scales in SCALE_ORDERS if all(scales in scale_layouts(layer) for layer in packed)]


def scale_layouts(layer: FileLayer) -> list[ScaleOrder]:
    """The orders of block scales that a layer's shapes admit."""
    (rows, half), (scale_rows, scale_cols) = layer.shape("weight"), layer.shape("weight_scale")
    cols = half // 8
    found: list[ScaleOrder] = []
    if scale_cols == cols and 0 <= rows - scale_rows < 16:  # weight rows may be padded to 16
        found.append(LINEAR)
    if (scale_rows, scale_cols) == (-(-rows // 128) * 128, -(-cols // 4) * 4):
        found.append(TILES)
    return found


def say(layout: NVFP4Layout) -> str:
    return f"{layout.nibbles.replace('_', ' nibble ')}, scales {layout.scales}"


def _checked(wanted: NVFP4Layout, possible: Sequence[str], packed: Sequence[FileLayer], who: str) -> NVFP4Layout:
    if wanted.scales in possible:
        return wanted
    odd = next(layer for layer in packed if wanted.scales not in scale_layouts(layer))
    raise UnsupportedError(
        f"{who} NVFP4 scales in {wanted.scales}, but {odd.name}.weight_scale "
        f"{list(odd.shape('weight_scale'))} of weight {list(odd.shape('weight'))} is not so",
        [f"these shapes admit: {_list(possible)}"],
    )


def _odd_shapes(packed: Sequence[FileLayer]) -> str:
    first = {tuple(scale_layouts(layer)): layer for layer in reversed(packed)}
    told = [
        f"{layer.name}.weight {list(layer.shape('weight'))} with weight_scale {list(layer.shape('weight_scale'))} "
        f"({' or '.join(orders) or 'neither'})"
        for orders, layer in first.items()
        if len(orders) < 2
    ]
    return f"block scales are neither all linear nor all in 128x4 tiles: {'; '.join(told)}"


def _unknown(possible: Sequence[str], why: str, nibbles: Sequence[str]) -> UnsupportedError:
    return UnsupportedError(
        f"NVFP4 weights, but {why}",
        [
            *(
                f"it may be {_list([layout.scales], layout.nibbles)}"
                for layout in READINGS
                if layout.scales in possible and layout.nibbles in nibbles
            ),
            "say which; rollmill.engine.dit.formats.check_layout(file, bf16) compares them with BF16 weights, and so "
            "does `rollmill inspect FILE --against BF16`",
        ],
    )


def _list(scales: Sequence[str], *nibbles: str) -> str:
    which = nibbles or ("...",)
    return ", ".join(f"EngineConfig(layout=NVFP4Layout(nibbles={n!r}, scales={s!r}))" for n in which for s in scales)
