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


class TopLogprobs(Struct, frozen=True):
    """The likeliest tokens at each position: ids int32 and log-probs float32, both [len(token_ids), n]."""

    ids: Tensor
    logprobs: Tensor


class Completion(Struct, frozen=True):
    """One sampled continuation of one prompt.

    `logprobs`: float32 [len(token_ids)], in the mode of `SamplingParams.logprobs`. `prompt_logprobs`: float32
    [len(prompt) - 1], when asked for; fewer if it was aborted before. `routed_experts`: int16
    [prompt + completion - 1, num_moe_layers, top_k], when asked for; -1 where unknown (a request that was aborted
    before its tokens were computed).
    `sampling_mask`: for each token the ids that could have been drawn, int32, or None for all, when asked for.
    `stopped_by`: the token id or string that ended it. `cached_tokens`: tokens of the prompt whose keys and values
    were there already. `num_preemptions`: how often its keys and values were given up (for want of pages, by a pause
    that retracts, by sleep) and computed again. `seed` draws the same tokens again, whatever the batch company.
    """

    request_id: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str | None
    finish_reason: FinishReason
    stopped_by: int | str | None
    logprobs: Tensor | None
    top_logprobs: TopLogprobs | None
    prompt_logprobs: Tensor | None
    sampling_mask: list[Tensor | None] | None
    weight_versions: list[VersionSpan]
    routed_experts: Tensor | None
    seed: int
    cached_tokens: int
    num_preemptions: int


class StreamChunk(Struct, frozen=True):
    """What one step added to one of the completions of a stream; the last one carries the whole completion.

    `index`: which completion (prompt-major). `text` may lag behind the tokens by an unfinished character or the
    begin of a stop string.
    """

    index: int
    token_ids: list[int]
    logprobs: list[float]
    text: str | None
    completion: Completion | None
