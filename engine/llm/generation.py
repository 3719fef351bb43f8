"""Batched generation: prefill every prompt once, then decode all its samples together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from msgspec import Struct, field
from torch import Tensor

from ..config import SamplingParams
from ..types import FinishReason
from .attention import WholeSequences
from .contiguous import Decode, KVCache, Prefill
from .decoder import Decoder
from .sampler import sample, seeded_uniforms


class Draft(Struct, eq=False):
    """One completion under way. `row` is its place in the batch."""

    prompt: Sequence[int]
    seed: int
    limit: int  # new tokens at the most
    uniforms: Tensor
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    routed: list[Tensor] = field(default_factory=list)  # [num_tokens, num_moe_layers, top_k] each
    finish_reason: FinishReason | None = None

    def accept(self, token: int, logprob: float, stop: frozenset[int]) -> None:
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        if token in stop:
            self.finish_reason = "stop"
        elif len(self.token_ids) == self.limit:
            self.finish_reason = "length"


def make_draft(prompt: Sequence[int], seed: int, params: SamplingParams, max_position: int) -> Draft:
    limit = min(params.max_new_tokens, max_position - len(prompt))
    return Draft(prompt, seed, limit, seeded_uniforms(seed, limit))


@torch.inference_mode()
def generate(
    model: Decoder,
    drafts: Sequence[Draft],
    params: SamplingParams,
    stop: frozenset[int],
    *,
    capture_routing: bool = False,
) -> None:
    """Complete the drafts in place. Drafts of one prompt must be neighbours: they share its prefill."""
    batch = _Batch(model, drafts, params, stop, capture_routing)
    batch.prefill()
    while batch.active:
        batch.decode()


class _Batch:
    """The drafts that still grow, row for row with the KV cache."""

    def __init__(
        self,
        model: Decoder,
        drafts: Sequence[Draft],
        params: SamplingParams,
        stop: frozenset[int],
        capture_routing: bool,
    ) -> None:
        self.model, self.params, self.stop = model, params, stop
        self.active = list(drafts)
        self.capture_routing = capture_routing and model.num_moe_layers > 0
        config = model.config
        capacity = max(len(draft.prompt) + draft.limit for draft in drafts)
        self.prompts = [
            draft.prompt for i, draft in enumerate(drafts) if i == 0 or draft.prompt is not drafts[i - 1].prompt
        ]
        self.cache = KVCache(
            config.num_layers,
            len(self.prompts),
            config.num_kv_heads,
            capacity,
            config.head_dim,
            model.dtype,
            model.device,
        )

    def prefill(self) -> None:
        """Run the distinct prompts once, then give every draft its prompt's row."""
        lengths = [len(prompt) for prompt in self.prompts]
        ids = torch.tensor([token for prompt in self.prompts for token in prompt], device=self.model.device)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(self.model.device)
        routed: list[Tensor] | None = [] if self.capture_routing else None
        hidden = self.model.hidden(ids, positions, Prefill(lengths, self.cache), routed)
        last = torch.tensor(lengths, device=self.model.device).cumsum(0) - 1
        logits = self.model.logits(hidden[last])
        rows = torch.tensor(self._rows_of_drafts(), device=self.model.device)
        self.cache.select(rows)
        if routed is not None:
            parts = _stacked(routed).split(lengths)
            for draft, row in zip(self.active, rows.tolist(), strict=True):
                draft.routed.append(parts[row])
        self._accept(logits[rows])

    def _rows_of_drafts(self) -> list[int]:
        rows, row = [], -1
        previous: Sequence[int] | None = None
        for draft in self.active:
            row += draft.prompt is not previous
            previous = draft.prompt
            rows.append(row)
        return rows

    def decode(self) -> None:
        """One more token for every active draft."""
        ids = torch.tensor([draft.token_ids[-1] for draft in self.active], device=self.model.device)
        positions = torch.tensor(
            [len(draft.prompt) + len(draft.token_ids) - 1 for draft in self.active], device=self.model.device
        )
        routed: list[Tensor] | None = [] if self.capture_routing else None
        hidden = self.model.hidden(ids, positions, Decode(self.cache, positions), routed)
        if routed is not None:
            for draft, row in zip(self.active, _stacked(routed), strict=True):
                draft.routed.append(row[None])
        self._accept(self.model.logits(hidden))

    def _accept(self, logits: Tensor) -> None:
        """Sample from logits [batch, vocab], then drop the drafts that have ended."""
        uniforms = torch.stack([draft.uniforms[len(draft.token_ids)] for draft in self.active])
        ids, logprobs = sample(logits, self.params, uniforms.to(logits.device))
        for draft, token, logprob in zip(self.active, ids.tolist(), logprobs.tolist(), strict=True):
            draft.accept(token, logprob, self.stop)
        growing = [row for row, draft in enumerate(self.active) if draft.finish_reason is None]
        if len(growing) < len(self.active):
            self.active = [self.active[row] for row in growing]
            self.cache.select(torch.tensor(growing, dtype=torch.long, device=logits.device))


def _stacked(routed: list[Tensor]) -> Tensor:
    """Expert ids a layer -> int16 [num_tokens, num_moe_layers, top_k]."""
    return torch.stack(routed, dim=1).to(torch.int16)


@torch.inference_mode()
def prompt_logits(model: Decoder, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits float32 [len(prompt), vocab] after every token of each prompt."""
    lengths = [len(prompt) for prompt in prompts]
    ids = torch.tensor([token for prompt in prompts for token in prompt], device=model.device)
    positions = torch.cat([torch.arange(length) for length in lengths]).to(model.device)
    return list(model.logits(model.hidden(ids, positions, WholeSequences(lengths))).split(lengths))
