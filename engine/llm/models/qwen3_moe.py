"""Qwen3-MoE: softmax top-k routing, some layers may be dense."""

from __future__ import annotations

from typing import Any

from transformers import Qwen3MoeConfig

from ....moe import MoeConfig
from ..decoder_config import DecoderConfig
from ..hf_config import read_activation, read_attention, read_common, read_layers, read_rope

ARCHITECTURES = ("Qwen3MoeForCausalLM",)


def read_config(hf: Qwen3MoeConfig) -> DecoderConfig:
    return DecoderConfig(
        **read_common(hf),
        attention=read_attention(hf, qk_norm="head"),
        layers=read_layers(hf, windowed="all", dense=dense_layers(hf)),
        ropes=(read_rope(hf),),
        moe=read_moe(hf),
    )


def read_moe(hf: Any) -> MoeConfig:
    return MoeConfig(
        num_experts=hf.num_experts,
        top_k=hf.num_experts_per_tok,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.moe_intermediate_size,
        renormalize=hf.norm_topk_prob,
        activation=read_activation(hf),
    )


def dense_layers(hf: Any) -> frozenset[int]:
    """Those that the config names, and those between every `decoder_sparse_step`-th."""
    named, step = hf.mlp_only_layers or (), hf.decoder_sparse_step
    return frozenset(layer for layer in range(hf.num_hidden_layers) if layer in named or (layer + 1) % step)
