"""Pauses, swaps, sleep and closing, with batches under way in another thread."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rollmill.engine import AsleepError, ClosedError, DiffusionParams, FlowSDE, PausedError

SIZE = {"height": 32, "width": 32}
PARAMS = DiffusionParams(steps=3, n=6, solver=FlowSDE(), want=["latents"], init_seed=1, step_seed=2, **SIZE)
BATCH = 2


class Call(threading.Thread):
    """A function in a thread of its own; `get` waits for its value or raises its error."""

    def __init__(self, function, *args, **options):
        super().__init__(daemon=True)
        self.task = lambda: function(*args, **options)
        self.value: Any = None
        self.error: Exception | None = None
        self.start()

    def run(self):
        try:
            self.value = self.task()
        except Exception as error:
            self.error = error

    def get(self):
        self.join(30)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error
        return self.value


class Steps:
    """Counts the forwards of an engine, and holds them at forward number `at` until `release`."""

    def __init__(self, engine):
        self.count, self.at = 0, None
        self.held, self.go = threading.Event(), threading.Event()
        engine.transformer.register_forward_pre_hook(self._before)

    def _before(self, *_):
        self.count += 1
        if self.count == self.at:
            self.held.set()
            assert self.go.wait(30)

    def hold(self, at):
        self.at = at

    def release(self):
        self.go.set()


@pytest.fixture
def engine(open_engine):
    return open_engine("flux", quant="fp8", max_denoise_batch=BATCH)


@pytest.fixture
def flying(engine, make_embeds):
    """(steps, call): six samples in three batches, held in the second step of the first."""
    steps = Steps(engine)
    steps.hold(2)
    call = Call(engine.generate, make_embeds("flux"), PARAMS)
    assert steps.held.wait(30)
    return steps, call


def assert_same(samples, expected):
    for ours, theirs in zip(samples, expected, strict=True):
        assert torch.equal(ours.latents, theirs.latents)


def test_a_pause_waits_for_the_batch_and_stops_the_next(engine, flying, open_engine, make_embeds):
    steps, call = flying
    pause = Call(engine.pause)
    pause.join(0.1)
    assert pause.is_alive()
    steps.release()
    pause.get()
    time.sleep(0.1)
    assert (steps.count, engine.info()["paused"]) == (3, True)
    engine.pause()  # twice is no harm
    engine.resume()
    assert_same(call.get(), open_engine("flux", quant="fp8").generate(make_embeds("flux"), PARAMS))
    assert not engine.info()["paused"]


def test_the_pausing_thread_cannot_wait_for_itself(engine, make_embeds):
    engine.pause()
    with pytest.raises(PausedError, match="resume"):
        engine.generate(make_embeds("flux"), PARAMS)
    other = Call(engine.generate, make_embeds("flux"), PARAMS)
    other.join(0.1)
    assert other.is_alive()
    engine.resume()
    assert len(other.get()) == 6
    assert len(engine.generate(make_embeds("flux"), PARAMS)) == 6


def test_a_swap_waits_for_a_batch_and_comes_before_the_next(
    engine, flying, transformer_folder, open_engine, make_embeds
):
    """Each sample is of one version, the one it names."""
    steps, call = flying
    swap = Call(engine.update_weights, transformer_folder("flux", seed=1), version="7")
    swap.join(0.3)
    assert swap.is_alive()
    assert engine.weight_version == "initial"
    steps.release()
    samples = call.get()
    assert swap.get().version == "7"
    versions = [sample.weight_version for sample in samples]
    assert versions == ["initial"] * BATCH + ["7"] * (6 - BATCH)
    new = open_engine(transformer_folder("flux", seed=1), quant="fp8").generate(make_embeds("flux"), PARAMS)
    old = open_engine("flux", quant="fp8").generate(make_embeds("flux"), PARAMS)
    assert_same(samples, [*old[:BATCH], *new[BATCH:]])
    assert not torch.equal(old[0].latents, new[0].latents)


def test_a_call_waits_for_the_end_of_a_streamed_swap(open_engine, transformer_folder, make_embeds):
    """It has no complete weights meanwhile; that is no error of the call."""
    engine = open_engine("flux", quant="fp8", swap="streamed")
    weights = list(load_file(transformer_folder("flux", seed=1) / "diffusion_pytorch_model.safetensors").items())
    with engine.weight_session(version="7") as session:
        session.load(weights[:20])
        call = Call(engine.generate, make_embeds("flux"), PARAMS)
        call.join(0.2)
        assert call.is_alive()
        session.load(weights[20:])
    assert [sample.weight_version for sample in call.get()] == ["7"] * 6


def test_swaps_between_many_batches(open_engine, transformer_folder, make_embeds):
    """A trainer that swaps all the time: every sample equals its version's."""
    folders = {"0": transformer_folder("flux", seed=0), "1": transformer_folder("flux", seed=1)}
    engine = open_engine(folders["0"], quant="nvfp4", max_denoise_batch=1)
    generating = Call(engine.generate, make_embeds("flux"), DiffusionParams(steps=3, n=24, init_seed=1, **SIZE))
    for count in range(1, 5):
        engine.update_weights(folders[str(count % 2)], version=str(count))
    samples = generating.get()
    plain = {key: open_engine(folder, quant="nvfp4") for key, folder in folders.items()}
    for sample in samples:
        version = 0 if sample.weight_version == "initial" else int(sample.weight_version)
        assert_same([sample], plain[str(version % 2)].replay([sample]))


