"""A model of a real shape with random weights, which come layer by layer out of one GPU buffer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rollmill.engine.checkpoint import Checkpoint
from rollmill.engine.llm import engine as language_engine

QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "eos_token_id": None,
    "torch_dtype": "bfloat16",
}
WEIGHT_STD = 0.03


class RandomSource:
    """Yields the tensors of a Qwen3-MoE, experts stacked; every tensor is a view of one buffer."""

    def __init__(self, config: dict[str, Any], device: str = "cuda") -> None:
        self.config, self.device = config, device

    def names(self) -> set[str]:
        return set()

    def metadata(self) -> dict[str, str]:
        return {}

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        shapes = dict(shapes_of(self.config))
        size = max(torch.Size(shape).numel() for shape in shapes.values())
        buffer = torch.empty(size, dtype=torch.bfloat16, device=self.device)
        buffer.normal_(0, WEIGHT_STD, generator=torch.Generator(self.device).manual_seed(0))
        ones = torch.ones(self.config["hidden_size"], dtype=torch.bfloat16, device=self.device)
        for name, shape in shapes.items():
            yield name, ones[: shape[0]] if len(shape) == 1 else buffer[: torch.Size(shape).numel()].view(shape)


def shapes_of(c: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, inner, experts, dim = c["hidden_size"], c["moe_intermediate_size"], c["num_experts"], c["head_dim"]
    yield "model.embed_tokens.weight", (c["vocab_size"], hidden)
    for layer in range(c["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for proj, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"), ("v", "num_key_value_heads")):
            yield f"{prefix}self_attn.{proj}_proj.weight", (c[heads] * dim, hidden)
        yield prefix + "self_attn.o_proj.weight", (hidden, c["num_attention_heads"] * dim)
        yield from ((f"{prefix}self_attn.{n}_norm.weight", (dim,)) for n in "qk")
        yield from ((f"{prefix}{n}_layernorm.weight", (hidden,)) for n in ("input", "post_attention"))
        yield prefix + "mlp.gate.weight", (experts, hidden)
        yield prefix + "mlp.experts.gate_up_proj", (experts, 2 * inner, hidden)
        yield prefix + "mlp.experts.down_proj", (experts, hidden, inner)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (c["vocab_size"], hidden)


class RandomCheckpoint(Checkpoint):
    """A folder with a config.json and nothing else."""

    def __init__(self, path: str | Path) -> None:
        self.folder = Path(path)
        self.raw_config = json.loads((self.folder / "config.json").read_text())
        self.source = RandomSource(self.raw_config)  # pyright: ignore[reportAttributeAccessIssue]
        self.tensor_names = set()


def use_random_weights(folder: Path, **changes: Any) -> None:
    """Write Qwen3-30B-A3B's config into `folder`; engines opened from it get random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(QWEN3_30B_A3B | changes))
    language_engine.Checkpoint = RandomCheckpoint
