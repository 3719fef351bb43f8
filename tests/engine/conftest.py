"""Tiny seeded models of every family, as transformers saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

COMMON = {
    "vocab_size": 200,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "eos_token_id": None,
    "initializer_range": 0.2,  # logits with some contrast
}
WINDOW = 5  # shorter than the longest prompt
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
ROUTED = {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
GROUPED = {"n_group": 4, "topk_group": 2, "n_shared_experts": 2, "routed_scaling_factor": 1.5}
LATENT = {
    **COMMON,
    **ROUTED,
    **GROUPED,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**COMMON, attention_bias=True, mlp_bias=True)),
    "llama-tied-rope3": lambda: LlamaForCausalLM(
        LlamaConfig(
            **COMMON,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        )
    ),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=None)),
    "mistral-window": lambda: MistralForCausalLM(MistralConfig(**COMMON, sliding_window=WINDOW)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON)),
    "qwen2-window": lambda: Qwen2ForCausalLM(
        Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=32)),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(
            **COMMON,
            head_dim=32,
            query_pre_attn_scalar=24,
            sliding_window=WINDOW,
            attn_logit_softcapping=1.0,
            final_logit_softcapping=3.0,
        )
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **COMMON,
            head_dim=32,
            query_pre_attn_scalar=24,
            sliding_window=WINDOW,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        )
    ),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **COMMON,
            head_dim=32,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=32,
            norm_topk_prob=False,
            mlp_only_layers=[1],
        )
    ),
    "qwen2_moe": lambda: Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            **COMMON,
            num_experts=8,
            num_experts_per_tok=3,
            moe_intermediate_size=32,
            shared_expert_intermediate_size=48,
            mlp_only_layers=[1],
        )
    ),
    "olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**COMMON, num_experts=8, num_experts_per_tok=3, pad_token_id=None)),
    "glm4_moe": lambda: Glm4MoeForCausalLM(
        Glm4MoeConfig(**COMMON, **ROUTED, **GROUPED, head_dim=32, attention_bias=True, use_qk_norm=True)
    ),
    "deepseek_v3": lambda: DeepseekV3ForCausalLM(DeepseekV3Config(**LATENT, q_lora_rank=48, attention_bias=True)),
    "deepseek_v3-without-q-latent": lambda: DeepseekV3ForCausalLM(
        DeepseekV3Config(**LATENT, q_lora_rank=None, rope_interleave=False)
    ),
    "gpt_oss": lambda: GptOssForCausalLM(
        GptOssConfig(
            **COMMON,
            head_dim=32,
            num_local_experts=8,
            num_experts_per_tok=3,
            sliding_window=WINDOW,
            swiglu_limit=1.5,  # within the reach of tiny activations
            rope_parameters={**YARN, "truncate": False},
        )
    ),
}
DISTINCT = [family for family in FAMILIES if "-" not in family]


def make_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A float32 model whose weights BF16 can hold; norms and biases are random, too."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(p.mean() + torch.randn_like(p) * 0.1)  # around Gemma's 0, or 1
            elif name.endswith(("bias", "sinks")):
                p.normal_(std=0.1)
            p.copy_(p.bfloat16().float())
        for name, b in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                b.copy_((torch.arange(len(b)).cos() * 0.1).bfloat16())
    return model


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=DISTINCT)
def distinct_family(request: pytest.FixtureRequest) -> str:
    """The families without their variants, which differ in arithmetic, not in names."""
    return request.param


@pytest.fixture(params=[family for family in DISTINCT if family != "gpt_oss"])
def unbiased_family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def hf_model() -> Callable[..., PreTrainedModel]:
    return make_model


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Save a model as a BF16 folder; `shards` splits it into several files with an index."""

    def write(model: PreTrainedModel, name: str = "model", max_shard_size: str = "1GB") -> Path:
        inv_freq = {n: b.clone() for n, b in model.named_buffers()}  # `.to` would round them
        model.to(torch.bfloat16).save_pretrained(tmp_path / name, max_shard_size=max_shard_size)
        model.to(torch.float32)
        for n, b in model.named_buffers():
            b.copy_(inv_freq[n])
        return tmp_path / name

    return write
