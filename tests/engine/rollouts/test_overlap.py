"""Overlapped steps: a step is launched before the tokens of the one before are known, and nobody can tell."""

from __future__ import annotations

import pytest
import torch

from rollmill.engine import SamplingParams
from rollmill.engine.llm.forward import place_drawn
from rollmill.engine.llm.sampler import Draws

overlapped = pytest.mark.parametrize("open_engine", [True], indirect=True, ids=["overlapped"])
PARAMS = {
    "to the limit": SamplingParams(n=3, max_new_tokens=9, seed=1),
    "stop tokens": SamplingParams(n=3, max_new_tokens=40, seed=2, stop=list(range(0, 200, 9))),
    "stop string": SamplingParams(n=3, max_new_tokens=40, seed=3, stop=["e", "A"]),
    "penalties": SamplingParams(n=3, max_new_tokens=12, seed=4, repetition_penalty=1.5, presence_penalty=0.5),
    "greedy": SamplingParams(n=2, max_new_tokens=12, temperature=0, top_logprobs=3),
    "truncated": SamplingParams(n=2, max_new_tokens=12, seed=5, top_p=0.8, sampling_mask=True),
}


@pytest.fixture
def events(monkeypatch):
    """What happens in which order: "launch" of a step, "read" of its tokens."""
    seen, read = [], Draws.read

    def watched(self):
        seen.append("read")
        return read(self)

    monkeypatch.setattr(Draws, "read", watched)
    return seen


def launches(engine, events):
    """Notes every step of the model."""
    hidden = engine.model.hidden

    def watched(*args):
        events.append("launch")
        return hidden(*args)

    engine.model.hidden = watched


@overlapped
def test_the_next_step_is_launched_before_tokens_are_read(open_engine, events):
    engine = open_engine("llama")
    launches(engine, events)
    engine.generate([1, 2, 3], SamplingParams(max_new_tokens=4))
    assert events == ["launch", "launch", "read", "launch", "read", "launch", "read", "read"]


@overlapped
def test_no_page_is_free_and_none_is_needed(open_engine, events, make_prompts):
    """Three requests fill all three pages, and the last tokens of none go beyond its page."""
    engine = open_engine("llama", kv_cache_tokens=48)
    launches(engine, events)
    engine.generate(make_prompts([5, 6, 7]), SamplingParams(max_new_tokens=4))
    assert engine.rollouts.scheduler.num_preemptions == 0
    assert events == ["launch", "launch", "read", "launch", "read", "launch", "read", "read"]


@overlapped
def test_penalties_want_to_know_the_tokens(open_engine, events):
    engine = open_engine("llama")
    launches(engine, events)
    engine.generate([1, 2, 3], SamplingParams(max_new_tokens=3, presence_penalty=0.5))
    assert events == ["launch", "read"] * 3


@overlapped
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
@pytest.mark.parametrize("room", [None, 96], ids=["room", "little_room"])
def test_the_same_as_step_by_step(params, room, open_engine, make_prompts, all_pages_are_back):
    prompts = make_prompts([20, 3, 17, 30, 16])
    options = {"max_batch_size": 6, "max_step_tokens": 24, "kv_cache_tokens": room}
    both = [open_engine("qwen3_moe", overlap=overlap, **options) for overlap in (False, True)]
    expected, found = (engine.generate(prompts, params, return_routed_experts=True) for engine in both)
    for out, other in zip(found, expected, strict=True):
        assert (out.token_ids, out.finish_reason, out.text) == (other.token_ids, other.finish_reason, other.text)
        torch.testing.assert_close(out.logprobs, other.logprobs, rtol=0, atol=1e-5)
        assert out.routed_experts.shape == other.routed_experts.shape
        assert (out.routed_experts == other.routed_experts).float().mean() > 0.99  # a tie may fall either way
    all_pages_are_back(both[1])


@overlapped
def test_tokens_in_flight_belong_to_the_version_that_drew_them(open_engine, make_prompts, hf_model):
    """A commit takes them in first: spans have no gap, and the version before has a token more, not one less."""
    engine = open_engine("llama")
    weights = dict(hf_model("llama", seed=1).to(torch.bfloat16).state_dict())
    requests = engine._requests(make_prompts([5]), SamplingParams(max_new_tokens=6), None, routed=False)
    engine.rollouts.submit(requests)
    for _ in range(3):
        engine.rollouts.step()
    assert (requests[0].num_new, requests[0].in_flight) == (2, 1)
    engine.update_weights(weights, version="2")
    assert (requests[0].num_new, requests[0].in_flight) == (3, 0)
    engine.rollouts.run([])
    while not requests[0].finished:
        engine.rollouts.step()
    assert [(span.version, span.start, span.end) for span in requests[0].spans] == [("initial", 0, 3), ("2", 3, 6)]


def test_tokens_in_flight_are_placed():
    ids, drawn = torch.tensor([7, -1, 9, -3]), torch.tensor([100, 101, 102])
    assert place_drawn(ids, drawn).tolist() == [7, 100, 9, 102]
    assert place_drawn(ids[:1], None).tolist() == [7]
