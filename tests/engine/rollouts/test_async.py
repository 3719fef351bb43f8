"""`agenerate` and `stream`: many tasks at once, cancelled, broken off, and told of errors."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest
import torch

from rollmill.engine import AsleepError, ClosedError, PoisonedError, SamplingParams, TransportError

GREEDY = SamplingParams(temperature=0, max_new_tokens=60)


def run(main):
    return asyncio.run(asyncio.wait_for(main, 30))


async def read(stream):
    return [chunk async for chunk in stream]


def test_tasks_and_threads_together(open_engine, call, make_prompts, all_pages_are_back):
    engine, prompts = open_engine(max_batch_size=8), make_prompts([3, 20, 9, 33])
    params = SamplingParams(n=3, max_new_tokens=15, seed=4)
    expected = [out.token_ids for out in open_engine().generate(prompts, params)]

    async def main():
        return await asyncio.gather(*(engine.agenerate(prompts, params) for _ in range(5)))

    threads = [call(engine.generate, prompts, params) for _ in range(2)]
    loops = [call(run, main()) for _ in range(2)]
    results = [one.get() for one in threads] + [outs for loop in loops for outs in loop.get()]
    assert len(results) == 12
    for outs in results:
        assert [out.token_ids for out in outs] == expected
    all_pages_are_back(engine)


def test_chunks_make_up_the_completions(open_engine, make_prompts):
    """Bytes of unfinished characters are held back, and none is lost."""
    engine = open_engine()
    prompts, params = make_prompts([5, 20]), SamplingParams(n=3, max_new_tokens=40, seed=1, temperature=2.0)
    chunks = run(read(engine.stream(prompts, params, return_routed_experts=True)))
    expected = engine.generate(prompts, params)
    assert any(ord(c) > 127 for out in expected for c in out.text)
    for index, out in enumerate(expected):
        mine = [chunk for chunk in chunks if chunk.index == index]
        assert [token for chunk in mine for token in chunk.token_ids] == out.token_ids
        assert [value for chunk in mine for value in chunk.logprobs] == out.logprobs.tolist()
        assert "".join(chunk.text for chunk in mine) == out.text
        assert [chunk.completion is not None for chunk in mine] == [False] * (len(mine) - 1) + [True]
        assert (mine[-1].completion.token_ids, mine[-1].completion.text) == (out.token_ids, out.text)
        assert len(mine) == 40


def test_what_comes_back_can_be_used_in_a_loss(open_engine, make_prompts):
    """Tensors made in inference mode could not be saved for a backward pass."""
    engine, prompts = open_engine("qwen3_moe"), make_prompts([20])
    params = SamplingParams(max_new_tokens=5, top_p=0.9, top_logprobs=2, prompt_logprobs=True, sampling_mask=True)
    for outs in (engine.generate(prompts, params, return_routed_experts=True), run(engine.agenerate(prompts, params))):
        (out,) = outs
        tensors = [
            out.logprobs,
            out.prompt_logprobs,
            out.top_logprobs.logprobs,
            *(m for m in out.sampling_mask if m is not None),
        ]
        tensors += [*engine.logits(prompts), *engine.score(prompts)]
        tensors += [] if out.routed_experts is None else [out.routed_experts]
        assert not any(tensor.is_inference() for tensor in tensors)
        new = torch.zeros(5, requires_grad=True)
        (new * out.logprobs).sum().backward()
        assert torch.equal(new.grad, out.logprobs)


def test_a_lost_device_is_told_to_who_waits(open_engine, monkeypatch):
    """After a fault of the GPU even waiting for it fails."""
    engine = open_engine()

    def lost(what):
        def fail(*_):
            raise RuntimeError(f"the device is lost: {what}")

        return fail

    with monkeypatch.context() as broken:
        broken.setattr(engine.rollouts.steps, "step", lost("a step"))
        broken.setattr(engine.rollouts.steps, "finish", lost("a wait"))
        with pytest.raises(RuntimeError, match="the device is lost") as caught:
            run(asyncio.wait_for(engine.agenerate([1, 2, 3], GREEDY), 5))
    told = [caught.value]  # giving the request up fails, too
    while told[-1].__context__ is not None:
        told.append(told[-1].__context__)
    assert "the device is lost: a step" in map(str, told)


def test_cancelling_a_task_frees_its_pages(open_engine, watch, wait_for, all_pages_are_back):
    engine = open_engine()
    steps = watch(engine)
    steps.seconds = 0.005

    async def main():
        doomed = asyncio.ensure_future(engine.agenerate([1, 2, 3], SamplingParams(n=4, max_new_tokens=60)))
        other = asyncio.ensure_future(engine.agenerate([4, 5], GREEDY))
        while steps.count < 5:
            await asyncio.sleep(0.001)
        assert engine.info()["requests"] == 5
        doomed.cancel()
        with pytest.raises(asyncio.CancelledError):
            await doomed
        assert engine.info()["requests"] == 1
        return await other

    (out,) = run(main())
    assert len(out.token_ids) == 60
    all_pages_are_back(engine)


def test_breaking_out_of_a_stream_aborts_it(open_engine, watch, all_pages_are_back):
    engine = open_engine()
    steps = watch(engine)
    steps.seconds = 0.005

    async def main():
        async for chunk in engine.stream([1, 2, 3], SamplingParams(n=2, max_new_tokens=60)):
            assert chunk.completion is None
            break
        gc.collect()
        while engine.info()["requests"]:
            await asyncio.sleep(0.001)
        return steps.count

    assert run(main()) < 40
    all_pages_are_back(engine)


def test_an_aborted_stream_ends_with_what_there_is(open_engine, watch):
    engine = open_engine()
    watch(engine).seconds = 0.005

    async def main():
        chunks = []
        async for chunk in engine.stream([1, 2, 3], GREEDY, request_id="x"):
            chunks.append(chunk)
            if len(chunks) == 5:
                engine.abort("x")
        return chunks

    chunks = run(main())
    tokens, done = [token for chunk in chunks for token in chunk.token_ids], chunks[-1].completion
    assert (done.finish_reason, done.token_ids) == ("abort", tokens)
    assert "".join(chunk.text for chunk in chunks) == done.text
    assert 5 <= len(tokens) < 60


def test_a_loop_that_was_closed_disturbs_nobody(open_engine, watch, call, wait_for, all_pages_are_back):
    """Its requests go on to their end; nobody listens."""
    engine = open_engine()
    watch(engine).seconds = 0.003
    loop = asyncio.new_event_loop()
    stream = engine.stream([1, 2, 3], GREEDY)
    loop.run_until_complete(anext(stream))
    other = call(engine.generate, [4, 5], GREEDY)
    loop.close()
    assert len(other.get()[0].token_ids) == 60
    wait_for(lambda: engine.info()["requests"] == 0)
    all_pages_are_back(engine)


def torn(model):
    yield from list(model.state_dict().items())[:5]
    raise OSError("gone")


def test_poison_reaches_everyone_in_flight(model, open_engine, watch, call, wait_for, all_pages_are_back):
    engine = open_engine(swap="streamed")
    steps = watch(engine)
    steps.seconds = 0.005
    tasks = [
        call(lambda: run(engine.agenerate([1, 2, 3], GREEDY))),
        call(lambda: run(read(engine.stream([4], GREEDY)))),
    ]
    threads = [call(engine.generate, [5, 6], GREEDY) for _ in range(2)]
    wait_for(lambda: engine.info()["requests"] == 4)
    steps.hold(3)
    with pytest.raises(TransportError):
        engine.update_weights(torn(model("llama", seed=1)), version="1")
    for one in [*tasks, *threads]:
        with pytest.raises(PoisonedError, match="half-way"):
            one.get()
    all_pages_are_back(engine)
    engine.update_weights(model("llama", seed=1).state_dict(), version="2")
    (out,) = run(engine.agenerate([1, 2, 3], GREEDY))
    assert out.weight_versions[0].version == "2"


def test_an_error_in_the_engines_thread_reaches_everyone(open_engine, watch, call, all_pages_are_back):
    """No request ends as if it had been aborted on purpose, in whatever thread its caller waits."""
    engine = open_engine()
    steps = watch(engine)
    steps.seconds = 0.005
    task = call(lambda: run(engine.agenerate([1, 2, 3], GREEDY)))
    thread = call(engine.generate, [5, 6], GREEDY)
    steps.wait(4)

    def burn():
        if threading.current_thread().name == "rollmill-rollouts":
            raise RuntimeError("out of memory")

    steps.before = burn
    for one in (task, thread):
        with pytest.raises(RuntimeError, match="out of memory"):
            one.get()
    steps.before = None
    all_pages_are_back(engine)
    assert len(run(engine.agenerate([1, 2, 3], GREEDY))[0].token_ids) == 60


def test_asleep_and_closed(open_engine):
    engine = open_engine()
    stream, unread = engine.stream([1, 2, 3], GREEDY), engine.stream([1, 2, 3], GREEDY)
    run(read(stream))
    engine.sleep()
    with pytest.raises(AsleepError):
        engine.stream([1, 2, 3])
    with pytest.raises(AsleepError):
        run(engine.agenerate([1, 2, 3]))
    engine.close()
    with pytest.raises(ClosedError):
        run(read(unread))
    with pytest.raises(ClosedError):
        run(engine.agenerate([1, 2, 3]))


def test_an_agenerate_in_the_pausing_thread_waits(open_engine):
    """The loop is free to resume."""
    engine = open_engine()

    async def main():
        engine.pause()
        waiting = asyncio.ensure_future(engine.agenerate([1, 2, 3], GREEDY))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        engine.resume()
        return await waiting

    assert len(run(main())[0].token_ids) == 60
