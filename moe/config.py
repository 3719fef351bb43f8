"""`MoeConfig`: the shape of a routed-experts layer and of its router."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from ..quant import ConfigError
from .activation import ActivationName


class MoeConfig(Struct, frozen=True):
    """`scoring` turns router logits into scores; `renormalize` makes the top-k weights sum to one.

    `n_group`, `topk_group`: experts are chosen from the best groups only (DeepSeek-V3); 1 and 1 switch that off.
    `swiglu_limit`, `swiglu_alpha`: of the activation "clamped_swiglu"; `bias`: w13 and w2 have one (gpt-oss).
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
    activation: ActivationName = "silu"
    swiglu_limit: float = 7.0
    swiglu_alpha: float = 1.702
    bias: bool = False

    def __post_init__(self) -> None:
        if self.num_experts % self.n_group or not 1 <= self.topk_group <= self.n_group:
            raise ConfigError(
                f"{self.num_experts} experts in n_group={self.n_group} groups, topk_group={self.topk_group}: groups "
                "are equal, and between one and all of them are chosen"
            )
        reachable = self.num_experts // self.n_group * self.topk_group
        if not 1 <= self.top_k <= reachable:
            raise ConfigError(f"top_k={self.top_k}, but a token can reach {reachable} experts")
