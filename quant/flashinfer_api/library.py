"""What the installed FlashInfer offers, told from its signatures: version numbers say less."""

from __future__ import annotations

import inspect
import logging
from functools import cache
from types import ModuleType
from typing import Any, get_args

import torch
from msgspec import Struct

log = logging.getLogger("rollmill")


class FlashInfer(Struct, frozen=True):
    """One installed FlashInfer.

    `row_alpha`: `mm_fp4` takes an alpha a row of the activations (the cute-dsl backend; since 0.7.1).
    `routing_pairs`: routed MoE entries take (ids, float32 weights); else ids packed with BF16 weights.
    `declares_scale_layout`: NVFP4 MoE entries want to be told how activation scales lie.
    `fp8_per_tensor_routed`, `fp8_per_channel`: MoE entries for FP8 with our own router, static or per token.
    """

    version: str
    row_alpha: bool
    routing_pairs: bool
    declares_scale_layout: bool
    fp8_per_tensor_routed: bool
    fp8_per_channel: bool


@cache
def find_flashinfer() -> FlashInfer | None:
    """The installed FlashInfer; None without one, or where it cannot be imported, which is logged."""
    try:
        import flashinfer
    except ImportError as error:
        log.warning("flashinfer cannot be imported: %s", error)
        return None
    return describe(flashinfer)


def import_flashinfer() -> Any:
    """The `flashinfer` module; untyped, since versions differ."""
    import flashinfer

    return flashinfer


def describe(flashinfer: ModuleType) -> FlashInfer:
    """Read the features off the signatures of one `flashinfer` module."""
    moe = flashinfer.fused_moe
    routed = inspect.signature(moe.trtllm_fp4_block_scale_routed_moe).parameters
    return FlashInfer(
        version=flashinfer.__version__,
        # the companion of the alpha a row: they came together
        row_alpha="out_scale" in inspect.signature(flashinfer.nvfp4_quantize).parameters,
        routing_pairs=takes_pairs(moe.trtllm_fp4_block_scale_routed_moe),
        declares_scale_layout="hidden_states_scale_layout" in routed,
        fp8_per_tensor_routed=hasattr(moe, "trtllm_fp8_per_tensor_scale_routed_moe"),
        fp8_per_channel=hasattr(moe, "trtllm_fp8_per_channel_scale_routed_moe"),
    )


def takes_pairs(routed_moe: object) -> bool:
    """Whether `topk_ids` of a routed MoE entry may be a pair (ids, weights)."""
    annotation = inspect.signature(routed_moe).parameters["topk_ids"].annotation  # pyright: ignore[reportArgumentType]
    return any(part is not torch.Tensor for part in get_args(annotation))
