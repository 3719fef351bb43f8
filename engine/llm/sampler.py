"""Draw the next tokens and say how likely they were."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import torch
from msgspec import Struct
from torch import Tensor

from ...quant.scheme import has_kernels
from ..errors import NonFiniteError
from .likelihoods import Likelihoods
from .shaping import Shaped, scale, shape
from .transfers import Download, upload


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


class Draws:
    """Tokens drawn on the device, one for each request: `ids` int64 [batch]. `read` brings them to the host.

    A copy of what the host wants is under way from the start, behind what the device had to do before.
    """

    def __init__(
        self,
        requests: Sequence[Sampled],
        ids: Tensor,
        values: Tensor,
        modes: Sequence[str] = ("processed",),
        likelihoods: Mapping[str, Likelihoods] | None = None,
    ) -> None:
        """values float64 [1 + num_modes, batch]: the ids, and their log-probs in these modes; a mode that is not among
        them is "processed". `likelihoods`, by mode, where more is wanted than that."""
        self.ids, self.requests, self._modes, self._likelihoods = ids, requests, modes, likelihoods or {}
        self._values = Download(values)

    def read(self) -> list[Draw | NonFiniteError]:
        """The draws in the order of the requests; a row whose logits make no distribution gets an error instead."""
        ids, *by_mode = self._values.read().tolist()
        logprobs = dict(zip(self._modes, by_mode, strict=True))
        processed = logprobs["processed"]
        return [
            self._draw(row, int(token), logprobs.get(_mode(request), processed)[row])
            if processed[row] <= 0  # and no NaN
            else _make_error(request)
            for row, (token, request) in enumerate(zip(ids, self.requests, strict=True))
        ]

    def _draw(self, row: int, token: int, logprob: float) -> Draw:
        request = self.requests[row]
        top, mask = request.params.top_logprobs, request.params.sampling_mask
        return Draw(
            token,
            logprob,
            self._likelihoods[_mode(request)].top(row, top) if top else None,
            _mask(self._likelihoods["processed"].logits[row]) if mask else None,
        )


class EachDraws:
    """Draws of several calls, as those of one."""

    def __init__(self, draws: Sequence[Draws | EachDraws]) -> None:
        self.draws, self.ids = draws, torch.cat([one.ids for one in draws])

    def read(self) -> list[Draw | NonFiniteError]:
        return [draw for one in self.draws for draw in one.read()]


def sample(logits: Tensor, requests: Sequence[Sampled], *, apart: bool = False) -> Draws | EachDraws:
    """Logits [batch, vocab], in float32 or as the head computes them, -> a token for each request.

    `apart`: what no kernel draws is computed request by request, since torch sums on a GPU as the number of rows and
    where they begin in memory suggest; its log-probs, but for "processed" ones, are those of `score`.

    Log-probs by mode: "raw" log_softmax(logits), "temperature" log_softmax(logits / temperature), "processed" of
    what `shape` makes, which is what is drawn from.
    """
    if has_kernels(logits) and all(map(_is_plain, requests)):
        return _sample_fused(logits, requests)
    apart = apart and has_kernels(logits)
    if apart and len(requests) > 1:
        return EachDraws([sample(logits[i : i + 1].clone(), [one], apart=True) for i, one in enumerate(requests)])
    given, logits = logits, logits.float()
    scaled = scale(logits, requests)
    drawn = Likelihoods(shape(logits, scaled, requests))
    ids, likelihoods = _choose(drawn, requests), _by_mode(logits, scaled, drawn, requests)
    logprobs = {mode: one.logprobs(ids[:, None])[:, 0] for mode, one in likelihoods.items()}
    if apart:
        (temperature,) = (request.params.temperature or 1.0 for request in requests)
        temperatures = {"raw": 1.0, "temperature": temperature}
        logprobs |= {mode: score(given, temperatures[mode], ids) for mode in logprobs if mode in temperatures}
    wide = any(request.params.top_logprobs or request.params.sampling_mask for request in requests)
    return Draws(
        requests,
        ids,
        torch.stack([row.double() for row in (ids, *logprobs.values())]),
        list(logprobs),
        likelihoods if wide else None,
    )


def score(logits: Tensor, temperature: float, ids: Tensor) -> Tensor:
    """Log-probs float32 [batch] of tokens int64 [batch] in softmax(logits / temperature), logits [batch, vocab]: what
    `sample` says of a token that it draws from this distribution."""
    if has_kernels(logits):
        from .gpu.sampling import score as score_fused

        return score_fused(logits, torch.full((len(ids),), temperature, device=logits.device), ids).float()
    return Likelihoods(logits.float() / temperature).logprobs(ids[:, None])[:, 0]


def _is_plain(request: Sampled) -> bool:
    """Whether a token and its log-prob in softmax(logits / temperature) are all that is wanted."""
    params = request.params
    wide = params.changes_logits or params.truncates or params.top_logprobs or params.sampling_mask
    return not wide and (_mode(request) != "raw" or params.temperature in (0, 1))


def _sample_fused(logits: Tensor, requests: Sequence[Sampled]) -> Draws:
    from .gpu.sampling import draw

    greedy = [request.params.temperature == 0 for request in requests]
    temperatures = [request.params.temperature or 1.0 for request in requests]
    uniforms = [-1.0 if is_greedy else one.uniform() for is_greedy, one in zip(greedy, requests, strict=True)]
    device = logits.device
    return Draws(
        requests, *draw(logits, upload(temperatures, device, torch.float32), upload(uniforms, device, torch.float64))
    )


def _choose(drawn: Likelihoods, requests: Sequence[Sampled]) -> Tensor:
    """ids int64 [batch]: the likeliest token where a request is greedy, else one drawn with its own number."""
    greedy = [request.params.temperature == 0 for request in requests]
    if all(greedy):
        return drawn.best()
    device = drawn.logits.device
    ids = drawn.draw(upload([request.uniform() for request in requests], device, torch.float64))
    return torch.where(upload(greedy, device, torch.bool), drawn.best(), ids) if any(greedy) else ids


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
