"""Two hundred requests in flight while ten versions commit: none is lost, and every token is its version's own."""

from __future__ import annotations

import asyncio
import threading
from contextlib import contextmanager, nullcontext

import msgspec
import pytest
import torch
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention

from rollmill.engine import PoisonedError, RequestError, SamplingParams, TransportError, VersionSpan

NUM_REQUESTS, NUM_VERSIONS = 200, 10
ROOM = {"max_batch_size": 64, "kv_cache_tokens": 8192}


@pytest.fixture(scope="module")
def versions(model):
    """version -> the transformers model of its weights; three sets of weights in turn."""
    names = ["initial", *map(str, range(1, NUM_VERSIONS + 1))]
    return {name: model("llama", seed=index % 3) for index, name in enumerate(names)}


def commit(engine, versions, version):
    engine.update_weights(versions[version].state_dict(), version=version)


def swap(engine, versions, version, mode):
    """One swap, in a pause of this mode if there is one."""
    if mode is not None:
        engine.pause(mode)
    commit(engine, versions, version)
    if mode is not None:
        engine.resume()


async def resubmit(engine, prompt, params):
    """Generate; what an abort cut short goes on as a new request, from prompt and tokens so far."""
    parts = []
    while True:
        got = [token for part in parts for token in part.token_ids]
        rest = msgspec.structs.replace(params, max_new_tokens=params.max_new_tokens - len(got))
        (out,) = await engine.agenerate([*prompt, *got], rest)
        parts.append(out)
        if out.finish_reason != "abort":
            return parts


async def roll(engine, steps, versions, prompts, mode):
    """All prompts at once, completions of 5 to 20 tokens; a version commits every three steps or so."""
    each = [SamplingParams(temperature=0, max_new_tokens=length_of(index)) for index in range(len(prompts))]
    tasks = [asyncio.ensure_future(resubmit(engine, *pair)) for pair in zip(prompts, each, strict=True)]
    for version in list(versions)[1:]:
        target = steps.count + 3
        while steps.count < target:
            await asyncio.sleep(0.001)
        await asyncio.to_thread(swap, engine, versions, version, mode)
    return await asyncio.wait_for(asyncio.gather(*tasks), 60)


def length_of(index):
    return 5 + index % 16


@pytest.mark.parametrize("mode", [None, "keep", "retract", "abort"])
def test_ten_versions_commit_under_two_hundred_requests(
    mode, versions, open_engine, watch, make_prompts, follow, all_pages_are_back
):
    engine = open_engine(**ROOM)
    steps = watch(engine)
    steps.seconds = 0.004
    prompts = make_prompts([3 + i % 30 for i in range(NUM_REQUESTS)])
    prompts[100:] = [[*prompts[0], *prompt] for prompt in prompts[100:]]
    rolled = asyncio.run(roll(engine, steps, versions, prompts, mode))
    assert engine.weight_version == str(NUM_VERSIONS)
    order = {version: index for index, version in enumerate(versions)}
    outs = [part for parts in rolled for part in parts]
    for index, (prompt, parts) in enumerate(zip(prompts, rolled, strict=True)):
        assert parts[0].prompt_token_ids == prompt
        assert sum(len(part.token_ids) for part in parts) == length_of(index)
        at = [order[span.version] for part in parts for span in part.weight_versions]
        assert at == sorted(at)
    mixed = [out for out in outs if len(out.weight_versions) > 1]
    if mode == "abort":
        assert sum(len(parts) > 1 for parts in rolled) > 50
        assert not mixed
    else:
        assert len(mixed) > 50
        assert all(len({span.version for span in out.weight_versions}) == len(out.weight_versions) for out in mixed)
    assert any(out.num_preemptions for out in outs) == (mode == "retract")
    for out in [*mixed[::12], *outs[::30]]:
        follow(versions, out, recompute=mode == "retract")
    all_pages_are_back(engine)


