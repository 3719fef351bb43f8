"""Pauses, swaps, sleep and closing, with batches under way in another thread."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
import time
import weakref
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rollmill.engine import AsleepError, ClosedError, DiffusionParams, FlowSDE, PausedError, RequestError

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
    with pytest.raises(AsleepError, match="wake"):
        engine.generate(make_embeds("flux"), PARAMS)
    engine.wake()
    with pytest.raises(AsleepError, match="update_weights"):
        engine.generate(make_embeds("flux"), PARAMS)
    engine.update_weights(transformer_folder("flux"))
    assert len(call.get()) == 6
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


# sleep in the middle of a call


def test_a_call_under_way_waits_through_sleep_for_new_weights(
    engine, flying, transformer_folder, open_engine, make_embeds
):
    steps, call = flying
    sleep = Call(engine.sleep)
    sleep.join(0.1)
    assert sleep.is_alive()
    steps.release()
    sleep.get()
    call.join(0.1)
    assert call.is_alive()
    engine.wake()
    call.join(0.1)
    assert call.is_alive()  # awake, but without weights
    assert steps.count == 3
    engine.update_weights(transformer_folder("flux", seed=1), version="2")
    samples = call.get()
    assert [sample.weight_version for sample in samples] == ["initial"] * BATCH + ["2"] * (6 - BATCH)
    new = open_engine(transformer_folder("flux", seed=1), quant="fp8").generate(make_embeds("flux"), PARAMS)
    assert_same(samples[BATCH:], new[BATCH:])


def test_close_ends_calls_that_wait_for_weights(engine, flying):
    steps, call = flying
    sleep = Call(engine.sleep)
    sleep.join(0.1)
    steps.release()
    sleep.get()
    engine.close()
    with pytest.raises(ClosedError):
        call.get()


def test_a_call_that_begins_asleep_is_refused_before_text_is_encoded(engine, make_embeds, monkeypatch):
    (sample, *_) = engine.generate(make_embeds("flux"), PARAMS)
    engine.sleep()
    monkeypatch.setattr("rollmill.engine.dit.engine.embed_prompts", lambda *_: pytest.fail("encoded while asleep"))
    for call in (
        lambda: engine.generate("a cat", PARAMS),
        lambda: engine.replay([sample]),
        lambda: engine.explore("a cat", reward=len, precision="quantized"),
    ):
        with pytest.raises(AsleepError, match="wake"):
            call()


def test_close_while_images_are_decoded_ends_the_call(open_engine, pipeline_folder, make_embeds):
    engine = open_engine(pipeline_folder("flux2"))
    at_decode, go = threading.Event(), threading.Event()
    decode = engine.rollouts.family.decode

    def held(*arguments):
        at_decode.set()
        assert go.wait(30)
        return decode(*arguments)

    engine.rollouts.family.decode = held
    params = DiffusionParams(steps=2, n=2, want=["image"], init_seed=1, **SIZE)
    call = Call(engine.generate, make_embeds("flux2"), params)
    assert at_decode.wait(30)
    engine.close()
    go.set()
    with pytest.raises(ClosedError):
        call.get()


@pytest.mark.parametrize("made", ["pipeline", "rollouts"])
def test_nothing_is_made_of_an_engine_that_closes_meanwhile(made, open_engine, pipeline_folder):
    """Without its transformers a pipeline would load those of the folder."""
    engine = open_engine(pipeline_folder("flux2"))
    with engine._made:
        call = Call(getattr, engine, made)
        call.join(0.1)
        assert call.is_alive()
        engine.close()
    with pytest.raises(ClosedError):
        call.get()


# pauses


def test_a_pause_before_the_first_rollout_makes_no_pipeline(engine, make_embeds, monkeypatch):
    monkeypatch.setattr(type(engine), "_make_rollouts", lambda _: pytest.fail("made for a pause"))
    engine.pause()
    assert engine.info()["paused"]
    engine.resume()
    assert not engine.info()["paused"]


def test_the_one_mode_of_a_pause(engine):
    engine.pause(mode="keep")
    engine.resume()
    with pytest.raises(RequestError, match=r"'abort'.*possible: keep"):
        engine.pause(mode="abort")
    assert not engine.info()["paused"]


def test_every_thread_that_paused_is_told_that_it_would_wait_for_itself(engine, make_embeds):
    def pause_twice():
        engine.pause()
        Call(engine.pause).get()
        engine.generate(make_embeds("flux"), PARAMS)

    with pytest.raises(PausedError, match="resume"):
        Call(pause_twice).get()
    engine.resume()
    assert len(engine.generate(make_embeds("flux"), PARAMS)) == 6


def test_a_new_thread_with_the_number_of_one_that_paused_may_wait(engine, make_embeds):
    """Systems give numbers of ended threads to new ones, most often at once."""
    Call(engine.pause).get()
    call = Call(engine.generate, make_embeds("flux"), PARAMS)
    call.join(0.2)
    assert call.is_alive()
    engine.resume()
    assert len(call.get()) == 6


# direct calls of the transformer


@pytest.fixture
def inputs(engine, make_embeds):
    samples = engine.generate(make_embeds("flux"), PARAMS)
    return engine.step_inputs(samples[:1], 1)


def call_directly(engine, inputs):
    with torch.no_grad():
        return engine.transformer(**inputs)[0]


def test_a_direct_call_is_quantized_whatever_a_rollout_computes_in(open_engine, make_embeds):
    engine = open_engine("flux", quant="nvfp4", dual="bf16")
    samples = engine.generate(make_embeds("flux"), PARAMS)
    inputs = engine.step_inputs(samples[:1], 1)
    expected = call_directly(engine, inputs)
    switch = engine.rollouts.first.switch
    with switch.at("bf16"):
        assert not torch.equal(call_directly(engine, inputs), expected)
        assert torch.equal(Call(call_directly, engine, inputs).get(), expected)


def test_a_direct_call_waits_for_the_batch(engine, inputs, make_embeds):
    steps = Steps(engine)
    steps.hold(2)
    call = Call(engine.generate, make_embeds("flux"), PARAMS)
    assert steps.held.wait(30)
    direct = Call(call_directly, engine, inputs)
    direct.join(0.2)
    assert direct.is_alive()
    steps.release()
    direct.get()
    assert len(call.get()) == 6


def test_a_direct_call_sees_no_half_of_a_swap(engine, inputs, transformer_folder):
    """Between two slots of a commit the module waits."""
    slot, at_commit, go = engine._policy.plan.slots[-1], threading.Event(), threading.Event()
    commit = slot.commit

    def held(*arguments):
        at_commit.set()
        assert go.wait(30)
        commit(*arguments)

    slot.commit = held
    swap = Call(engine.update_weights, transformer_folder("flux", seed=1), version="2")
    assert at_commit.wait(30)
    direct = Call(call_directly, engine, inputs)
    direct.join(0.2)
    assert direct.is_alive()
    go.set()
    swap.get()
    assert torch.equal(direct.get(), call_directly(engine, inputs))


def test_a_direct_call_asleep_or_closed(engine, inputs, transformer_folder):
    module = engine.transformer
    before = call_directly(engine, inputs)
    engine.sleep()
    with pytest.raises(AsleepError, match="wake"):
        module(**inputs)
    engine.wake()
    engine.update_weights(transformer_folder("flux"))
    assert torch.equal(call_directly(engine, inputs), before)
    engine.close()
    with pytest.raises(ClosedError):
        module(**inputs)


def test_a_direct_call_in_a_pause_goes_through(engine, inputs):
    """The thread that paused looks at the model meanwhile."""
    engine.pause()
    call_directly(engine, inputs)
    engine.resume()


def test_the_module_is_called_as_diffusers_calls_it(engine, random_model):
    ours, theirs = engine.transformer, random_model("flux")
    assert type(ours) is type(theirs)
    assert inspect.signature(ours.forward) == inspect.signature(theirs.forward)


def test_a_closed_engine_frees_its_transformer_at_once(open_engine):
    """No cycle: memory of a GPU does not wait for the garbage collector."""
    engine = open_engine("flux", quant="fp8")
    seen = weakref.ref(engine.transformer.proj_out.weight)
    module = weakref.ref(engine.transformer)
    gc.collect()
    gc.disable()
    try:
        engine.close()
        assert module() is None
        assert seen() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("turn", ["call", "batch"])
def test_a_turn_on_a_gpu_lasts_until_the_gpu_has_finished(turn, engine, monkeypatch):
    """Kernels run behind the host: a swap that came at once would write the weights that they read."""
    turns, held = engine._turns, []

    class Stream:
        def synchronize(self):
            swap = Call(engine._policy.commit_gate().__enter__)
            swap.join(0.05)
            held.append(swap.is_alive())

    monkeypatch.setattr(turns, "_device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    with getattr(turns, turn)():
        pass
    assert held == [True]
