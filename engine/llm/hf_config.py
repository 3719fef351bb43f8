"""Reads what families have in common from a transformers config; what cannot be computed is refused here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ...moe.activation import ActivationName
from ...quant import UnsupportedError
from .decoder_config import AttentionConfig, LayerKind
from .layers.rope import Rope

ACTIVATIONS: Mapping[str, ActivationName] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
SCALED_ROPES = ("linear", "llama3", "yarn")
WINDOWED = {"full_attention": False, "sliding_attention": True}


def read_common(hf: Any) -> dict[str, Any]:
    """Sizes, activation and tying."""
    return {
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "intermediate_size": hf.intermediate_size,
        "rms_norm_eps": hf.rms_norm_eps,
        "max_position": hf.max_position_embeddings,
        "tied": hf.tie_word_embeddings,
        "activation": read_activation(hf),
    }


def read_activation(hf: Any) -> ActivationName:
    name = getattr(hf, "hidden_activation", None) or hf.hidden_act
    if name not in ACTIVATIONS:
        raise UnsupportedError(f"hidden_act {name!r}", [f"known: {', '.join(ACTIVATIONS)}"])
    return ACTIVATIONS[name]


def read_attention(hf: Any, **differing: Any) -> AttentionConfig:
    """Grouped-query attention; `differing` are fields of `AttentionConfig` that are not Llama's."""
    bias = getattr(hf, "attention_bias", False)
    llama = {
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": hf.num_key_value_heads,
        "head_dim": head_dim(hf),
        "scale": head_dim(hf) ** -0.5,
        "qkv_bias": bias,
        "out_bias": bias,
    }
    return AttentionConfig(**(llama | differing))


def head_dim(hf: Any) -> int:
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def read_layers(
    hf: Any,
    *,
    windowed: Literal["all", "by type"] | None = None,
    dense: Collection[int] = (),
    ropes: Sequence[str] = (),
) -> tuple[LayerKind, ...]:
    """What differs from layer to layer.

    `windowed`: the family honours `sliding_window` in all layers, or in those that `layer_types` names.
    `dense`: layers of an MoE model with a plain MLP. `ropes`: layer types, in the order of `DecoderConfig.ropes`.
    """
    types = hf.layer_types if windowed == "by type" else None
    window = (hf.sliding_window or None) if windowed else None
    unknown = sorted(set(types or ()) - set(WINDOWED))
    if unknown:
        raise UnsupportedError(f"layer_types {', '.join(unknown)}", [f"known: {', '.join(WINDOWED)}"])
    return tuple(
        LayerKind(
            rope=ropes.index(types[layer]) if types and ropes else 0,
            window=window if types is None or WINDOWED[types[layer]] else None,
            dense=layer in dense,
        )
        for layer in range(hf.num_hidden_layers)
    )


def read_rope(hf: Any, layer_type: str | None = None, *, interleaved: bool = False) -> Rope:
    """Frequencies over the rotary part of a head; scaled kinds are transformers' own.

    `layer_type`: the entry of `rope_parameters` in families that have one for each type of layer.
    """
    parameters = hf.rope_parameters if layer_type is None else hf.rope_parameters[layer_type]
    kind = parameters.get("rope_type", "default")
    if kind == "default":
        dim = int(head_dim(hf) * parameters.get("partial_rotary_factor", 1.0))
        exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
        return Rope(1.0 / (parameters["rope_theta"] ** exponent), 1.0, interleaved)
    if kind not in SCALED_ROPES:
        raise UnsupportedError(f"rope_type {kind!r}", [f"known: default, {', '.join(SCALED_ROPES)}"])
    inv_freq, factor = ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"), layer_type=layer_type)
    return Rope(inv_freq, factor, interleaved)