@contextmanager
def expanded_latents():
    """transformers' DeepSeek-V3 caches latents and expands them with the weights of the moment; the engine caches what
    the weights of their own moment made of them, and so does transformers in here."""
    known, expand = {}, DeepseekV3Attention.expand_kv

    def expand_new(self, latent, k_rot):
        old = known.get(self.layer_idx)
        start = 0 if old is None or old[0].shape[2] >= latent.shape[2] else old[0].shape[2]
        new = expand(self, latent[:, :, start:], k_rot[:, :, start:])
        joined = new if start == 0 else tuple(torch.cat(pair, dim=2) for pair in zip(old, new, strict=True))
        known[self.layer_idx] = joined
        return joined

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepseekV3Attention, "expand_kv", expand_new)
        yield


@pytest.mark.parametrize("mode", ["keep", "retract"])
@pytest.mark.parametrize("family", ["qwen3_moe", "mistral-window", "gemma2", "deepseek_v3", "gpt_oss"])
def test_a_commit_in_the_middle_of_a_request(family, mode, model, open_engine, watch, call, make_prompts, follow):
    """Kept: old keys and values with new weights. Retracted: all anew, with the new weights."""
    engine, versions = open_engine(family), {"initial": model(family), "1": model(family, seed=1)}
    steps, prompts = watch(engine), make_prompts([20, 7])
    steps.seconds = 0.005
    waiting = call(engine.generate, prompts, SamplingParams(temperature=0, max_new_tokens=24))
    steps.hold(8)
    swap(engine, versions, "1", mode)
    steps.seconds = 0.0
    for out in waiting.get():
        assert [span.version for span in out.weight_versions] == ["initial", "1"]
        with expanded_latents() if mode == "keep" else nullcontext():
            follow(versions, out, recompute=mode == "retract")
        with pytest.raises(AssertionError):  # the check tells the two apart
            follow(versions, out, recompute=mode == "keep")


@pytest.mark.parametrize("mode", ["keep", "retract"])
def test_experts_of_both_versions(mode, model, open_engine, watch, call, make_prompts):
    """Kept rows are those of the version that computed them; retracted ones are the new version's."""
    engine, versions = open_engine("qwen3_moe"), {"1": model("qwen3_moe", seed=1)}
    steps, (prompt,) = watch(engine), make_prompts([20])
    greedy = SamplingParams(temperature=0, max_new_tokens=24)
    (old,) = engine.generate(prompt, greedy, return_routed_experts=True)
    steps.seconds = 0.005
    waiting = call(engine.generate, prompt, greedy, return_routed_experts=True)
    steps.hold(6)
    swap(engine, versions, "1", mode)
    steps.seconds = 0.0
    (out,) = waiting.get()
    first = out.weight_versions[0].end
    (anew,) = engine.generate(
        [*prompt, *out.token_ids[:-1]], SamplingParams(max_new_tokens=1), return_routed_experts=True
    )
    expected = old if mode == "keep" else anew
    known = len(prompt) + first - 1
    assert torch.equal(out.routed_experts[:known].sort(-1).values, expected.routed_experts[:known].sort(-1).values)
    other = anew if mode == "keep" else old
    assert not torch.equal(out.routed_experts[:known].sort(-1).values, other.routed_experts[:known].sort(-1).values)
    assert (out.routed_experts >= 0).all()


def test_no_prefix_of_an_older_version_is_reused(versions, open_engine, make_prompts, follow):
    engine, (prompt,) = open_engine(), make_prompts([40])
    greedy = SamplingParams(temperature=0, max_new_tokens=10)
    for version in versions:
        if version != "initial":
            commit(engine, versions, version)
        assert engine.info()["prefix_cache_tokens"] == 0
        cold, warm = (engine.generate(prompt, greedy)[0] for _ in range(2))
        assert (cold.cached_tokens, warm.cached_tokens) == (0, 32)
        assert cold.weight_versions == warm.weight_versions == [VersionSpan(version, 0, 10)]
        follow(versions, cold)
        follow(versions, warm)


