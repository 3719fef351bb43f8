"""Llama: dense, no q/k norm."""

from __future__ import annotations

from transformers import LlamaConfig

from ..decoder_config import DecoderConfig
from ..hf_config import read_attention, read_common, read_layers, read_rope

ARCHITECTURES = ("LlamaForCausalLM",)


def read_config(hf: LlamaConfig) -> DecoderConfig:
    return DecoderConfig(
        **read_common(hf),
        attention=read_attention(hf),
        layers=read_layers(hf),
        ropes=(read_rope(hf),),
        mlp_bias=hf.mlp_bias,
    )
