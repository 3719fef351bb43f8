"""DeepSeek-V3: latent attention, grouped sigmoid routing with a correction bias, shared experts."""

from __future__ import annotations

import math
from typing import Any

from msgspec.structs import replace

from ....moe import MoeConfig
from ..decoder_config import DecoderConfig, LatentConfig, ModuleNames, RouterConfig, SharedExpertConfig
from ..hf_config import read_activation, read_attention, read_common, read_layers, read_rope

ARCHITECTURES = ("DeepseekV3ForCausalLM",)
ROUTER = RouterConfig(correction_bias=True, float32=True)
NO_KV_SCALES = "latent attention caches keys and values unquantized"


def read_config(hf: Any) -> DecoderConfig:
    latent = LatentConfig(hf.q_lora_rank, hf.kv_lora_rank, hf.qk_nope_head_dim, hf.qk_rope_head_dim, hf.v_head_dim)
    names = ignore_extra_layers(hf)
    kv_scales = tuple((f"*.{name}", NO_KV_SCALES) for name in ("k_scale", "v_scale"))
    return DecoderConfig(
        **read_common(hf),
        attention=read_attention(hf, num_kv_heads=hf.num_attention_heads, scale=attention_scale(hf), latent=latent),
        layers=read_layers(hf, dense=range(hf.first_k_dense_replace)),
        ropes=(read_rope(hf, interleaved=hf.rope_interleave),),
        moe=read_moe(hf),
        router=ROUTER,
        shared=read_shared(hf),
        names=replace(names, ignored=(*names.ignored, *kv_scales)),
    )


def attention_scale(hf: Any) -> float:
    """key_dim^-0.5, times YaRN's (0.1 mscale_all_dim ln(factor) + 1)^2 where the context is scaled."""
    scale, rope = (hf.qk_nope_head_dim + hf.qk_rope_head_dim) ** -0.5, hf.rope_parameters
    mscale, factor = rope.get("mscale_all_dim", 0), rope.get("factor", 1)
    if rope.get("rope_type", "default") == "default" or not mscale or factor <= 1:
        return scale
    return scale * (0.1 * mscale * math.log(factor) + 1) ** 2


def read_moe(hf: Any) -> MoeConfig:
    return MoeConfig(
        num_experts=hf.n_routed_experts,
        top_k=hf.num_experts_per_tok,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.moe_intermediate_size,
        scoring="sigmoid",
        renormalize=hf.norm_topk_prob,
        n_group=hf.n_group,
        topk_group=hf.topk_group,
        routed_scaling_factor=hf.routed_scaling_factor,
        activation=read_activation(hf),
    )


def read_shared(hf: Any) -> SharedExpertConfig:
    """Shared experts are computed, and stored, as one that is as wide as all of them."""
    return SharedExpertConfig(hf.moe_intermediate_size * hf.n_shared_experts)


def ignore_extra_layers(hf: Any) -> ModuleNames:
    """Checkpoints keep the layers that predict further tokens behind the decoder's own."""
    first, count = hf.num_hidden_layers, getattr(hf, "num_nextn_predict_layers", None) or 0
    why = "layers that predict further tokens are not computed"
    return ModuleNames(ignored=tuple((f"model.layers.{first + i}.*", why) for i in range(count)))
