"""The families, one file each; a family is added by its file and its line in `FAMILIES`."""

from __future__ import annotations

from collections.abc import Sequence

from ....quant import UnsupportedError
from .family import Embeds, Family, Size
from .flux import Flux
from .flux2 import Flux2
from .qwen_image import QwenImage
from .sd3 import SD3
from .wan import Wan

FAMILIES: tuple[type[Family], ...] = (Flux, Flux2, QwenImage, SD3, Wan)

__all__ = ["FAMILIES", "Embeds", "Family", "Size", "default_keep", "find_family"]


def find_family(transformer: str) -> type[Family]:
    """The family of a diffusers transformer class."""
    known = {family.TRANSFORMER: family for family in FAMILIES}
    if transformer not in known:
        raise UnsupportedError(f"no rollouts for {transformer}", [f"known: {', '.join(known)}"])
    return known[transformer]


def default_keep(transformer: str) -> Sequence[str]:
    """What stays in BF16 unasked; of a model that has no family, nothing."""
    return next((family.KEEP for family in FAMILIES if transformer == family.TRANSFORMER), ())