def test_a_request_that_outlived_a_commit_leaves_no_prefix(versions, open_engine, watch, call, make_prompts, follow):
    """Its own pages, its siblings' and what it computes later mix two versions."""
    engine, (prompt,) = open_engine(max_batch_size=4, max_step_tokens=4), make_prompts([40])
    steps = watch(engine)
    steps.seconds = 0.02
    waiting = call(engine.generate, prompt, SamplingParams(temperature=0, n=6, max_new_tokens=20))
    steps.hold(5)  # in the middle of the prompt
    assert engine.info()["prefix_cache_tokens"] == 16
    commit(engine, versions, "1")
    assert engine.info()["prefix_cache_tokens"] == 0
    steps.wait(9)
    during = engine.info()["prefix_cache_tokens"]
    steps.seconds = 0.0
    outs = waiting.get()
    assert during == 0
    assert {span.version for out in outs for span in out.weight_versions} == {"1"}
    for out in outs[4:]:  # the siblings that found no seat computed the prompt again
        follow(versions, out)
    (again,) = engine.generate(prompt, SamplingParams(temperature=0, max_new_tokens=10))
    assert again.cached_tokens == 32
    follow(versions, again)


def test_calls_never_meet_a_commit_half_way(versions, open_engine):
    """What a commit looks like from inside is not shown to callers: they wait for its end."""
    engine, stop, errors = open_engine(), threading.Event(), []

    def ask():
        while not stop.is_set():
            try:
                engine.generate([1, 2, 3], SamplingParams(max_new_tokens=1))
                engine.score([1, 2, 3])
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for version in list(versions)[1:]:
        commit(engine, versions, version)
    stop.set()
    for thread in threads:
        thread.join(10)
    assert errors == []


@pytest.mark.parametrize("ends_well", [True, False], ids=["committed", "failed"])
def test_calls_during_a_streamed_swap_wait_for_its_end(ends_well, versions, open_engine, call, wait_for):
    engine = open_engine(swap="streamed")
    pairs = list(versions["1"].state_dict().items())
    session = engine.weight_session(version="1")
    session.load(pairs[:5])
    calls = [
        call(engine.generate, [1, 2, 3], SamplingParams(temperature=0, max_new_tokens=4)),
        call(engine.score, [1, 2, 3]),
        call(lambda: asyncio.run(engine.agenerate([1, 2, 3], SamplingParams(max_new_tokens=4)))),
    ]
    wait_for(lambda: engine.info()["requests"] == 2)
    with pytest.raises(PoisonedError):  # the session's own thread would wait for itself
        engine.generate([1, 2, 3])
    assert all(one.is_alive() for one in calls)
    if ends_well:
        session.load(pairs[5:])
        session.commit()
        (out,), _, _ = (one.get() for one in calls)
        assert out.weight_versions == [VersionSpan("1", 0, 4)]
        return
    session.abort()
    for one in calls:
        with pytest.raises(PoisonedError):
            one.get()
    assert engine.info()["requests"] == 0
    commit(engine, versions, "2")
    assert engine.generate([1, 2, 3], SamplingParams(max_new_tokens=4))[0].weight_versions == [VersionSpan("2", 0, 4)]


def test_kept_requests_outlive_a_streamed_swap_that_failed_in_a_pause(versions, open_engine, watch, call, follow):
    engine = open_engine(swap="streamed")
    steps = watch(engine)
    steps.seconds = 0.005
    waiting = call(engine.generate, [1, 2, 3], SamplingParams(temperature=0, max_new_tokens=30))
    steps.hold(5)
    engine.pause()

    def torn():
        yield from list(versions["1"].state_dict().items())[:5]
        raise OSError("gone")

    with pytest.raises(TransportError):
        engine.update_weights(torn(), version="1")
    commit(engine, versions, "2")
    engine.resume()
    (out,) = waiting.get()
    assert [span.version for span in out.weight_versions] == ["initial", "2"]
    follow(versions, out)


def test_an_open_streamed_session_does_not_lock_its_own_thread_out(versions, open_engine, call):
    """Pausing, aborting and closing exclude steps; a streamed session has done so already."""

    def use():
        engine = open_engine(swap="streamed")
        session = engine.weight_session(version="1")
        session.load(list(versions["1"].state_dict().items())[:5])
        engine.pause("retract")
        engine.abort()
        engine.resume()
        engine.close()

    call(use).get(timeout=5)


def test_an_unknown_pause_mode(open_engine):
    with pytest.raises(RequestError, match="'stop'; possible: keep, retract, abort"):
        open_engine().pause("stop")
