"""Swaps seen from outside: what an engine generates before, during and after."""

from __future__ import annotations

import pytest
import torch

from rollmill.engine import (
    ConfigError,
    CoverageError,
    Engine,
    EngineConfig,
    PoisonedError,
    SamplingParams,
    SessionBusyError,
    TransportError,
)

PROMPT = [[3, 14, 15, 92]]
PARAMS = SamplingParams(n=2, max_new_tokens=8, seed=4)


@pytest.fixture(params=["fp8", "nvfp4"])
def quant(request):
    return request.param


@pytest.fixture
def trainer(hf_model):
    return dict(hf_model("mixtral", seed=1).named_parameters())


@pytest.fixture
def make_engine(hf_model, save, quant):
    folder = save(hf_model("mixtral"))
    return lambda swap="staged": Engine(folder, EngineConfig(quant=quant, swap=swap))


def observe(engine):
    return engine.logits(PROMPT)[0], [out.token_ids for out in engine.generate(PROMPT, PARAMS)], engine.weight_version


def same(a, b):
    return torch.equal(a[0], b[0]) and a[1:] == b[1:]


def test_an_empty_session_leaves_logits_bit_identical(make_engine):
    with make_engine() as engine:
        logits, tokens, _ = observe(engine)
        with engine.weight_session(version="1"):
            pass
        assert same(observe(engine), (logits, tokens, "1"))


@pytest.mark.parametrize("swap", ["staged", "host"])
def test_a_source_that_dies_at_each_tensor_changes_nothing(swap, make_engine, trainer):
    with make_engine(swap) as engine:
        before = observe(engine)
        pairs = list(trainer.items())
        for deadly in range(len(pairs)):

            def dying(deadly=deadly):
                yield from pairs[:deadly]
                raise OSError("gone")

            with pytest.raises(TransportError):
                engine.update_weights(dying(), version="1")
            assert engine.weight_version == "initial"
        assert same(observe(engine), before)
        report = engine.update_weights(trainer, version="1")
        assert (report.status, engine.weight_version) == ("committed", "1")
        assert not torch.equal(observe(engine)[0], before[0])


def test_the_old_version_generates_while_a_session_is_open(make_engine, trainer):
    with make_engine() as engine:
        before = observe(engine)
        with engine.weight_session(version="1") as session:
            session.load(trainer)
            assert same(observe(engine), before)
            with pytest.raises(SessionBusyError):
                engine.weight_session(version="2")
        (first, _) = engine.generate(PROMPT, PARAMS)
        assert [(s.version, s.start, s.end) for s in first.weight_versions] == [("1", 0, 8)]


def test_a_poisoned_engine_refuses_until_a_full_swap(make_engine, trainer):
    with make_engine("streamed") as engine:
        with pytest.raises(CoverageError):
            engine.update_weights({**trainer, "ghost": torch.ones(1)}, version="1")
        for call in (lambda: engine.generate(PROMPT), lambda: engine.logits(PROMPT), lambda: engine.score(PROMPT)):
            with pytest.raises(PoisonedError, match="full swap"):
                call()
        assert engine.info()["poisoned"]
        assert engine.info()["weight_version"] is None
        engine.update_weights(trainer, version="2")
        assert engine.info()["poisoned"] is None
        with make_engine() as expected:
            expected.update_weights(trainer, version="2")
            assert same(observe(engine), observe(expected))


def test_a_promised_digest_is_kept(make_engine, trainer):
    with make_engine() as engine:
        promised = engine.digest(trainer)
        assert engine.digest() != promised
        assert engine.update_weights(trainer).digest == engine.digest() == promised


def test_unnamed_versions_count(make_engine, trainer):
    with make_engine() as engine:
        assert engine.weight_version == "initial"
        assert [engine.update_weights(trainer).version for _ in range(3)] == ["1", "2", "3"]


def test_weights_that_find_no_room_at_the_start(make_engine, monkeypatch):
    """Simulated: a CPU raises another error, where it raises one at all."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("rollmill.quant.slot.empty", full)
    with pytest.raises(ConfigError, match=r"no memory for the packed weights with quant='.*choose a smaller format"):
        make_engine()
