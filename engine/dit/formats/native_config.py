"""diffusers' config of FLUX.1 and FLUX.2 from the shapes of a file in Black Forest Labs' names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ....quant import ModelError, UnsupportedError
from .layout import Names

ROPE = {"flux1": [16, 56, 56], "flux2": [32, 32, 32, 32]}  # of the published models: heads of 128
TIMESTEP_CHANNELS = 256  # FLUX.1: a constant in diffusers

Shapes = Mapping[str, tuple[int, ...]]  # of weights as they are multiplied: [rows, cols]


def infer_config(names: Names, shapes: Shapes) -> dict[str, Any]:
    """`shapes`: module -> shape of its weight, norms included.

    `ModelError`: a module is missing; `UnsupportedError`: what the shapes cannot tell.
    """
    try:
        return _flux1(shapes) if names == "flux1" else _flux2(shapes)
    except KeyError as error:
        raise ModelError(f"a {names} file in Black Forest Labs' names without {error.args[0]}") from error


def _common(shapes: Shapes, names: Names) -> dict[str, Any]:
    hidden, joint = shapes["txt_in"]
    (head,) = shapes["double_blocks.0.img_attn.norm.query_norm"]
    in_channels, out_channels = shapes["img_in"][1], shapes["final_layer.linear"][0]
    return {
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": None if out_channels == in_channels else out_channels,
        "num_layers": _blocks(shapes, "double_blocks"),
        "num_single_layers": _blocks(shapes, "single_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": hidden // head,
        "joint_attention_dim": joint,
        "guidance_embeds": "guidance_in.in_layer" in shapes,
        "axes_dims_rope": _rope(names, head),
    }


def _flux1(shapes: Shapes) -> dict[str, Any]:
    channels = shapes["time_in.in_layer"][1]
    if channels != TIMESTEP_CHANNELS:
        raise UnsupportedError(f"FLUX.1 with {channels} timestep channels", [f"diffusers has {TIMESTEP_CHANNELS}"])
    pooled = shapes["vector_in.in_layer"][1]
    return {"_class_name": "FluxTransformer2DModel", **_common(shapes, "flux1"), "pooled_projection_dim": pooled}


def _flux2(shapes: Shapes) -> dict[str, Any]:
    hidden = shapes["txt_in"][0]
    return {
        "_class_name": "Flux2Transformer2DModel",
        **_common(shapes, "flux2"),
        "timestep_guidance_channels": shapes["time_in.in_layer"][1],
        "mlp_ratio": shapes["double_blocks.0.img_mlp.0"][0] / 2 / hidden,  # gate and up
        "rope_theta": 2000,
        "eps": 1e-6,
    }


def _blocks(shapes: Shapes, kind: str) -> int:
    numbers = {int(name.split(".")[1]) for name in shapes if name.startswith(f"{kind}.")}
    if numbers != set(range(len(numbers))):
        raise ModelError(f"{kind}: numbers {sorted(numbers)} have gaps")
    return len(numbers)


def _rope(names: Names, head: int) -> list[int]:
    """How rotary embeddings share a head: FLUX.2 in equal parts; FLUX.1's parts cannot be told from a file."""
    if head == sum(ROPE[names]):
        return ROPE[names]
    if names == "flux2" and head % 8 == 0:
        return [head // 4] * 4
    raise UnsupportedError(
        f"{names} with heads of {head}: how rotary embeddings share a head (axes_dims_rope) does not show in a file",
        [
            f"known: heads of {sum(ROPE[names])}",
            "say so: EngineConfig(base=...), a folder with the model's config.json",
        ],
    )
