"""A router, routed experts, and an expert that all tokens share where there is one."""

from __future__ import annotations

import torch
from torch import Tensor

from ....moe import Choices, router_logits, sigmoid, summed
from ....quant import FP8Rows, Plain, Reads, values_of
from ..decoder_config import DecoderConfig, SharedExpertConfig
from ..parts import Parts
from .mlp import MLP


class SparseMLP:
    """The sum of a token's `top_k` experts, and of its shared expert."""

    def __init__(self, parts: Parts, config: DecoderConfig, layer: int) -> None:
        assert config.moe is not None
        prefix = f"model.layers.{layer}.{config.names.moe_block}"
        router = f"{prefix}.{config.names.router}"
        rows, self.dtype = config.moe.num_experts, torch.float32 if config.router.float32 else None
        self.gate = parts.plain(router, rows, config.hidden_size, dtype=self.dtype)
        self.matmul, bias = parts.matmul(self.dtype), Plain(tensor="bias")
        self.gate_bias = parts.plain(router, rows, scheme=bias, dtype=self.dtype) if config.router.bias else None
        correction = Plain(torch.float32, "e_score_correction_bias")
        self.correction_bias = parts.plain(router, rows, scheme=correction) if config.router.correction_bias else None
        self.experts = parts.experts(config, f"{prefix}.experts")
        self.shared = None if config.shared is None else SharedExpert(parts, config, config.shared, prefix)

    @property
    def reads(self) -> Reads:
        """What it reads of its input: the router reads values."""
        return "both" if self.experts.takes_codes else "values"

    def __call__(self, x: Tensor | FP8Rows, routed: list[Tensor] | None) -> Tensor | Choices:
        """Where only experts are to be summed, that may be left to who comes next."""
        values = values_of(x)
        values = values if self.dtype is None else values.to(self.dtype)
        logits = router_logits(values, self.gate, self.gate_bias, self.matmul)
        out, ids = self.experts.dispatch(x, logits, self.correction_bias)
        if routed is not None:
            routed.append(ids)
        return out if self.shared is None else summed(out) + self.shared(x)


class SharedExpert:
    """An MLP that every token takes; scaled by sigmoid(gate(x)) where it has a gate (Qwen2-MoE)."""

    def __init__(self, parts: Parts, config: DecoderConfig, shared: SharedExpertConfig, prefix: str) -> None:
        self.mlp = MLP(parts, config, f"{prefix}.{shared.module}.", shared.intermediate_size)
        self.matmul = parts.matmul()
        self.gate = None if shared.gate is None else parts.plain(f"{prefix}.{shared.gate}", 1, config.hidden_size)

    def __call__(self, x: Tensor | FP8Rows) -> Tensor:
        out = self.mlp(x)
        return out if self.gate is None else sigmoid(self.matmul(values_of(x), self.gate).float()).to(out.dtype) * out
