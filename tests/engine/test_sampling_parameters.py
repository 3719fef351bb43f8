"""Every sampling parameter against an independent reference, alone, combined and mixed in one batch."""

from __future__ import annotations

import msgspec
import pytest
import torch
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rollmill.engine import NonFiniteError, SamplingParams
from rollmill.engine.llm.sampler import sample, seeded_uniforms
from rollmill.engine.llm.shaping import scale, shape, truncate

VOCAB = 300
PROMPT, DRAWN = (3, 14, 15, 3), (92, 65, 92)


class Row(msgspec.Struct):
    """What the sampler reads of a request."""

    params: SamplingParams
    number: float = 0.5
    prompt: tuple[int, ...] = PROMPT
    new_tokens: tuple[int, ...] = DRAWN

    def uniform(self) -> float:
        return self.number


def expected(logits, params):
    """One row of logits through transformers' processors and plain formulas, in the documented order."""
    ids, scores = torch.tensor([PROMPT + DRAWN]), logits[None].clone()
    if params.allowed_token_ids is not None:
        allowed = torch.isin(torch.arange(len(logits)), torch.tensor(list(params.allowed_token_ids)))
        scores = scores.where(allowed, -torch.inf)
    for token, bias in params.logit_bias.items():
        scores[0, token] += bias
    if params.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    for token in set(DRAWN):
        scores[0, token] -= params.frequency_penalty * DRAWN.count(token) + params.presence_penalty
    warpers = [
        (params.temperature not in (0, 1), lambda: TemperatureLogitsWarper(params.temperature)),
        (params.top_k > 0, lambda: TopKLogitsWarper(params.top_k)),
        (params.top_p < 1, lambda: TopPLogitsWarper(params.top_p)),
        (params.min_p > 0, lambda: MinPLogitsWarper(params.min_p)),
    ]
    for used, warper in warpers:
        if used:
            scores = warper()(ids, scores)
    return scores[0]


CASES = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 2.5},
    "top_k": {"top_k": 7},
    "top_k-1": {"top_k": 1},
    "top_k-beyond": {"top_k": 10**6},
    "top_p": {"top_p": 0.7},
    "top_p-small": {"top_p": 1e-6},
    "top_p-large": {"top_p": 0.9999},
    "min_p": {"min_p": 0.1},
    "min_p-1": {"min_p": 1.0},
    "repetition": {"repetition_penalty": 1.7},
    "repetition-below": {"repetition_penalty": 0.6},
    "frequency": {"frequency_penalty": 0.8},
    "presence": {"presence_penalty": -1.5},
    "bias": {"logit_bias": {5: 4.0, 7: -3.0, 9: float("-inf")}},
    "allowed": {"allowed_token_ids": [4, 5, 92, 200]},
    "allowed-set": {"allowed_token_ids": {4, 5, 92}},
    "truncations": {"temperature": 1.4, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
    "allowed-top_k": {"allowed_token_ids": [4, 5, 92], "top_k": 50, "top_p": 0.9},
    "all": {
        "temperature": 0.8,
        "top_k": 60,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "frequency_penalty": 0.3,
        "presence_penalty": 0.2,
        "logit_bias": {15: 3.0, 20: float("-inf")},
        "allowed_token_ids": list(range(0, VOCAB, 2)) + [15],
    },
    "greedy": {"temperature": 0.0, "repetition_penalty": 1.5},
}


@pytest.fixture(params=CASES.values(), ids=list(CASES))
def params(request):
    return SamplingParams(logprobs="processed", **request.param)


def make_logits(batch, vocab=VOCAB, std=2.0, seed=0):
    return torch.randn(batch, vocab, generator=torch.Generator().manual_seed(seed)) * std


