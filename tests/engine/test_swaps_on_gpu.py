"""Swaps on a GPU, seen from a running generation: versions, graphs, faults of the sender."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from rollmill.engine import Engine, EngineConfig, SamplingParams, TransportError, UnsupportedError
from rollmill.quant import find_capability

pytestmark = pytest.mark.gpu
TINY = Qwen3MoeConfig(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=512,
    moe_intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=128,
    num_experts=8,
    num_experts_per_tok=2,
)
PROMPTS = [list(range(start, start + 5 + start % 11)) for start in range(0, 160, 10)]
GREEDY = SamplingParams(temperature=0, max_new_tokens=24, ignore_eos=True)
LONG = SamplingParams(temperature=1.0, max_new_tokens=1600, ignore_eos=True, seed=3)


@pytest.fixture(autouse=True)
def _needs_a_gpu():
    try:
        find_capability("cuda")
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.fixture(params=["fp8_channel", "nvfp4_w4a16"])
def quant(request):
    return request.param


@pytest.fixture(params=["staged", "host"])
def mode(request):
    return request.param


def make_model(seed):
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(TINY).bfloat16()


@pytest.fixture
def open_engine(tmp_path, quant):
    opened = []

    def make(seed=0, **settings):
        make_model(seed).save_pretrained(tmp_path / str(seed))
        opened.append(Engine(tmp_path / str(seed), EngineConfig(quant=quant, device="cuda", **settings)))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


class Sender:
    """A trainer's weights, sent through one GPU buffer that is overwritten between tensors."""

    def __init__(self, seed):
        self.weights = dict(make_model(seed).named_parameters())
        self.buffer = torch.empty(max(w.numel() for w in self.weights.values()), dtype=torch.bfloat16, device="cuda")

    def __iter__(self):
        for name, weight in self.weights.items():
            view = self.buffer[: weight.numel()].view(weight.shape)
            view.copy_(weight.detach())
            yield name, view
            self.buffer.fill_(float("nan"))

    def failing(self, after):
        for count, pair in enumerate(self):
            if count == after:
                raise ConnectionResetError("the trainer is gone")
            yield pair


class Running:
    """A generation in a thread, and how many steps it has made."""

    def __init__(self, engine):
        self.steps, self.outs, step = 0, [], engine.rollouts.step

        def counted():
            step()
            self.steps += 1

        engine.rollouts.step = counted
        self.thread = threading.Thread(target=lambda: self.outs.extend(engine.generate(PROMPTS, LONG)))
        self.thread.start()

    def wait(self, steps):
        wanted = self.steps + steps
        while self.steps < wanted and self.thread.is_alive():
            time.sleep(0.001)

    def finish(self):
        self.thread.join(120)
        assert not self.thread.is_alive()
        return self.outs


@pytest.fixture
def captures(monkeypatch):
    """The sizes of the decoding steps that are captured."""
    from rollmill.engine.llm.gpu.decode_graphs import DecodeGraphs

    sizes, capture = [], DecodeGraphs._capture
    monkeypatch.setattr(DecodeGraphs, "_capture", lambda self, size: (sizes.append(size), capture(self, size))[1])
    return sizes


def observe(engine):
    outs = engine.generate(PROMPTS, GREEDY)
    return [(out.token_ids, out.logprobs.tolist()) for out in outs]


def test_twenty_swaps_in_a_full_batch(mode, open_engine, captures):
    """No request is lost, spans mark every version, no graph is captured again, and outputs are a cold engine's."""
    engine, senders = open_engine(swap=mode), [Sender(1), Sender(2)]
    observe(engine)
    engine.generate(PROMPTS, LONG)
    captured = len(captures)
    running = Running(engine)
    running.wait(5)
    versions = []
    for turn in range(20):
        version = str(turn)
        assert engine.update_weights(senders[turn % 2], version=version).status == "committed"
        if running.thread.is_alive():
            versions.append(version)
        running.wait(3)
    outs = running.finish()
    assert len(outs) == len(PROMPTS)
    assert len(versions) == 20, "the generation ended too early to see every swap"
    for out in outs:
        assert (len(out.token_ids), out.finish_reason) == (LONG.max_new_tokens, "length")
        spans = out.weight_versions
        assert [span.version for span in spans] == ["initial", *versions]
        assert (spans[0].start, spans[-1].end) == (0, LONG.max_new_tokens)
        assert all(a.end == b.start for a, b in zip(spans, spans[1:], strict=False))
        assert bool(torch.isfinite(out.logprobs).all())
    cold = open_engine(2)
    assert engine.digest() == cold.digest()
    ours = observe(engine)
    assert len(captures) == captured, f"captured again: {captures[captured:]}"
    assert ours == observe(cold)


