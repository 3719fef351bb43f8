"""Qwen3: dense, RMS norm over every head of q and k."""

from __future__ import annotations

from transformers import Qwen3Config

from ..decoder_config import DecoderConfig, read_common

ARCHITECTURES = ("Qwen3ForCausalLM",)


def read_config(hf: Qwen3Config) -> DecoderConfig:
    return DecoderConfig(**read_common(hf), qk_norm=True)
