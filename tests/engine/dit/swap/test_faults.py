"""Whatever goes wrong in a swap of a transformer: bytes, version, digest and outputs stay, and the error says what."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from rollmill.engine import (
    CoverageError,
    NonFiniteError,
    SessionClosedError,
    ShapeError,
    StaleVersionError,
    TransportError,
    UnsupportedError,
)

NAMES = {  # of a grouped linear, a bias, a table, a convolution or embedder, a norm
    "flux1": [
        "transformer_blocks.0.attn.to_k.weight",
        "transformer_blocks.0.attn.add_q_proj.bias",
        "single_transformer_blocks.0.proj_out.weight",
        "x_embedder.weight",
        "transformer_blocks.0.attn.norm_q.weight",
    ],
    "wan": [
        "blocks.1.attn2.to_v.weight",
        "blocks.0.attn1.to_q.bias",
        "blocks.0.scale_shift_table",
        "patch_embedding.weight",
        "blocks.0.norm2.weight",
    ],
}
PLACES = pytest.mark.parametrize("place", range(5), ids=["grouped", "bias", "table-or-linear", "embedder", "norm"])


@pytest.fixture
def engine(model, quant, dit, open_engine):
    return open_engine(dit(model, quant), swap="staged")


@pytest.fixture
def check(engine, model, unchanged):
    return unchanged(engine, model)


SIBLINGS = {"flux1": "transformer_blocks.0.attn.add_{}_proj", "wan": "blocks.1.attn1.to_{}"}


@pytest.mark.parametrize("tensor", ["weight", "bias"])
def test_a_missing_sibling(tensor, engine, model, check, other_weights):
    """What is quantized together arrives together."""
    weights = other_weights(model)
    q, k, v = (f"{SIBLINGS[model].format(letter)}.{tensor}" for letter in "qkv")
    with pytest.raises(CoverageError) as error:
        engine.update_weights({q: weights[q], v: weights[v]}, version="1")
    assert error.value.missing == (f"transformer.{k}",)
    check()


@PLACES
def test_a_tensor_missing_from_a_full_swap(place, engine, model, other_weights):
    name, weights = NAMES[model][place], other_weights(model)
    expected = engine.digest(weights)
    engine.sleep()
    engine.wake()
    with pytest.raises(CoverageError) as error:
        engine.update_weights({key: w for key, w in weights.items() if key != name}, version="1")
    assert error.value.missing == (f"transformer.{name}",)
    assert engine.update_weights(weights, version="1").digest == expected


@PLACES
def test_a_doubled_tensor(place, engine, model, check, other_weights):
    name, weights = NAMES[model][place], other_weights(model)
    with pytest.raises(CoverageError, match="1 duplicate") as error:
        engine.update_weights([*weights.items(), (f"transformer.{name}", weights[name])], version="1")
    assert error.value.duplicate == (f"transformer.{name}",)
    check()


@PLACES
@pytest.mark.parametrize("shape", ["longer", "transposed-or-flat"])
def test_a_misshaped_tensor(shape, place, engine, model, check, other_weights):
    name, weights = NAMES[model][place], other_weights(model)
    value = weights[name]
    wrong = torch.cat([value, value[:1]])
    if shape != "longer":
        wrong = value.flatten() if value.ndim != 1 else value[:, None].expand(-1, 2)
    with pytest.raises(ShapeError, match=name.replace(".", r"\.")):
        engine.update_weights({**weights, name: wrong}, version="1")
    check()


@PLACES
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_non_finite_tensor(value, place, engine, model, check, other_weights):
    name, weights = NAMES[model][place], other_weights(model)
    weights[name].view(-1)[-1] = value
    with pytest.raises(NonFiniteError, match=name.replace(".", r"\.")):
        engine.update_weights(weights, version="1")
    check()


def test_unknown_names_are_listed(engine, model, check, other_weights):
    ghosts = {"ghost.weight": torch.ones(3), "transformer.blocks.99.attn1.to_q.weight": torch.ones(2, 2)}
    with pytest.raises(CoverageError) as error:
        engine.update_weights({**ghosts, **other_weights(model)}, version="1")
    assert set(error.value.unexpected) == {"transformer.ghost.weight", "transformer.blocks.99.attn1.to_q.weight"}
    assert all(name in str(error.value) for name in error.value.unexpected)
    check()


@pytest.mark.parametrize("after", [0, 1, 40])
def test_a_torn_iterator(after, engine, model, check, other_weights):
    def torn():
        for count, pair in enumerate(other_weights(model).items()):
            if count == after:
                raise ConnectionResetError("the sender died")
            yield pair

    with pytest.raises(TransportError, match="the sender died"):
        engine.update_weights(torn(), version="1")
    check()


def test_an_aborted_session(engine, model, check, other_weights):
    session = engine.weight_session(version="1")
    session.load(other_weights(model))
    session.abort()
    check()
    with pytest.raises(SessionClosedError):
        session.commit()
    with suppress(KeyboardInterrupt), engine.weight_session(version="1") as session:
        session.load(other_weights(model))
        raise KeyboardInterrupt
    check()
    assert engine.update_weights(other_weights(model), version="1").status == "committed"


def test_the_serving_version_with_other_weights(engine, model, other_weights, unchanged):
    engine.update_weights(other_weights(model), version="1")
    check = unchanged(engine, model)
    with pytest.raises(StaleVersionError):
        engine.update_weights(other_weights(model, seed=6), version="1")
    check()


def test_weights_of_another_format(engine, model, quant, check, weights_of):
    other = {"fp8": "nvfp4", "nvfp4": "fp8"}[quant]
    with pytest.raises(UnsupportedError, match=f"stored in {other}, but its layer is computed in {quant}"):
        engine.update_weights(weights_of(model, other), version="1")
    check()


def test_buckets_in_any_order_give_the_same_bytes(model, quant, dit, open_engine, other_weights, snapshot):
    whole, parts = (open_engine(dit(model, quant)) for _ in range(2))
    weights = other_weights(model)
    whole.update_weights(weights, version="1")
    pairs = list(weights.items())[::-1]
    with parts.weight_session(version="1") as session:
        for start in range(0, len(pairs), 7):
            session.load(pairs[start : start + 7])
    assert snapshot(parts) == snapshot(whole)


def test_a_partial_swap_touches_its_layers_only(engine, model, other_weights, snapshot):
    before, weights = snapshot(engine), other_weights(model)
    name = {"flux1": "single_transformer_blocks.0.proj_out", "wan": "blocks.0.ffn.net.2"}[model]
    report = engine.update_weights({f"{name}.weight": weights[f"{name}.weight"]}, version="1")
    changed = {key for key, value in snapshot(engine).items() if value != before[key]}
    assert report.layers == 1
    assert changed
    assert all(key.startswith(f"transformer.{name}/") for key in changed)
