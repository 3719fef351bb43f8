"""Tiny seeded models of every family, as transformers saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
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
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=32)),
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
}


def make_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A float32 model whose weights BF16 can hold; norms and biases are random, too."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.copy_(1 + torch.randn_like(p) * 0.1)
            elif name.endswith("bias"):
                p.normal_(std=0.1)
            p.copy_(p.bfloat16().float())
    return model


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
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
