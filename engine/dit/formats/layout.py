"""`FileLayout`: how a file's tensors are called and how its NVFP4 weights lie; decided once for the whole file.

A layout is said by the user, else by the file's metadata and names. Shapes can only contradict, or rule out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from msgspec import Struct

from ....quant import ModelError, UnsupportedError
from ...config import NVFP4Layout
from .layers import FileLayer

Names = Literal["diffusers", "flux1", "flux2"]  # the last two: Black Forest Labs' own

LINEAR, TILES = "linear", "128x4"
COMFY = "Black Forest Labs' and Comfy's files have"
READINGS = tuple(NVFP4Layout(n, s) for n in ("low_first", "high_first") for s in ("linear", "128x4"))


class FileLayout(Struct, frozen=True):
    """`names`: whose they are; `prefix`: what every name begins with; `nvfp4`: None where nothing is NVFP4."""

    names: Names = "diffusers"
    prefix: str = ""
    nvfp4: NVFP4Layout | None = None

    def __str__(self) -> str:
        packed = "" if self.nvfp4 is None else f", NVFP4 {say(self.nvfp4)}"
        return f"{self.names} names{packed}"


class Evidence(Struct, frozen=True):
    """What a file says about itself. `modelopt`: a ModelOpt config stands in or beside it; `by_layer`: the header
    lists layers one by one (`_quantization_metadata`); `comfy`: layers carry a `comfy_quant` marker."""

    names: Names
    modelopt: bool
    by_layer: bool
    comfy: bool


def decide_layout(
    layers: Mapping[str, FileLayer], evidence: Evidence, wanted: NVFP4Layout | None
) -> NVFP4Layout | None:
    """The layout of a file's NVFP4 layers, None if it has none.

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
        # ModelOpt lists the layers where it wrote tiles; an order that the shapes rule out it is not.
        tiles = len(possible) == 2 and evidence.by_layer or possible == [TILES]
        return NVFP4Layout("low_first", TILES if tiles else LINEAR)
    raise _unknown(possible)


def possible_scales(packed: Sequence[FileLayer]) -> list[str]:
    """The orders of block scales that the shapes of all layers admit."""
    return [scales for scales in (LINEAR, TILES) if all(scales in scale_layouts(layer) for layer in packed)]


def scale_layouts(layer: FileLayer) -> list[str]:
    """The orders of block scales that a layer's shapes admit."""
    (rows, half), (scale_rows, scale_cols) = layer.shape("weight"), layer.shape("weight_scale")
    cols = half // 8
    found = []
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


def _unknown(possible: Sequence[str]) -> UnsupportedError:
    return UnsupportedError(
        "NVFP4 weights, but neither ModelOpt's config, nor Black Forest Labs' names, nor comfy_quant markers tell "
        "how they lie",
        [
            *(
                f"it may be {_list([layout.scales], layout.nibbles)}"
                for layout in READINGS
                if layout.scales in possible
            ),
            "say which; rollmill.engine.dit.formats.check_layout(file, bf16) compares them with BF16 weights",
        ],
    )


def _list(scales: Sequence[str], *nibbles: str) -> str:
    which = nibbles or ("...",)
    return ", ".join(f"EngineConfig(layout=NVFP4Layout(nibbles={n!r}, scales={s!r}))" for n in which for s in scales)
