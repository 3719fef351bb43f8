"""NVFP4 activations through FlashInfer's quantizers, on Blackwell only."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from .. import numerics
from ..device import Capability
from ..errors import UnsupportedError
from .library import import_flashinfer

FIRST_SM = 100


def quantize_nvfp4(
    x: Tensor, encode: Tensor | None, layout: Literal["linear", "128x4"], capability: Capability
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x BF16 [M, K] -> codes uint8 [M, K / 2], E4M3 block scales as `layout` says, decode scale of a token or None.

    `encode` float32 [1] = 1 / input_scale: static. None: per token, float32 [M] = row amax / 2688. Scales: linear
    [M, K / 16], or 128x4 tiles, zero-padded to [ceil(M, 128), ceil(K / 16, 4)]. Bit-equal to `numerics`' activations
    where the environment asks FlashInfer for exact division, as an Engine does.
    `UnsupportedError` below sm100: FlashInfer's kernels are empty there and leave memory as it was, without an error.
    """
    if capability.sm is None or capability.sm < FIRST_SM:
        raise UnsupportedError(
            f"FlashInfer's NVFP4 quantizers on {capability}",
            [f"below sm{FIRST_SM} they return what lay in memory, and report no error"],
        )
    flashinfer = import_flashinfer()
    orders = flashinfer.SfLayout
    order = orders.layout_linear if layout == "linear" else orders.layout_128x4
    x = x.contiguous()
    if encode is not None:
        codes, scales = flashinfer.nvfp4_quantize(x, encode, sfLayout=order, do_shuffle=False)
        return codes, scales, None
    # not a scale of this tensor: the constant that makes a row's amax its decode scale
    unit = 1.0 / numerics.NVFP4_MAX
    codes, scales, token_scale = flashinfer.nvfp4_quantize(
        x, unit, sfLayout=order, do_shuffle=False, per_token_activation=True
    )
    return codes, scales, token_scale
