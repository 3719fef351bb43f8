"""Gemma 3 (text): Gemma 2 with q/k norms, and another rope in windowed layers."""

from __future__ import annotations

from transformers import Gemma3TextConfig

from ....quant import UnsupportedError
from ..decoder_config import DecoderConfig
from ..hf_config import read_attention, read_layers, read_rope
from .gemma2 import read_gemma

ARCHITECTURES = ("Gemma3ForCausalLM",)
LAYER_TYPES = ("sliding_attention", "full_attention")


def read_config(hf: Gemma3TextConfig) -> DecoderConfig:
    if hf.attn_logit_softcapping is not None:  # transformers reads it and leaves it out of the sum
        raise UnsupportedError(f"attn_logit_softcapping {hf.attn_logit_softcapping}", ["Gemma 3 has none: null"])
    return DecoderConfig(
        **read_gemma(hf),
        attention=read_attention(hf, scale=hf.query_pre_attn_scalar**-0.5, qk_norm="head"),
        layers=read_layers(hf, windowed="by type", ropes=LAYER_TYPES),
        ropes=tuple(read_rope(hf, layer_type) for layer_type in LAYER_TYPES),
    )
