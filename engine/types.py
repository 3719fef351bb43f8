"""What comes back from an engine."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct
from torch import Tensor

FinishReason = Literal["stop", "length", "abort"]


class VersionSpan(Struct, frozen=True):
    """Tokens [start, end) of a completion were sampled from this policy version."""

    version: str
    start: int
    end: int


class Completion(Struct, frozen=True):
    """One sampled continuation of one prompt.

    `logprobs`: float32 [len(token_ids)], under the sampling temperature, without top-p or top-k renormalization.
    `routed_experts`: int16 [prompt + completion - 1, num_moe_layers, top_k], when asked for.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str | None
    finish_reason: FinishReason
    logprobs: Tensor | None
    weight_versions: list[VersionSpan]
    routed_experts: Tensor | None
    seed: int
