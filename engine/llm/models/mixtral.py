"""Mixtral: softmax top-k routing with renormalized weights; checkpoints say `block_sparse_moe`, trainers `mlp`."""

from __future__ import annotations

from transformers import MixtralConfig

from ....moe import MoeConfig
from ..decoder_config import DecoderConfig, ModuleNames
from ..hf_config import read_activation, read_attention, read_common, read_layers, read_rope

ARCHITECTURES = ("MixtralForCausalLM",)
NAMES = ModuleNames("block_sparse_moe", projections=("w1", "w3", "w2"), renames=((".mlp.", ".block_sparse_moe."),))


def read_config(hf: MixtralConfig) -> DecoderConfig:
    moe = MoeConfig(
        num_experts=hf.num_local_experts,
        top_k=hf.num_experts_per_tok,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        activation=read_activation(hf),
    )
    return DecoderConfig(
        **read_common(hf),
        attention=read_attention(hf, qkv_bias=False, out_bias=False),
        layers=read_layers(hf, windowed="all"),
        ropes=(read_rope(hf),),
        moe=moe,
        names=NAMES,
    )