def test_a_sender_that_fails_at_each_tenth_of_a_session(mode, open_engine, captures):
    engine, sender = open_engine(swap=mode), Sender(1)
    before, digest = observe(engine), engine.digest()
    engine.generate(PROMPTS, LONG)
    captured = len(captures)
    running = Running(engine)
    for tenth in range(10):
        running.wait(3)
        with pytest.raises(TransportError):
            engine.update_weights(sender.failing(len(sender.weights) * tenth // 10), version="1")
        assert (engine.weight_version, engine.digest()) == ("initial", digest)
    for out in running.finish():
        assert (out.finish_reason, [span.version for span in out.weight_versions]) == ("length", ["initial"])
    assert observe(engine) == before
    assert len(captures) == captured
    assert engine.update_weights(sender, version="1").status == "committed"
    assert observe(engine) != before


def test_sleep_lends_the_memory_and_loses_no_scale(mode, open_engine):
    engine, sender = open_engine(swap=mode), Sender(0)
    before, held = observe(engine), torch.cuda.memory_allocated()
    engine.sleep()
    lent = held - torch.cuda.memory_allocated()
    assert lent > engine.info()["weight_bytes"] == 0
    trainer = torch.full((lent // 2,), 7, dtype=torch.uint8, device="cuda")
    del trainer
    engine.wake()
    engine.update_weights(sender, version="1")
    assert observe(engine) == before


CYCLES = 6_000_000_000  # some three seconds


def busy(stream):
    """Keep a stream busy; the event at its end."""
    with torch.cuda.stream(stream):
        torch.cuda._sleep(CYCLES)
        return stream.record_event()


def test_steps_wait_for_nothing_that_the_caller_has_queued(open_engine):
    """A trainer in the same process works in the default stream."""
    engine = open_engine()
    before = observe(engine)
    end = busy(torch.cuda.default_stream())
    assert observe(engine) == before
    assert not end.query()
    end.synchronize()


def test_a_swap_beside_steps_waits_for_none_of_them(open_engine):
    engine, sender = open_engine(), Sender(1)
    observe(engine)
    engine.update_weights(Sender(2), version="0")  # takes memory, which may wait for all streams
    end = busy(engine.rollouts.steps.stream.stream)
    with engine.weight_session(version="1") as session:
        session.receive(sender)
        session.served.side.wait()
        assert not end.query()
    assert end.query(), "the commit did not wait for the steps"
    assert engine.weight_version == "1"


def test_a_swap_beside_the_capture_of_a_step(open_engine, monkeypatch):
    """It takes memory, of the GPU and pinned."""
    from rollmill.engine.llm.gpu.decode_graphs import DecodeGraph

    engine, weights, errors = open_engine(), {n: w.detach() for n, w in make_model(1).named_parameters()}, []
    session, forward = engine.weight_session(version="1"), DecodeGraph._forward

    def load():
        try:
            session.load({name: weight.cuda() for name, weight in weights.items()})
        except Exception as error:
            errors.append(error)

    def beside(self):
        if torch.cuda.is_current_stream_capturing() and session.report is None and not captured:
            captured.append(self)
            thread = threading.Thread(target=load)
            thread.start()
            thread.join(60)
        return forward(self)

    captured = []
    monkeypatch.setattr(DecodeGraph, "_forward", beside)
    before = observe(engine)
    assert (len(captured), errors) == (1, [])
    session.commit()
    after = observe(engine)
    assert after != before
    cold = open_engine(1)
    assert engine.digest() == cold.digest()
    assert after == observe(cold)
