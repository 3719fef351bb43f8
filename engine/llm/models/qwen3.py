"""Qwen3: dense, RMS norm over every head of q and k."""

from __future__ import annotations

from transformers import Qwen3Config

from ..decoder_config import DecoderConfig
from ..hf_config import read_attention, read_common, read_layers, read_rope

ARCHITECTURES = ("Qwen3ForCausalLM",)


def read_config(hf: Qwen3Config) -> DecoderConfig:
    return DecoderConfig(
        **read_common(hf),
        attention=read_attention(hf, qk_norm="head"),
        layers=read_layers(hf, windowed="by type"),
        ropes=(read_rope(hf),),
    )
