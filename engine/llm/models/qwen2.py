"""Qwen2: dense, a bias on q, k and v only."""

from __future__ import annotations

from transformers import Qwen2Config

from ..decoder_config import DecoderConfig
from ..hf_config import read_attention, read_common, read_layers, read_rope

ARCHITECTURES = ("Qwen2ForCausalLM",)


def read_config(hf: Qwen2Config) -> DecoderConfig:
    return DecoderConfig(
        **read_common(hf),
        attention=read_attention(hf, qkv_bias=True, out_bias=False),
        layers=read_layers(hf, windowed="by type"),
        ropes=(read_rope(hf),),
    )