def test_the_distribution_is_the_references(params):
    logits = make_logits(5)
    for row, found in zip(logits, shape(logits, scale(logits, [Row(params)] * 5), [Row(params)] * 5), strict=True):
        want = expected(row, params)
        assert torch.equal(found.isfinite(), want.isfinite())
        torch.testing.assert_close(found.softmax(-1), want.softmax(-1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("vocab", [300, 5000, 20000])
@pytest.mark.parametrize("std", [0.01, 1.0, 8.0], ids=["flat", "usual", "peaked"])
@pytest.mark.parametrize(
    "values", [{"top_p": 0.5}, {"top_p": 0.95}, {"top_k": 4500}, {"top_k": 300, "top_p": 0.9}, {"min_p": 0.3}], ids=str
)
def test_truncation_of_large_vocabularies(vocab, std, values):
    """However many tokens are kept: no more are sorted than must be, and the result is that of a full sort."""
    logits, params = make_logits(3, vocab, std), SamplingParams(**values)
    found = truncate(logits, [params] * 3).isfinite()
    for row, kept in zip(logits, found, strict=True):
        want = expected(row, params).isfinite()
        differing = row[kept != want]
        assert len(differing) <= 2  # float32 cumulative sums: the last tokens of a nucleus may differ
        assert not len(differing) or (differing - row[kept].min()).abs().max() < 0.05 * std


def test_equal_logits_are_kept_in_the_order_of_their_ids():
    logits = torch.tensor([[1.0, 2.0, 1.0, 1.0, 2.0, 1.0]])
    for params, kept in [
        (SamplingParams(top_k=3), [0, 1, 4]),
        (SamplingParams(top_k=1), [1]),
        (SamplingParams(top_p=1e-6), [1]),
        (SamplingParams(min_p=1.0), [1, 4]),
    ]:
        assert truncate(logits, [params])[0].isfinite().nonzero()[:, 0].tolist() == kept


def test_draws_follow_the_distribution(params):
    draws = 4000
    logits = make_logits(1, 100).expand(draws, -1)
    uniforms = seeded_uniforms(1, draws).tolist()
    ids = [3 if t >= 100 else t for t in params.allowed_token_ids or ()]
    params = msgspec.structs.replace(params, allowed_token_ids=ids or None)
    found = torch.tensor([one.token for one in sample(logits, [Row(params, u) for u in uniforms]).read()])
    want = expected(logits[0], params).softmax(-1)
    if params.temperature == 0:
        want = torch.nn.functional.one_hot(want.argmax(), 100).float()
    frequency = found.bincount(minlength=100) / draws
    assert (frequency - want).abs().max() < 4 * (0.25 / draws) ** 0.5
    assert frequency[want == 0].sum() == 0


def test_the_reference_log_probs(params):
    logits = make_logits(4, seed=1)
    uniforms = seeded_uniforms(2, 4).tolist()
    for mode in ("temperature", "sampled", "raw", "processed", None):
        one = msgspec.structs.replace(params, logprobs=mode, top_logprobs=4)
        drawn = sample(logits, [Row(one, u) for u in uniforms]).read()
        for row, draw in zip(logits, drawn, strict=True):
            want = expected(row, params) if mode == "processed" else row
            if mode in ("temperature", "sampled", None):
                want = row / (params.temperature or 1.0)
            want = want.log_softmax(-1)
            torch.testing.assert_close(draw.logprob, want[draw.token].item(), rtol=1e-5, atol=1e-5)
            values, ids = want.topk(4)
            assert draw.top is not None
            torch.testing.assert_close(draw.top[1], values, rtol=1e-5, atol=1e-5)
            assert [t for t, v in zip(draw.top[0].tolist(), values, strict=True) if v > -torch.inf] == ids[
                values > -torch.inf
            ].tolist()
            assert draw.token not in draw.top[0] or draw.logprob == draw.top[1][draw.top[0] == draw.token].item()


def test_the_sampling_mask_is_the_support(params):
    """Temperature log-probs, renormalized over the mask, are the processed ones where nothing but truncation acts."""
    logits = make_logits(4, seed=2)
    masked = msgspec.structs.replace(params, sampling_mask=True)
    truncates_only = not params.changes_logits
    for row, draw in zip(logits, sample(logits, [Row(masked)] * 4).read(), strict=True):
        support = expected(row, params).isfinite()
        if support.all():
            assert draw.mask is None
            continue
        assert draw.mask.dtype == torch.int32
        assert draw.mask.tolist() == support.nonzero()[:, 0].tolist()
        if truncates_only:
            temperature = (row / (params.temperature or 1.0)).log_softmax(-1)
            renormalized = temperature[draw.token] - temperature[draw.mask].logsumexp(-1)
            torch.testing.assert_close(renormalized.item(), draw.logprob, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("vocab", [200, 301, 49152, 151936])
def test_a_row_does_not_depend_on_its_company(vocab, threads):
    """Bitwise, for every set of parameters among all others."""
    every = [
        SamplingParams(**{**case, "logprobs": mode}, top_logprobs=3, sampling_mask=True)
        for mode in ("temperature", "raw", "processed")
        for case in (CASES.values() if vocab < 1000 else [{}, {"top_p": 0.9, "temperature": 0.3}, {"top_k": 20}])
        if not case.get("allowed_token_ids") or vocab >= VOCAB
    ]
    logits = make_logits(len(every), vocab, std=4.0)
    rows = [Row(one, u) for one, u in zip(every, seeded_uniforms(3, len(every)).tolist(), strict=True)]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [sample(logits[i : i + 1], rows[i : i + 1]).read()[0] for i in range(len(rows))]
        torch.set_num_threads(threads)
        together = sample(logits, rows).read()
        reversed_ = sample(logits.flip(0), rows[::-1]).read()[::-1]
    finally:
        torch.set_num_threads(before)
    for one, other, third in zip(alone, together, reversed_, strict=True):
        assert (one.token, one.logprob) == (other.token, other.logprob) == (third.token, third.logprob)
        assert all(torch.equal(a, b) for a, b in zip(one.top, other.top, strict=True))
        assert (one.mask is None) == (other.mask is None)
        assert one.mask is None or torch.equal(one.mask, other.mask)


def test_all_bits_of_a_seed_count():
    """So that engines with different seeds, which number their requests from seed << 32, draw differently."""
    streams = [seeded_uniforms(seed, 4).tolist() for seed in (0, 1, 1 << 32, (1 << 32) + 1, 2**63 - 1)]
    assert len({tuple(stream) for stream in streams}) == 5


def test_a_stream_of_numbers_does_not_depend_on_its_length():
    assert torch.equal(seeded_uniforms(5, 1000)[:17], seeded_uniforms(5, 17))


def test_uniform_numbers():
    numbers = torch.cat([seeded_uniforms(seed, 4) for seed in range(5000)]).view(5000, 4)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert (numbers.mean(0) - 0.5).abs().max() < 0.02
    assert (torch.corrcoef(numbers.T) - torch.eye(4)).abs().max() < 0.06
    assert torch.corrcoef(torch.stack([numbers[:-1, 0], numbers[1:, 0]]))[0, 1].abs() < 0.06  # neighbouring seeds


@pytest.mark.parametrize("number", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize(
    "values", [{}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5}, {"logprobs": "raw"}], ids=str
)
def test_broken_logits_are_an_error(bad, number, values):
    logits = make_logits(3)
    logits[1, 7] = bad
    good, broken, other = sample(logits, [Row(SamplingParams(**values), number)] * 3).read()
    assert isinstance(broken, NonFiniteError)
    assert "after 7 tokens" in str(broken)
    kept = [0, 2]
    alone = sample(logits[kept], [Row(SamplingParams(**values), number)] * 2).read()
    assert [(d.token, d.logprob) for d in (good, other)] == [(d.token, d.logprob) for d in alone]


def test_nothing_left_to_draw_is_an_error():
    (error,) = sample(torch.full((1, 5), -torch.inf), [Row(SamplingParams(), 0.5, (1,), ())]).read()
    assert isinstance(error, NonFiniteError)
    assert "nothing that may be drawn" in str(error)


@pytest.mark.parametrize("values", [{"temperature": 1e-6}, {"temperature": 1e6}, {"frequency_penalty": -1e6}], ids=str)
@pytest.mark.parametrize("bias", [1e6, -1e6])
def test_the_largest_values_stay_finite(values, bias):
    params = SamplingParams(**values, logit_bias={5: bias}, repetition_penalty=1e-6, top_p=0.9)
    (drawn,) = sample(make_logits(1), [Row(params)]).read()
    assert drawn.logprob <= 0
