"""`MoeConfig`: the shape of a routed-experts layer and of its router."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class MoeConfig(Struct, frozen=True):
    """`scoring` turns router logits into scores; `renormalize` makes the top-k weights sum to one.

    `n_group`, `topk_group`: experts are chosen from the best groups only (DeepSeek-V3); 1 and 1 switch that off.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool = True
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0
    activation: Literal["silu"] = "silu"
