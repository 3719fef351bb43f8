"""`swap="streamed"` keeps no second copy: what fails half-way poisons, and only a full swap cures.
`swap="host"` writes in place, too, and undoes it."""

from __future__ import annotations

import threading

import pytest
import torch

from rollmill.engine import (
    CoverageError,
    DiffusionParams,
    Embeds,
    FlowSDE,
    NonFiniteError,
    PoisonedError,
    TransportError,
)

PARAMS = DiffusionParams(steps=2, height=64, width=64, solver=FlowSDE(), init_seed=1, step_seed=2)


@pytest.fixture
def embeds(model):
    generator = torch.Generator().manual_seed(0)
    pooled = torch.randn(64, generator=generator) if model == "flux1" else None
    return Embeds(torch.randn(5, 128, generator=generator), pooled)


def killed(weights, after, error):
    for count, pair in enumerate(weights.items()):
        if count == after:
            raise error
        yield pair


@pytest.mark.parametrize("dual", [None, "bf16"])
def test_a_streamed_swap_equals_a_cold_load(
    dual, model, quant, dit, save, open_engine, other_weights, snapshot, addresses
):
    cold = open_engine(save(model, other_weights(model)), quant=quant, dual=dual)
    hot = open_engine(dit(model), quant=quant, dual=dual, swap="streamed")
    places = addresses(hot)
    assert hot.update_weights(other_weights(model), version="1").digest == cold.digest()
    assert snapshot(hot) == snapshot(cold)
    assert addresses(hot) == places


@pytest.mark.parametrize("dual", [None, "bf16"])
@pytest.mark.parametrize(
    "error", [ConnectionResetError("gone"), KeyboardInterrupt()], ids=["sender-died", "interrupted"]
)
def test_killed_half_way(error, dual, model, quant, dit, open_engine, other_weights, snapshot, embeds):
    engine = open_engine(dit(model), quant=quant, dual=dual, swap="streamed")
    expected = engine.digest(other_weights(model))
    with pytest.raises((TransportError, KeyboardInterrupt)):
        engine.update_weights(killed(other_weights(model), 40, error), version="1")
    assert engine.weight_version is None
    assert "half-way" in engine.info()["poisoned"]
    with pytest.raises(PoisonedError, match="run a full swap"):
        engine.generate(embeds, PARAMS)
    some = {name: w for name, w in other_weights(model).items() if "attn" in name}
    with pytest.raises(CoverageError, match="missing"):
        engine.update_weights(some, version="2")
    assert engine.update_weights(other_weights(model), version="2").digest == expected
    assert engine.info()["poisoned"] is None
    fresh = open_engine(dit(model), quant=quant, dual=dual)
    fresh.update_weights(other_weights(model), version="1")
    assert snapshot(engine) == snapshot(fresh)
    left, right = (one.generate(embeds, PARAMS)[0] for one in (engine, fresh))
    assert torch.equal(left.latents, right.latents)
    assert left.weight_version == "2"


@pytest.mark.parametrize("dual", [None, "bf16"])
def test_host_mode_undoes_what_was_written(dual, model, quant, dit, open_engine, other_weights, snapshot, embeds):
    engine = open_engine(dit(model), quant=quant, dual=dual, swap="host")
    before, sample = snapshot(engine), engine.generate(embeds, PARAMS)[0]
    with pytest.raises(TransportError):
        engine.update_weights(killed(other_weights(model), 40, ConnectionResetError("gone")), version="1")
    assert (snapshot(engine), engine.weight_version, engine.info()["poisoned"]) == (before, "initial", None)
    again = engine.generate(embeds, PARAMS)[0]
    assert torch.equal(again.latents, sample.latents)
    assert engine.update_weights(other_weights(model), version="1").status == "committed"
    assert snapshot(engine) != before


def test_what_fails_before_the_first_byte_poisons_nothing(model, dit, open_engine, other_weights, unchanged):
    engine = open_engine(dit(model), quant="nvfp4", swap="streamed")
    check = unchanged(engine, model)
    with pytest.raises(CoverageError):
        engine.update_weights({"ghost.weight": torch.ones(2)}, version="1")
    check()
    with pytest.raises(TransportError):
        engine.update_weights(killed(other_weights(model), 0, OSError("at once")), version="1")
    check()


def test_a_bad_tensor_poisons(model, dit, open_engine, other_weights):
    engine = open_engine(dit(model), quant="nvfp4", swap="streamed")
    weights = other_weights(model)
    last = list(weights)[-1]
    with pytest.raises(NonFiniteError):
        engine.update_weights({**weights, last: torch.full_like(weights[last], torch.inf)}, version="1")
    assert engine.weight_version is None
    assert engine.update_weights(weights, version="1").status == "committed"


def test_a_cure_brings_both_transformers(two_transformers, open_engine, other_weights):
    engine = open_engine(two_transformers, quant="nvfp4", swap="streamed")
    with pytest.raises(TransportError):
        engine.update_weights(killed(other_weights("wan"), 30, OSError("gone")), version="1", module="transformer_2")
    with pytest.raises(CoverageError, match=r"69 missing: transformer\."):
        engine.update_weights(other_weights("wan"), version="1", module="transformer_2")
    both = {f"{module}.{name}": w for module in engine.transformers for name, w in other_weights("wan").items()}
    assert engine.update_weights(both, version="1").version == "1"


def test_rollouts_wait_for_a_streamed_swap(model, dit, open_engine, other_weights, embeds):
    """A trajectory is of one version: that of before, or that of after, and never of the bytes in between."""
    engine = open_engine(dit(model), quant="nvfp4", swap="streamed")
    expected = {"initial": engine.generate(embeds, PARAMS)[0].latents}
    fresh = open_engine(dit(model), quant="nvfp4")
    fresh.update_weights(other_weights(model), version="1")
    expected["1"] = fresh.generate(embeds, PARAMS)[0].latents
    samples, halfway, go_on = [], threading.Event(), threading.Event()

    def slowly():
        for count, pair in enumerate(other_weights(model).items()):
            if count == 30:
                halfway.set()
                assert go_on.wait(60)
            yield pair

    swap = threading.Thread(target=lambda: engine.update_weights(slowly(), version="1"))
    swap.start()
    assert halfway.wait(60)
    rollout = threading.Thread(target=lambda: samples.extend(engine.generate(embeds, PARAMS)))
    rollout.start()
    rollout.join(0.2)
    assert rollout.is_alive(), "a rollout began between the bytes of two versions"
    go_on.set()
    swap.join(60)
    rollout.join(60)
    assert [sample.weight_version for sample in samples] == ["1"]
    assert torch.equal(samples[0].latents, expected["1"])
    assert not torch.equal(expected["1"], expected["initial"])
