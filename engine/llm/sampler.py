"""Draw the next tokens and say how likely they were."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from msgspec import Struct
from torch import Tensor

from ..errors import NonFiniteError
from .likelihoods import Likelihoods
from .shaping import Shaped, scale, shape


class Sampled(Shaped, Protocol):
    """What the sampler reads of a request."""

    def uniform(self) -> float: ...


class Draw(Struct, frozen=True):
    """One token. `top`: ids and log-probs of the likeliest; `mask`: ids that could be drawn, None for all."""

    token: int
    logprob: float
    top: tuple[Tensor, Tensor] | None = None
    mask: Tensor | None = None


def seeded_uniforms(seed: int, count: int) -> Tensor:
    """float64 [count] in [0, 1): the i-th drives the i-th token of a request, whatever its batch company.

    Python's generator, because torch's on a CPU reads no more than the lower 32 bits of a seed.
    """
    stream = random.Random(seed)
    return torch.tensor([stream.random() for _ in range(count)], dtype=torch.float64)


def sample(logits: Tensor, requests: Sequence[Sampled]) -> list[Draw | NonFiniteError]:
    """Logits float32 [batch, vocab] -> a token for each request.

    Log-probs by mode: "raw" log_softmax(logits), "temperature" log_softmax(logits / temperature), "processed" of
    what `shape` makes, which is what is drawn from. A row whose logits make no distribution gets an error instead.
    """
    scaled = scale(logits, requests)
    shaped = shape(logits, scaled, requests)
    drawn = Likelihoods(shaped)
    ids = _choose(drawn, requests)
    by_mode = _by_mode(logits, scaled, drawn, requests)
    logprobs = {mode: one.logprobs(ids[:, None])[:, 0].tolist() for mode, one in by_mode.items()}
    return [
        Draw(
            token,
            logprobs[mode][row],
            by_mode[mode].top(row, request.params.top_logprobs) if request.params.top_logprobs else None,
            _mask(shaped[row]) if request.params.sampling_mask else None,
        )
        if logprobs["processed"][row] <= 0  # and no NaN
        else _make_error(request)
        for row, (token, request) in enumerate(zip(ids.tolist(), requests, strict=True))
        for mode in (_mode(request),)
    ]


def _choose(drawn: Likelihoods, requests: Sequence[Sampled]) -> Tensor:
    """ids int64 [batch]: the likeliest token where a request is greedy, else one drawn with its own number."""
    greedy = [request.params.temperature == 0 for request in requests]
    if all(greedy):
        return drawn.best()
    uniforms = torch.tensor([request.uniform() for request in requests], dtype=torch.float64)
    ids = drawn.draw(uniforms.to(drawn.logits.device))
    return torch.where(torch.tensor(greedy, device=ids.device), drawn.best(), ids) if any(greedy) else ids


def _mode(request: Sampled) -> Literal["raw", "temperature", "processed"]:
    mode = request.params.logprobs
    return mode if mode == "raw" or mode == "processed" else "temperature"


def _by_mode(logits: Tensor, scaled: Tensor, drawn: Likelihoods, requests: Sequence[Sampled]) -> dict[str, Likelihoods]:
    """What log-probs speak of: "processed", and the other modes that are asked for; equal ones are computed once."""
    by_mode = {"processed": drawn}
    for mode in {_mode(request) for request in requests} - {"processed"}:
        of = logits if mode == "raw" else scaled
        same = next((one for one in by_mode.values() if one.logits is of), None)
        by_mode[mode] = same or Likelihoods(of)
    return by_mode


def _mask(shaped: Tensor) -> Tensor | None:
    """int32 ids that can be drawn from one row [vocab]; None for all."""
    ids = shaped.isfinite().nonzero()[:, 0].int().cpu()
    return None if len(ids) == len(shaped) else ids


def _make_error(request: Sampled) -> NonFiniteError:
    return NonFiniteError(
        f"the logits after {len(request.prompt) + len(request.new_tokens)} tokens hold NaN or infinity, or nothing "
        "that may be drawn: check the weights that are served, or compute in float32 "
        '(EngineConfig(dtype="float32"))'
    )
