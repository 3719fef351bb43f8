"""Llama: dense, no q/k norm."""

from __future__ import annotations

from transformers import LlamaConfig

from ..decoder_config import DecoderConfig, read_common

ARCHITECTURES = ("LlamaForCausalLM",)


def read_config(hf: LlamaConfig) -> DecoderConfig:
    return DecoderConfig(**read_common(hf), mlp_bias=hf.mlp_bias)
