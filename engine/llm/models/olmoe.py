"""OLMoE: softmax top-k routing, RMS norm over whole rows of q and k."""

from __future__ import annotations

from transformers import OlmoeConfig

from ....moe import MoeConfig
from ....quant import UnsupportedError
from ..decoder_config import DecoderConfig
from ..hf_config import read_activation, read_attention, read_common, read_layers, read_rope

ARCHITECTURES = ("OlmoeForCausalLM",)


def read_config(hf: OlmoeConfig) -> DecoderConfig:
    if hf.clip_qkv is not None:
        raise UnsupportedError(f"clip_qkv {hf.clip_qkv}", ["q, k and v are not clipped: clip_qkv must be null"])
    moe = MoeConfig(
        num_experts=hf.num_experts,
        top_k=hf.num_experts_per_tok,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        renormalize=hf.norm_topk_prob,
        activation=read_activation(hf),
    )
    return DecoderConfig(
        **read_common(hf),
        attention=read_attention(hf, qk_norm="row"),
        layers=read_layers(hf),
        ropes=(read_rope(hf),),
        moe=moe,
    )
