"""Steps that end in an exception, and what does not fit: the engine says so and goes on."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest
import torch

from rollmill.engine import AsleepError, ConfigError, EngineConfig, RequestError, SamplingParams

GREEDY = SamplingParams(temperature=0, max_new_tokens=12)


class Fuse:
    """Raises in the n-th call of a method, once."""

    def __init__(self, owner, name, at, error):
        self.owner, self.name, self.left, self.error = owner, name, at, error
        self.thread = None
        self.method = getattr(owner, name)
        setattr(owner, name, self)

    def __call__(self, *args, **kwargs):
        if self.thread in (None, threading.get_ident()):
            self.left -= 1
            if self.left == 0:
                raise self.error
        return self.method(*args, **kwargs)


@pytest.mark.parametrize("error", [RuntimeError("hidden"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("where", ["hidden", "logits"])
@pytest.mark.parametrize("at", [1, 5])
def test_an_interrupted_generate(where, at, error, open_engine, make_prompts, all_pages_are_back):
    engine = open_engine("qwen3_moe", max_batch_size=4, max_step_tokens=12)
    prompts = make_prompts([20, 3, 17, 30])
    Fuse(engine.model, where, at, error)
    with pytest.raises(type(error)):
        engine.generate(prompts, SamplingParams(n=3, temperature=0, max_new_tokens=12))
    all_pages_are_back(engine)
    outs, expected = engine.generate(prompts, GREEDY), open_engine("qwen3_moe").generate(prompts, GREEDY)
    assert [out.token_ids for out in outs] == [out.token_ids for out in expected]


@pytest.mark.parametrize("where", ["hidden", "logits"])
@pytest.mark.parametrize("at", [2, 6])
def test_the_requests_of_others_survive_an_interrupted_step(
    where, at, open_engine, watch, call, make_prompts, all_pages_are_back
):
    """The thread whose step fails loses its requests; those of another thread come out as ever."""
    engine, prompts = open_engine("qwen3_moe", max_batch_size=8, max_step_tokens=12), make_prompts([20, 3, 17, 30])
    params = SamplingParams(n=3, max_new_tokens=12, seed=1, prompt_logprobs=True)
    (expected,) = (engine.generate(prompts, params),)
    engine.rollouts.scheduler.pool.forget_prefixes()
    engine.pause()
    others = call(engine.generate, prompts, params)
    steps = watch(engine)
    fuse = Fuse(engine.model, where, at, KeyboardInterrupt())

    def mine():
        fuse.thread = threading.get_ident()
        engine.generate([5, 6, 7], SamplingParams(max_new_tokens=40, seed=2))

    interrupted = call(mine)
    wait = threading.Event()
    wait.wait(0.05)
    engine.resume()
    with suppress(KeyboardInterrupt):  # unless the other thread's steps were faster
        interrupted.get()
    outs = others.get()
    assert steps.count
    for out, other in zip(outs, expected, strict=True):
        assert (out.token_ids, out.finish_reason) == (other.token_ids, "length")
        torch.testing.assert_close(out.logprobs, other.logprobs, rtol=0, atol=1e-4)
        torch.testing.assert_close(out.prompt_logprobs, other.prompt_logprobs, rtol=0, atol=1e-4)
    all_pages_are_back(engine)


def test_a_prompt_whose_scoring_is_interrupted_is_scored_once(open_engine, call, make_prompts, monkeypatch):
    """The driver that fails is not the one whose prompt was being scored."""
    monkeypatch.setattr("rollmill.engine.llm.steps.LOGIT_ROWS", 4)
    engine, (prompt,) = open_engine(), make_prompts([30])
    params = SamplingParams(max_new_tokens=2, prompt_logprobs=True, temperature=1.0)
    (expected,) = engine.generate(prompt, params)
    scored = engine._maker.make([prompt], [params])
    engine.rollouts.submit(scored)
    Fuse(engine.model, "logits", 4, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        engine.generate([1, 2, 3], GREEDY)
    engine.generate([1, 2, 3], GREEDY)  # drives the other request to its end
    (out,) = map(engine._maker.complete, scored)
    torch.testing.assert_close(out.prompt_logprobs, expected.prompt_logprobs, rtol=0, atol=1e-4)


def test_a_prompt_longer_than_the_kv_cache(open_engine):
    engine = open_engine(kv_cache_tokens=32)
    with pytest.raises(
        RequestError, match="prompt 1 has 33 tokens, but the KV cache holds 32: raise .*kv_cache_tokens"
    ):
        engine.generate([[1] * 3, [1] * 33])
    (out,) = engine.generate([1] * 32, SamplingParams(max_new_tokens=9))
    assert (len(out.token_ids), out.finish_reason) == (1, "length")
    (out,) = engine.generate([1] * 30, SamplingParams(max_new_tokens=9))
    assert (len(out.token_ids), out.finish_reason) == (3, "length")
    assert engine.info()["requests"] == 0


def test_a_prompt_longer_than_the_context(open_engine):
    with pytest.raises(RequestError, match="64 tokens, but the model's context is 64"):
        open_engine().generate([1] * 64)


def test_a_kv_cache_of_less_than_a_page_has_one(model, open_engine):
    engine = open_engine(kv_cache_tokens=1)
    assert engine.info()["kv_cache_tokens"] == 16
    outs = engine.generate([[1] * 10, [2] * 3], SamplingParams(temperature=0, max_new_tokens=30))
    assert [len(out.token_ids) for out in outs] == [7, 14]
    expected = open_engine().generate([[1] * 10, [2] * 3], SamplingParams(temperature=0, max_new_tokens=30))
    assert [out.token_ids for out in outs] == [o.token_ids[:n] for o, n in zip(expected, (7, 14), strict=True)]


@pytest.mark.parametrize(
    "options",
    [{"kv_cache_tokens": 0}, {"max_batch_size": 0}, {"max_batch_size": 8, "max_step_tokens": 7}],
    ids=["no-cache", "no-seat", "steps-smaller-than-batches"],
)
def test_limits_that_make_no_sense(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        EngineConfig(**options)


def test_an_engine_that_falls_asleep_between_two_scores(open_engine):
    engine = open_engine()
    scores = engine._each_logits([[1, 2], [3, 4]])
    next(scores)
    engine.sleep()
    with pytest.raises(AsleepError):
        next(scores)
