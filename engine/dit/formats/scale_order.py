"""In which order block scales lie, measured on the values: only beside its own codes does a scale tell of them.

A block's scale follows its largest value, which takes the code 6; the other 15 are divided by the same scale. So the
larger the scale, the smaller the other codes: their mean square falls with log(scale). On normal weights the two
correlate by -0.6, and beside the scales of other blocks by nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ....quant.layout import unswizzle_scales
from ....quant.numerics import E4M3_MIN, decode_e2m1, decode_fp8
from .files import WeightFiles
from .layers import FileLayer
from .layout import LINEAR, SCALE_ORDERS, ScaleOrder

BAND = 128  # rows of one row of tiles: as many bytes, of the same scales, in either order
NUM_LAYERS, NUM_ROWS = 8, 4 * BAND  # what is read

# An order is right beyond doubt if its correlation is plainly negative, further from 0 than chance gets
# (`STANDARD_ERRORS` of 1 / sqrt(blocks)), and `LEAD` times that of the other order, which has some of it where weights
# repeat with a period. Everything else is no answer.
CORRELATION, STANDARD_ERRORS, LEAD = -0.1, 20.0, 3.0


def find_scale_order(files: WeightFiles, prefix: str, layers: Sequence[FileLayer]) -> ScaleOrder | None:
    """The order of the layers' scales, None where values do not tell beyond doubt; the shapes admit both."""
    count = min(NUM_LAYERS, len(layers))
    samples = [_Sample(files, prefix, layers[i * len(layers) // count]) for i in range(count)]
    num_blocks = sum(sample.num_blocks for sample in samples)
    found: list[tuple[float, ScaleOrder]] = []
    for order in SCALE_ORDERS:
        found.append((_correlation([sample.deviations(order) for sample in samples]), order))
    return _decided(found, num_blocks)


def _decided(found: Sequence[tuple[float, ScaleOrder]], num_blocks: int) -> ScaleOrder | None:
    (best, order), (other, _) = sorted(found)
    clear = best <= CORRELATION and -best * num_blocks**0.5 >= STANDARD_ERRORS and abs(other) * LEAD <= -best
    return order if clear else None


class _Sample:
    """The first rows of one layer, whole bands."""

    def __init__(self, files: WeightFiles, prefix: str, layer: FileLayer) -> None:
        rows = min(layer.shape("weight_scale")[0], NUM_ROWS)
        codes, scales = (files.read_rows(f"{prefix}{layer.name}.{key}", rows) for key in ("weight", "weight_scale"))
        blocks = decode_e2m1(codes).square_().unflatten(-1, (-1, 16))  # [rows, cols // 16, 16]
        self.rest = blocks.sum(-1) - blocks.amax(-1)  # of the other 15, whatever their nibbles' order
        self.scales = decode_fp8(scales).nan_to_num_(0.0).clamp_(min=E4M3_MIN).log_()

    @property
    def num_blocks(self) -> int:
        return self.rest.numel()

    def deviations(self, order: ScaleOrder) -> tuple[Tensor, Tensor]:
        """log(scale) and the codes' size, block by block, both from their mean in the band."""
        scales = self.scales if order == LINEAR else unswizzle_scales(self.scales, *self.scales.shape)
        return _centered(scales), _centered(self.rest)


def _centered(values: Tensor) -> Tensor:
    bands = values.unflatten(0, (-1, BAND)).flatten(1)
    return (bands - bands.mean(1, keepdim=True)).flatten()


def _correlation(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    scales, rest = (torch.cat(side).double() for side in zip(*pairs, strict=True))
    size = scales.norm() * rest.norm()
    return float(scales @ rest / size) if size > 0 else 0.0
