"""Pauses, aborts and sleep, with requests in flight in another thread."""

from __future__ import annotations

import time

import pytest
import torch

from rollmill.engine import AsleepError, ClosedError, Engine, EngineConfig, PausedError, RequestError, SamplingParams

GREEDY = SamplingParams(temperature=0, max_new_tokens=30)
TAGS = [("kv_cache",), ("weights",), ("weights", "kv_cache")]
TAG_IDS = ["kv_cache", "weights", "both"]


@pytest.fixture
def flying(watch, call, make_prompts):
    """Requests in another thread, some steps into their way: (steps, prompts, call)."""

    def start(engine, params=GREEDY, **options):
        steps, prompts = watch(engine), make_prompts([20, 7])
        steps.seconds = 0.005
        waiting = call(engine.generate, prompts, params, **options)
        steps.hold(6)
        return steps, prompts, waiting

    return start


def test_the_pausing_thread_cannot_wait_for_itself(open_engine, call):
    engine = open_engine()
    engine.pause()
    with pytest.raises(PausedError, match="resume"):
        engine.generate([1, 2, 3])
    assert engine.info()["requests"] == 0
    other = call(engine.generate, [1, 2, 3], GREEDY)
    other.join(0.1)
    assert other.is_alive()
    engine.resume()
    assert len(other.get()[0].token_ids) == 30
    assert len(engine.generate([1, 2, 3], GREEDY)[0].token_ids) == 30


@pytest.mark.parametrize("mode", ["keep", "retract"])
def test_a_pause_stops_steps_and_changes_no_token(mode, open_engine, flying, all_pages_are_back):
    engine = open_engine()
    steps, prompts, waiting = flying(engine)
    engine.pause(mode)
    count = steps.count
    time.sleep(0.1)
    assert (steps.count, engine.info()["paused"], engine.info()["requests"]) == (count, True, 2)
    engine.pause(mode)  # twice is no harm
    engine.resume()
    outs = waiting.get()
    assert not engine.info()["paused"]
    assert [out.num_preemptions for out in outs] == ([0, 0] if mode == "keep" else [1, 1])
    expected = open_engine().generate(prompts, GREEDY)
    assert [out.token_ids for out in outs] == [out.token_ids for out in expected]
    all_pages_are_back(engine)


def test_an_aborting_pause_returns_what_there_is(open_engine, flying, call, all_pages_are_back):
    engine = open_engine()
    _, prompts, waiting = flying(engine)
    engine.pause("abort")
    outs = waiting.get()
    assert [out.finish_reason for out in outs] == ["abort"] * 2
    assert all(0 < len(out.token_ids) < 30 for out in outs)
    expected = open_engine().generate(prompts, GREEDY)
    assert all(o.token_ids == e.token_ids[: len(o.token_ids)] for o, e in zip(outs, expected, strict=True))
    later = call(engine.generate, prompts, GREEDY)
    later.join(0.1)
    assert later.is_alive()
    engine.resume()
    assert [out.token_ids for out in later.get()] == [out.token_ids for out in expected]
    all_pages_are_back(engine)


def test_requests_that_wait_for_a_resume_are_counted(open_engine, call, wait_for):
    engine = open_engine()
    engine.pause()
    waiting = call(engine.generate, [[1], [2]], SamplingParams(n=4, max_new_tokens=2))
    wait_for(lambda: engine.info()["requests"])
    assert engine.info()["requests"] == 8
    engine.abort()
    assert [out.finish_reason for out in waiting.get()] == ["abort"] * 8


def test_abort_by_id(open_engine, watch, call, wait_for, all_pages_are_back):
    """The call's id ends all of its completions, "id-1" one of them, no other id any."""
    engine = open_engine()
    engine.pause()
    params = SamplingParams(temperature=0, n=2, max_new_tokens=20)
    calls = {name: call(engine.generate, [[1, 2], [3]], params, request_id=name) for name in ("a", "a-b", "b", "c")}
    wait_for(lambda: engine.info()["requests"] == 16)
    engine.abort("a")
    engine.abort("b-1")
    engine.abort("c-9")
    engine.abort("unknown")
    engine.resume()
    ended = {name: [out.finish_reason for out in one.get()] for name, one in calls.items()}
    assert ended["a"] == ["abort"] * 4
    assert ended["b"] == ["length", "abort", "length", "length"]
    assert ended["a-b"] == ended["c"] == ["length"] * 4
    assert [out.request_id for out in calls["a-b"].get()] == ["a-b-0", "a-b-1", "a-b-2", "a-b-3"]
    all_pages_are_back(engine)


