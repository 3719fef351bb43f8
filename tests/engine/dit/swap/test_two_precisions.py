"""`dual="bf16"`: one swap feeds the quantized copy and the BF16 one, under one version or not at all."""

from __future__ import annotations

import pytest
import torch

from rollmill.engine import (
    AsleepError,
    CoverageError,
    DiffusionParams,
    Embeds,
    FlowSDE,
    NonFiniteError,
)

ALPHA, RANK = 8.0, 4


@pytest.fixture
def dual(model, quant, dit, open_engine):
    def make(form="bf16", **settings):
        chosen = {"quant": quant} if form == "bf16" else {}
        return open_engine(dit(model, form), dual="bf16", **chosen, **settings)

    return make


@pytest.fixture
def both(forward, model):
    """Outputs in both precisions."""
    return lambda engine: [forward(engine, model, precision=name) for name in ("quantized", "bf16")]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def twins_of(engine):
    return [twin for transformer in engine.transformers.values() for twin in transformer.twins.values()]


def test_the_bf16_copy_computes_as_a_bf16_engine(model, quant, dit, dual, open_engine, other_weights, forward):
    engine, plain = dual(), open_engine(dit(model), quant="bf16")
    single = open_engine(dit(model), quant=quant)
    for version in ("1", "2"):
        assert torch.equal(forward(engine, model, precision="bf16"), forward(plain, model))
        assert torch.equal(forward(engine, model), forward(single, model))
        assert not torch.equal(forward(engine, model), forward(plain, model))
        for one in (engine, plain, single):
            one.update_weights(other_weights(model), version=version)


def test_linears_kept_in_float32_are_float32_in_both(dit, open_engine, forward):
    """Wan's time embedder, quantized against the recipe: its BF16 copy is the float32 one of an unquantized engine."""
    engine = open_engine(dit("wan"), quant="fp8", keep=["patch_embedding"], dual="bf16")
    assert torch.equal(forward(engine, "wan", precision="bf16"), forward(open_engine(dit("wan")), "wan"))


def test_a_rollout_in_two_precisions_after_a_swap(dit, open_engine, other_weights):
    """Through the loop: samples of the window's precision replay bit for bit."""
    engine = open_engine(dit("flux1"), quant="nvfp4", dual="bf16")
    plain = open_engine(dit("flux1"), quant="bf16")
    generator = torch.Generator().manual_seed(0)
    embeds = Embeds(torch.randn(5, 128, generator=generator), torch.randn(64, generator=generator))
    params = DiffusionParams(
        steps=3, height=64, width=64, n=2, solver=FlowSDE(), init_seed=1, step_seed=2, precision="bf16"
    )
    for one in (engine, plain):
        one.update_weights(other_weights("flux1"), version="5")
    got, expected = engine.generate(embeds, params), plain.generate(embeds, params)
    for left, right in zip(got, expected, strict=True):
        assert left.weight_version == "5"
        assert torch.equal(left.latents, right.latents)
        assert torch.equal(left.logprobs, right.logprobs)


def test_one_version_for_both_or_none(model, dual, both, snapshot, other_weights):
    engine = dual()
    before, outputs, digest = snapshot(engine), both(engine), engine.digest()
    weights = other_weights(model)
    name = next(key for key in reversed(weights) if key.endswith("to_v.weight"))
    bad = {**weights, name: torch.full_like(weights[name], torch.nan)}
    for wrong, error in ((bad, NonFiniteError), ({k: w for k, w in weights.items() if k != name}, CoverageError)):
        with pytest.raises(error):
            engine.update_weights(wrong, version="1")
        assert snapshot(engine) == before
        assert same(both(engine), outputs)
        assert (engine.digest(), engine.weight_version) == (digest, "initial")
    assert engine.update_weights(weights, version="1").version == "1"
    assert not any(torch.equal(a, b) for a, b in zip(both(engine), outputs, strict=True))


