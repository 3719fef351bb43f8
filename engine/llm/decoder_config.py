"""`DecoderConfig`: what the decoder needs to know of a checkpoint, whatever family it is of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from msgspec import Struct
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from ...moe import MoeConfig
from ...quant import UnsupportedError


class ModuleNames(Struct, frozen=True):
    """How a family's checkpoints name what differs; `renames` map a trainer's names onto the checkpoint's."""

    moe_block: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    renames: tuple[tuple[str, str], ...] = ()


class DecoderConfig(Struct, frozen=True):
    """A pre-norm decoder with grouped-query attention, RoPE, and an MLP or routed experts in every layer."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position: int
    inv_freq: torch.Tensor  # float32 [head_dim / 2]
    rope_scaling: float
    tied: bool
    qk_norm: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    moe: MoeConfig | None = None
    dense_layers: frozenset[int] = frozenset()  # layers of an MoE model with a plain MLP
    names: ModuleNames = ModuleNames()


class Family(Protocol):
    """One file in `models/`: the architectures it reads, and how."""

    @property
    def ARCHITECTURES(self) -> tuple[str, ...]: ...

    def read_config(self, hf: Any) -> DecoderConfig: ...


def read_common(hf: Any) -> Mapping[str, Any]:
    """The fields that all families share, from a transformers config."""
    if getattr(hf, "sliding_window", None) and getattr(hf, "use_sliding_window", True):
        raise UnsupportedError(
            f"sliding-window attention ({hf.sliding_window} tokens)",
            ["only full attention is computed; set sliding_window to null in config.json to use that"],
        )
    if hf.hidden_act != "silu":
        raise UnsupportedError(f"hidden_act {hf.hidden_act!r}", ["known: silu"])
    inv_freq, scaling = rope_frequencies(hf)
    return {
        "vocab_size": hf.vocab_size,
        "hidden_size": hf.hidden_size,
        "intermediate_size": hf.intermediate_size,
        "num_layers": hf.num_hidden_layers,
        "num_heads": hf.num_attention_heads,
        "num_kv_heads": hf.num_key_value_heads,
        "head_dim": head_dim(hf),
        "rms_norm_eps": hf.rms_norm_eps,
        "max_position": hf.max_position_embeddings,
        "inv_freq": inv_freq,
        "rope_scaling": scaling,
        "tied": hf.tie_word_embeddings,
        "attention_bias": getattr(hf, "attention_bias", False),
    }


def head_dim(hf: Any) -> int:
    return getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads


def rope_frequencies(hf: Any) -> tuple[torch.Tensor, float]:
    """Inverse frequencies float32 [head_dim / 2] and the factor on cos and sin; scaled kinds are transformers' own."""
    kind = hf.rope_parameters.get("rope_type", "default")
    if kind == "default":
        exponent = torch.arange(0, head_dim(hf), 2, dtype=torch.float32) / head_dim(hf)
        return 1.0 / (hf.rope_parameters["rope_theta"] ** exponent), 1.0
    if kind not in ("linear", "llama3", "yarn"):
        raise UnsupportedError(f"rope_type {kind!r}", ["known: default, linear, llama3, yarn"])
    return ROPE_INIT_FUNCTIONS[kind](hf, torch.device("cpu"))
