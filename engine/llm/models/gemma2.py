"""Gemma 2: norms going in and out, soft caps on scores and logits, a window in every other layer."""

from __future__ import annotations

from typing import Any

from transformers import Gemma2Config

from ....quant import UnsupportedError
from ..decoder_config import DecoderConfig
from ..hf_config import read_attention, read_common, read_layers, read_rope

ARCHITECTURES = ("Gemma2ForCausalLM",)


def read_config(hf: Gemma2Config) -> DecoderConfig:
    return DecoderConfig(
        **read_gemma(hf),
        attention=read_attention(hf, scale=hf.query_pre_attn_scalar**-0.5, softcap=hf.attn_logit_softcapping),
        layers=read_layers(hf, windowed="by type"),
        ropes=(read_rope(hf),),
    )


def read_gemma(hf: Any) -> dict[str, Any]:
    """What Gemma 2 and 3 share."""
    if hf.use_bidirectional_attention:
        raise UnsupportedError("use_bidirectional_attention", ["attention is causal: it must be null or false"])
    return {
        **read_common(hf),
        "norm": "rms_offset",
        "sandwich_norms": True,
        "embed_scale": hf.hidden_size**0.5,
        "logit_softcap": hf.final_logit_softcapping,
    }
