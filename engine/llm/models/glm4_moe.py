"""GLM-4.5: DeepSeek-V3's routing and shared experts over grouped-query attention; half of each head turns."""

from __future__ import annotations

from transformers import Glm4MoeConfig

from ..decoder_config import DecoderConfig
from ..hf_config import read_attention, read_common, read_layers, read_rope
from .deepseek_v3 import ROUTER, ignore_extra_layers, read_moe, read_shared

ARCHITECTURES = ("Glm4MoeForCausalLM",)


def read_config(hf: Glm4MoeConfig) -> DecoderConfig:
    return DecoderConfig(
        **read_common(hf),
        attention=read_attention(hf, out_bias=False, qk_norm="head" if hf.use_qk_norm else None),
        layers=read_layers(hf, dense=range(hf.first_k_dense_replace)),
        ropes=(read_rope(hf),),
        moe=read_moe(hf),
        router=ROUTER,
        shared=read_shared(hf),
        names=ignore_extra_layers(hf),
    )