def test_an_interrupt_between_the_copies_serves_no_mixture(model, dual, other_weights, monkeypatch):
    """A commit that is torn by a signal poisons; a full swap cures."""
    engine = dual()
    expected = engine.digest(other_weights(model))
    last = twins_of(engine)[-1]
    genuine = last.commit

    def torn(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(last, "commit", torn)
    with pytest.raises(KeyboardInterrupt):
        engine.update_weights(other_weights(model), version="1")
    assert engine.weight_version is None
    assert "half-way" in engine.info()["poisoned"]
    monkeypatch.setattr(last, "commit", genuine)
    assert engine.update_weights(other_weights(model), version="1").digest == expected
    assert engine.info()["poisoned"] is None


def test_the_digest_covers_both_copies(model, quant, dit, dual, open_engine, other_weights, monkeypatch):
    engine = dual()
    assert engine.digest() != open_engine(dit(model), quant=quant).digest()
    weights = other_weights(model)
    report = engine.update_weights(weights, version="1")
    assert report.digest == engine.digest() == engine.digest(weights)
    assert report.coverage == 1.0
    twin = twins_of(engine)[0]
    monkeypatch.setitem(twin.digests, "weight", twin.digests["weight"] ^ 1)
    assert engine.digest() != report.digest


def test_swap_equals_cold_load_of_both(model, dual, save, quant, open_engine, other_weights, snapshot):
    cold = open_engine(save(model, other_weights(model)), quant=quant, dual="bf16")
    hot = dual()
    hot.update_weights(other_weights(model), version="1")
    assert snapshot(hot) == snapshot(cold)
    assert hot.digest() == cold.digest()


def test_a_quantized_checkpoint_has_its_own_values_as_bf16_copy(model, quant, dual, both):
    """The copy of a quantized file is what that file decodes to, rounded to BF16: no BF16 weights are at hand."""
    engine = dual(quant, linear_kernel="reference")
    for transformer in engine.transformers.values():
        for slot, twin in transformer.twins.items():
            packed = {key: slot.tensors[f"0.{key}"] for key in (*slot.matrices, *slot.scales) if key != "input_scale"}
            shape = type(slot.shape)((slot.shape.rows[0],), slot.shape.cols)
            decoded = slot.scheme.dequantize(packed, shape)
            assert torch.equal(twin.tensors["0.weight"].float(), decoded.bfloat16().float()), slot.name
    quantized, copy = both(engine)
    assert not torch.equal(quantized, copy)


@pytest.mark.parametrize("master", [None, "host"])
def test_sleep_and_wake(master, model, dual, both, snapshot, other_weights):
    engine = dual(master=master)
    engine.update_weights(other_weights(model), version="1")
    before, outputs, size = snapshot(engine), both(engine), engine.info()["weight_bytes"]
    engine.sleep()
    assert engine.info()["weight_bytes"] == 0 < size
    report = engine.wake()
    assert engine.info()["weight_bytes"] == size
    if master is None:
        assert report is None
        with pytest.raises(AsleepError):
            engine._policy.check_servable()
        report = engine.update_weights(other_weights(model), version="1")
    assert report.version == engine.weight_version == "1"
    assert snapshot(engine) == before
    assert same(both(engine), outputs)


def test_the_master_keeps_one_copy(model, quant, dit, dual, open_engine, weights_of):
    weights = weights_of(model)
    sizes = {
        one.info()["master_bytes"] for one in (dual(master="host"), open_engine(dit(model), quant=quant, master="host"))
    }
    assert sizes == {sum(w.nbytes for w in weights.values())}


def test_an_adapter_feeds_both_copies(model, quant, dual, both, save, open_engine, weights_of, snapshot):
    module = {"flux1": "transformer_blocks.0.attn.to_q", "wan": "blocks.0.attn1.to_q"}[model]
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randn(shape, generator=generator) for shape in ((RANK, 128), (128, RANK)))
    engine = dual(master="host")
    before, outputs = snapshot(engine), both(engine)
    engine.update_lora({f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, alpha=ALPHA, rank=RANK)
    weights = weights_of(model)
    weights[f"{module}.weight"] = (weights[f"{module}.weight"].float() + ALPHA / RANK * (b @ a)).bfloat16()
    cold = open_engine(save(model, weights), quant=quant, dual="bf16")
    assert snapshot(engine) == snapshot(cold)
    engine.remove_lora()
    assert snapshot(engine) == before
    assert same(both(engine), outputs)


def test_quantization_error_is_that_of_the_quantized_copy(model, quant, dual, dit, open_engine):
    engine = dual(master="host", linear_kernel="reference")
    errors = engine.quantization_error()
    assert errors == open_engine(dit(model), quant=quant, master="host").quantization_error()
    slots = {slot.name: slot for slot in engine._policy.plan.addressed if slot.scheme.name == quant}
    assert errors.keys() == slots.keys()
    for name, slot in slots.items():
        served, plain = [], []
        for shard, rows in enumerate(slot.shape.rows):
            packed = {key: slot.tensors[f"{shard}.{key}"] for key in (*slot.matrices, *slot.scales)}
            served.append(slot.scheme.dequantize(packed, type(slot.shape)((rows,), slot.shape.cols)))
            plain.append(engine.transformers["transformer"].twins[slot].tensors[f"{shard}.weight"].float())
        weight = torch.cat(plain).double()
        expected = (torch.cat(served).double() - weight).norm() / weight.norm()
        assert errors[name] == pytest.approx(float(expected), rel=1e-6)


def test_static_scales_count_what_they_clip(model, quant, dit, open_engine, forward, weights_of, other_weights):
    """On the calibration's own weights little is clipped; activations ten times as large are."""
    engine = open_engine(dit(model, quant), dual="bf16")
    forward(engine, model)
    calm = engine.info()["clipping"]
    quantized = {slot.name for slot in engine._policy.plan.addressed if slot.scheme.name == quant}
    assert calm.keys() == quantized
    forward(engine, model, precision="bf16")
    assert engine.info()["clipping"] == calm, "the BF16 copy quantizes no activations"
    module = {"flux1": "transformer_blocks.0.ff.net.0.proj", "wan": "blocks.0.ffn.net.0.proj"}[model]
    follower = module.replace("net.0.proj", "net.2")
    loud = {f"{module}.{leaf}": weights_of(model)[f"{module}.{leaf}"] * 10 for leaf in ("weight", "bias")}
    report = engine.update_weights(loud, version="1")
    assert report.clipping == calm, "the report carries the previous version's"
    assert set(engine.info()["clipping"].values()) == {0.0}
    forward(engine, model)
    assert engine.info()["clipping"][f"transformer.{follower}"] > max(0.01, calm[f"transformer.{follower}"])
