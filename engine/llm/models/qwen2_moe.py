"""Qwen2-MoE: Qwen3-MoE's routing, and a shared expert behind a sigmoid gate."""

from __future__ import annotations

from transformers import Qwen2MoeConfig

from ..decoder_config import DecoderConfig, SharedExpertConfig
from ..hf_config import read_attention, read_common, read_layers, read_rope
from .qwen3_moe import dense_layers, read_moe

ARCHITECTURES = ("Qwen2MoeForCausalLM",)


def read_config(hf: Qwen2MoeConfig) -> DecoderConfig:
    return DecoderConfig(
        **read_common(hf),
        attention=read_attention(hf, qkv_bias=hf.qkv_bias, out_bias=False),
        layers=read_layers(hf, windowed="by type", dense=dense_layers(hf)),
        ropes=(read_rope(hf),),
        moe=read_moe(hf),
        shared=SharedExpertConfig(hf.shared_expert_intermediate_size, "shared_expert", gate="shared_expert_gate"),
    )
