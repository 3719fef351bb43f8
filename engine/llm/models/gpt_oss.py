"""gpt-oss: attention sinks, biases everywhere, a clamped SwiGLU, a window in every other layer. BF16 weights only."""

from __future__ import annotations

from transformers import GptOssConfig

from ....moe import MoeConfig
from ....quant import JoinedLayout
from ..decoder_config import DecoderConfig, ModuleNames, RouterConfig
from ..hf_config import read_attention, read_common, read_layers, read_rope

ARCHITECTURES = ("GptOssForCausalLM",)
NAMES = ModuleNames(router="router", joined_experts=JoinedLayout(transposed=True, interleaved=True))


def read_config(hf: GptOssConfig) -> DecoderConfig:
    moe = MoeConfig(
        num_experts=hf.num_local_experts,
        top_k=hf.num_experts_per_tok,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        activation="clamped_swiglu",
        swiglu_limit=hf.swiglu_limit,
        swiglu_alpha=hf.swiglu_alpha,
        bias=True,
    )
    return DecoderConfig(
        **read_common(hf),
        attention=read_attention(hf, sinks=True),
        layers=read_layers(hf, windowed="by type"),
        ropes=(read_rope(hf),),
        norm="rms_wide",
        moe=moe,
        router=RouterConfig(bias=True),
        names=NAMES,
    )
