"""What attention of one layer is, the protocol that layers call, and attention within whole sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from msgspec import Struct
from torch import Tensor


class AttentionSpec(Struct, frozen=True):
    """One layer's attention: softmax(scale * q k^T) v over the tokens that a token may see.

    `window`: a token sees itself and the `window - 1` before it; None: all before it. `softcap`: scores become
    softcap * tanh(scores / softcap) (Gemma 2). A sink (gpt-oss) is a logit a head that takes part in the softmax
    and has no value.
    """

    layer: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False


class Attend(Protocol):
    """Attention for the tokens at hand."""

    def __call__(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        """q [num_tokens, heads, key_dim], k and v [num_tokens, kv_heads, key_dim | value_dim], sinks [heads].

        -> [num_tokens, heads, value_dim].
        """
        ...


class WholeSequences:
    """Causal attention within each of several whole sequences, without a cache: the reference."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = list(lengths)

    def __call__(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None) -> Tensor:
        parts = zip(q.split(self.lengths), k.split(self.lengths), v.split(self.lengths), strict=True)
        return torch.cat([_attend_whole(spec, *part, sinks) for part in parts])


def _attend_whole(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> Tensor:
    """Scores and softmax in float32, rounded to q's dtype before the product with v."""
    grouped = q.unflatten(1, (spec.num_kv_heads, -1)).permute(1, 2, 0, 3)  # [kv_heads, group, num_tokens, key_dim]
    scores = (grouped @ k.permute(1, 2, 0)[:, None]).float() * spec.scale
    if spec.softcap is not None:
        scores = (scores / spec.softcap).tanh() * spec.softcap
    at = torch.arange(len(q), device=q.device)
    visible = at <= at[:, None]
    if spec.window is not None:
        visible &= at > at[:, None] - spec.window
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.float().view(spec.num_kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(-1)[..., : len(q)].to(q.dtype)
    return (weights @ v.transpose(0, 1)[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