def test_sleep_waits_for_a_batch_and_then_nothing_can_be_sampled(engine, flying, transformer_folder, make_embeds):
    steps, call = flying
    sleep = Call(engine.sleep)
    sleep.join(0.1)
    assert sleep.is_alive()
    steps.release()
    sleep.get()
    with pytest.raises(AsleepError):
        call.get()  # its second batch found no weights
    with pytest.raises(AsleepError, match="wake"):
        engine.generate(make_embeds("flux"), PARAMS)
    engine.wake()
    with pytest.raises(AsleepError, match="update_weights"):
        engine.generate(make_embeds("flux"), PARAMS)
    engine.update_weights(transformer_folder("flux"))
    assert len(engine.generate(make_embeds("flux"), PARAMS)) == 6


def test_close_waits_for_a_batch_and_ends_the_call(engine, flying):
    steps, call = flying
    close = Call(engine.close)
    close.join(0.1)
    assert close.is_alive()
    steps.release()
    close.get()
    with pytest.raises(ClosedError):
        call.get()
    assert steps.count == 3


def test_close_ends_calls_that_wait_in_a_pause(engine, make_embeds):
    engine.pause()
    waiting = [Call(engine.generate, make_embeds("flux"), PARAMS) for _ in range(2)]
    waiting[0].join(0.1)
    engine.close()
    for call in waiting:
        with pytest.raises(ClosedError):
            call.get()


def test_a_closed_engine_serves_nothing(engine, make_embeds):
    samples = engine.generate(make_embeds("flux"), PARAMS)
    engine.close()
    engine.close()
    calls = {
        "generate": lambda: engine.generate(make_embeds("flux"), PARAMS),
        "replay": lambda: engine.replay(samples),
        "explore": lambda: engine.explore(make_embeds("flux"), reward=len),
        "pause": engine.pause,
        "resume": engine.resume,
        "transformer": lambda: engine.transformer,
        "pipeline": lambda: engine.pipeline,
    }
    for call in calls.values():
        with pytest.raises(ClosedError):
            call()


def test_two_threads_take_turns_and_share_one_loop(engine, open_engine, make_embeds):
    embeds = [make_embeds("flux", seed=seed) for seed in range(2)]
    calls = [Call(engine.generate, one, PARAMS) for one in embeds]
    loops = [Call(lambda: engine.rollouts) for _ in range(8)]
    assert len({id(loop.get()) for loop in loops}) == 1
    alone = open_engine("flux", quant="fp8")
    for call, one in zip(calls, embeds, strict=True):
        assert_same(call.get(), alone.generate(one, PARAMS))


def test_agenerate_leaves_the_event_loop_free(engine, make_embeds):
    async def both():
        ticks, waiting = 0, asyncio.ensure_future(engine.agenerate(make_embeds("flux"), PARAMS))
        while not waiting.done():
            await asyncio.sleep(0)
            ticks += 1
        return ticks, await waiting

    ticks, samples = asyncio.run(both())
    assert ticks > 1
    assert_same(samples, engine.generate(make_embeds("flux"), PARAMS))


def test_progress_shows_on_stderr(engine, make_embeds, capsys):
    engine.generate(make_embeds("flux"), PARAMS)
    assert "samples" not in capsys.readouterr().err
    engine.generate(make_embeds("flux"), PARAMS, progress=True)
    captured = capsys.readouterr()
    assert "6/6" in captured.err
    assert not captured.out