@pytest.mark.parametrize("tags", TAGS, ids=TAG_IDS)
def test_sleep_and_wake_under_requests(tags, model, open_engine, flying, follow, all_pages_are_back):
    engine, versions = open_engine(), {"initial": model("llama"), "1": model("llama", seed=1)}
    steps, _, waiting = flying(engine)
    weight_bytes, cache_bytes = engine.info()["weight_bytes"], engine.info()["kv_cache_bytes"]
    engine.sleep(tags)
    engine.sleep(tags)
    info, count = engine.info(), steps.count
    assert info["asleep"] == sorted(tags)
    assert info["kv_cache_bytes"] == (0 if "kv_cache" in tags else cache_bytes)
    assert info["weight_bytes"] == (0 if "weights" in tags else weight_bytes)
    assert info["weight_version"] == (None if "weights" in tags else "initial")
    with pytest.raises(AsleepError):
        engine.generate([1, 2, 3])
    time.sleep(0.05)
    assert steps.count == count
    engine.wake(tags)
    engine.wake(tags)
    assert engine.info()["asleep"] == []
    if "weights" in tags:
        with pytest.raises(AsleepError, match="update_weights"):
            engine.generate([1, 2, 3])
        assert steps.count == count
        engine.update_weights(versions["1"].state_dict(), version="1")
    outs = waiting.get()
    names = ["initial", "1"] if "weights" in tags else ["initial"]
    for out in outs:
        assert [span.version for span in out.weight_versions] == names
        follow(versions, out, recompute="kv_cache" in tags)
    assert [out.num_preemptions for out in outs] == ([1, 1] if "kv_cache" in tags else [0, 0])
    (cold,) = engine.generate(outs[0].prompt_token_ids, GREEDY)
    follow({names[-1]: versions[names[-1]]}, cold)
    assert (engine.info()["weight_bytes"], engine.info()["kv_cache_bytes"]) == (weight_bytes, cache_bytes)
    all_pages_are_back(engine)


@pytest.mark.parametrize("tags", TAGS, ids=TAG_IDS)
def test_a_sleeper_that_is_woken_equals_a_cold_engine(tags, model, open_engine, make_prompts, all_pages_are_back):
    engine, cold, prompts = open_engine("qwen3_moe"), open_engine("qwen3_moe"), make_prompts([20, 33])
    target = model("qwen3_moe", seed=1).state_dict()
    engine.generate(prompts, GREEDY)
    engine.sleep(tags)
    engine.wake()
    for one in (engine, cold):
        one.update_weights(target, version="1")
    outs, expected = ([*one.generate(prompts, GREEDY)] for one in (engine, cold))
    assert [(out.token_ids, out.cached_tokens) for out in outs] == [(out.token_ids, 0) for out in expected]
    assert all(torch.equal(out.logprobs, other.logprobs) for out, other in zip(outs, expected, strict=True))
    all_pages_are_back(engine)


def test_aborting_and_closing_asleep(open_engine, flying, make_prompts):
    engine = open_engine("qwen3_moe")
    _, _, waiting = flying(engine, return_routed_experts=True)
    engine.sleep()
    engine.abort()
    for out in waiting.get():
        assert out.finish_reason == "abort"
        assert (out.routed_experts == -1).all()  # given up with the cache
        assert len(out.routed_experts) == len(out.prompt_token_ids) + len(out.token_ids) - 1
    engine.close()
    with pytest.raises(ClosedError):
        engine.generate([1, 2, 3])


def test_closing_ends_the_calls_of_other_threads(open_engine, flying):
    engine = open_engine()
    _, _, waiting = flying(engine)
    engine.close()
    engine.close()
    assert [out.finish_reason for out in waiting.get()] == ["abort"] * 2


def test_an_unknown_tag(open_engine):
    engine = open_engine()
    for call in (engine.sleep, engine.wake):
        with pytest.raises(RequestError, match="'kv'.*possible: weights, kv_cache"):
            call(("kv",))


@pytest.mark.parametrize("export", ["fp8", "fp8_kvfp8"])
def test_static_and_kv_scales_sleep_through(export, modelopt_folder, bf16_weights, make_prompts):
    """A trainer sends BF16 only: activation and KV scales are those of the checkpoint, before and after."""
    folder, weights, prompts = modelopt_folder("qwen3", export), bf16_weights("qwen3"), make_prompts([20, 5])
    with Engine(folder, EngineConfig(kv_cache_tokens=512)) as engine:
        engine.update_weights(weights, version="1")
        digest, expected = engine.digest(), engine.generate(prompts, GREEDY)
        engine.sleep()
        engine.wake()
        engine.update_weights(weights, version="2")
        assert engine.digest() == digest
        outs = engine.generate(prompts, GREEDY)
        assert [out.token_ids for out in outs] == [out.token_ids for out in expected]


def test_a_short_call_does_not_wait_for_a_long_one(open_engine, watch, call):
    """Whoever drives the steps, a call returns when its own requests have ended."""
    engine = open_engine(max_batch_size=8)
    steps = watch(engine)
    steps.seconds = 0.01
    long = call(engine.generate, [1, 2, 3], SamplingParams(max_new_tokens=61))
    steps.wait(2)
    begin = steps.count
    short = [call(engine.generate, [4, 5], SamplingParams(max_new_tokens=2)) for _ in range(4)]
    for one in short:
        one.get()
    assert steps.count - begin < 20
    long.get()
