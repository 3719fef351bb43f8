"""Sampling: seeds, filters, stop tokens, groups, limits."""

from __future__ import annotations

import msgspec
import pytest
import torch

from rollmill.engine import Engine, EngineConfig, SamplingParams
from rollmill.engine.llm.sampler import sample

PROMPTS = [[3, 14, 15], [92, 65, 35, 89, 79]]


@pytest.fixture
def engine(hf_model, save):
    with Engine(save(hf_model("mixtral")), EngineConfig(dtype="float32")) as engine:
        yield engine


def test_outputs_are_prompt_major(engine):
    outs = engine.generate(PROMPTS, SamplingParams(n=3, max_new_tokens=4))
    assert [out.prompt_token_ids for out in outs] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert len({out.seed for out in outs}) == 6


def test_a_seed_fixes_the_tokens_whatever_the_company(engine):
    together = engine.generate(PROMPTS * 3, SamplingParams(n=2, max_new_tokens=8, seed=7))
    (alone,) = engine.generate([PROMPTS[1]], SamplingParams(max_new_tokens=8, seed=8))
    assert together[3].seed == alone.seed == 8
    assert together[3].token_ids == alone.token_ids
    assert together[2].token_ids != alone.token_ids


def test_unseeded_requests_differ_and_can_be_repeated(engine):
    first, second = (engine.generate([PROMPTS[0]], SamplingParams(max_new_tokens=12))[0] for _ in range(2))
    assert first.token_ids != second.token_ids
    (again,) = engine.generate([PROMPTS[0]], SamplingParams(max_new_tokens=12, seed=second.seed))
    assert again.token_ids == second.token_ids


def test_batches_larger_than_the_limit(hf_model, save):
    folder = save(hf_model("qwen3"))
    params = SamplingParams(n=3, max_new_tokens=6, seed=1)
    with (
        Engine(folder, EngineConfig(dtype="float32", max_batch_size=4)) as small,
        Engine(folder, EngineConfig(dtype="float32")) as large,
    ):
        few, many = small.generate(PROMPTS, params), large.generate(PROMPTS, params)
    assert [out.token_ids for out in few] == [out.token_ids for out in many]


def test_stop_tokens(engine):
    (free,) = engine.generate([PROMPTS[0]], SamplingParams(max_new_tokens=10, seed=1))
    stop = free.token_ids[4]
    first = free.token_ids.index(stop)
    (stopped,) = engine.generate([PROMPTS[0]], SamplingParams(max_new_tokens=10, seed=1, stop=[stop]))
    assert stopped.token_ids == free.token_ids[: first + 1]
    assert (stopped.finish_reason, free.finish_reason) == ("stop", "length")


def test_the_models_end_of_sequence_token(hf_model, save):
    model = hf_model("llama")
    model.generation_config.eos_token_id = [5, *range(100, 200)]
    with Engine(save(model), EngineConfig(dtype="float32")) as engine:
        outs = engine.generate([PROMPTS[0]], SamplingParams(n=8, max_new_tokens=40, seed=1))
        assert all(out.finish_reason == "stop" and out.token_ids[-1] >= 100 for out in outs if len(out.token_ids) < 40)
        assert any(out.finish_reason == "stop" for out in outs)
        free = engine.generate([PROMPTS[0]], SamplingParams(n=8, max_new_tokens=40, seed=1, ignore_eos=True))
        assert all(len(out.token_ids) == 40 for out in free)


def test_the_context_limits_new_tokens(engine):
    (out,) = engine.generate([[1] * 60], SamplingParams(max_new_tokens=50))
    assert (len(out.token_ids), out.finish_reason) == (4, "length")


def test_logprobs_can_be_left_out(engine):
    assert engine.generate([PROMPTS[0]], SamplingParams(max_new_tokens=2, logprobs=None))[0].logprobs is None


class Row(msgspec.Struct):
    """What the sampler reads of a request."""

    params: SamplingParams
    number: float
    prompt: list[int] = []
    new_tokens: list[int] = []

    def uniform(self) -> float:
        return self.number


def frequencies(params, draws=40000):
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -30.0]]).expand(draws, -1)
    uniforms = torch.rand(draws, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    drawn = sample(logits, [Row(params, u) for u in uniforms.tolist()]).read()
    ids, logprobs = torch.tensor([d.token for d in drawn]), torch.tensor([d.logprob for d in drawn])
    return torch.bincount(ids, minlength=6) / draws, ids, logprobs, logits[0]


@pytest.mark.parametrize(
    ("params", "allowed"),
    [
        (SamplingParams(), 5),
        (SamplingParams(temperature=2.0), 5),
        (SamplingParams(top_k=2), 2),
        (SamplingParams(top_p=0.8), 3),
        (SamplingParams(top_p=0.8, top_k=2), 2),
        (SamplingParams(top_p=1e-6), 1),
    ],
    ids=["plain", "hot", "top_k", "top_p", "both", "one"],
)
def test_the_distribution_of_samples(params, allowed):
    found, ids, logprobs, logits = frequencies(params)
    full = (logits / params.temperature).softmax(-1)
    kept = torch.where(torch.arange(6) < allowed, full, 0.0)
    assert (found - kept / kept.sum()).abs().max() < 0.01
    torch.testing.assert_close(logprobs, full.log()[ids])  # not renormalized over the kept tokens
    assert found[allowed:].sum() == 0


@pytest.mark.parametrize("params", [SamplingParams(top_k=2), SamplingParams(top_p=0.5)], ids=["top_k", "top_p"])
def test_the_largest_uniform_stays_within_the_allowed_tokens(params):
    logits = torch.tensor([[1.0, 0.0, 0.5, -2.0]])
    (drawn,) = sample(logits, [Row(params, 1 - 2.0**-53)]).read()
    assert drawn.token == 2  # the last of tokens 0 and 2
