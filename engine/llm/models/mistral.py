"""Mistral: Llama with a window over all layers, or none."""

from __future__ import annotations

from transformers import MistralConfig

from ..decoder_config import DecoderConfig
from ..hf_config import read_attention, read_common, read_layers, read_rope

ARCHITECTURES = ("MistralForCausalLM",)


def read_config(hf: MistralConfig) -> DecoderConfig:
    return DecoderConfig(
        **read_common(hf),
        attention=read_attention(hf, qkv_bias=False, out_bias=False),
        layers=read_layers(hf, windowed="all"),
        ropes=(read_rope(hf),),
    )
