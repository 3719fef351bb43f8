"""Qwen3-MoE: softmax top-k routing, some layers may be dense."""

from __future__ import annotations

from transformers import Qwen3MoeConfig

from ....moe import MoeConfig
from ..decoder_config import DecoderConfig, read_common

ARCHITECTURES = ("Qwen3MoeForCausalLM",)


def read_config(hf: Qwen3MoeConfig) -> DecoderConfig:
    moe = MoeConfig(
        num_experts=hf.num_experts,
        top_k=hf.num_experts_per_tok,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.moe_intermediate_size,
        renormalize=hf.norm_topk_prob,
    )
    dense = frozenset(
        layer
        for layer in range(hf.num_hidden_layers)
        if layer in (hf.mlp_only_layers or ()) or (layer + 1) % hf.decoder_sparse_step
    )
    return DecoderConfig(**read_common(hf), qk_norm=True, moe=moe, dense_layers=dense)
