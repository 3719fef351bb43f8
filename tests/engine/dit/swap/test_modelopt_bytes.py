"""BF16 weights that are swapped into a quantized engine give the bytes of ModelOpt's export, wherever it came from."""

from __future__ import annotations

import pytest
import torch

from rollmill.weight_sync import SafetensorsSource

SCALES = (".weight", ".weight_scale", ".weight_scale_2")


def as_bytes(value):
    return value.contiguous().reshape(-1).view(torch.uint8).tolist()


def test_a_swap_gives_modelopts_bytes(model, quant, dit, open_engine, stored, other_weights, weights_of):
    engine = open_engine(dit(model, quant), linear_kernel="reference")
    exported = weights_of(model, quant)
    engine.update_weights(other_weights(model), version="1")
    moved = stored(engine)
    assert any(as_bytes(moved[name]) != as_bytes(exported[name]) for name in moved if name.endswith(".weight"))
    engine.update_weights(dit(model), version="2")
    served = stored(engine)
    quantized = {
        name for name in exported if name.rpartition(".")[0] + ".weight_scale" in exported and ".bias" not in name
    }
    assert served.keys() == quantized
    wrong = [name for name in served if as_bytes(served[name]) != as_bytes(exported[name])]
    assert wrong == []
    assert sum(name.endswith(".weight") for name in served) == {"flux1": 26, "wan": 20}[model]
    square = [name for name in served if name.endswith("to_q.weight") and served[name].shape[0] == 128]
    assert square, "no layer tells a transposed write from a right one"


@pytest.mark.parametrize("kernel", ["reference", "exact"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_swap_equals_a_cold_load(kernel, dtype, model, quant, dit, open_engine, save, other_weights, snapshot):
    """Activations per token: a BF16 folder brings no scales."""
    settings = {"linear_kernel": kernel, "dtype": dtype, "activation": "per_token"}
    weights = other_weights(model)
    cold = open_engine(save(model, weights), quant=quant, **settings)
    hot = open_engine(dit(model, quant), **settings)
    assert hot.digest() != cold.digest()
    assert hot.update_weights(weights, version="1").digest == cold.digest()
    assert snapshot(hot) == snapshot(cold)


def test_static_scales_of_the_checkpoint_stay(model, quant, dit, open_engine, stored, weights_of, other_weights):
    engine = open_engine(dit(model, quant), linear_kernel="reference")
    engine.update_weights(other_weights(model), version="1")
    exported = weights_of(model, quant)
    scales = {name: value for name, value in stored(engine).items() if name.endswith("input_scale")}
    assert len(scales) == {"flux1": 26, "wan": 20}[model]
    assert all(value == exported[name] for name, value in scales.items())
    assert engine.info()["activation"] == ["static"]


def test_swapping_again_is_stable_and_stays_in_place(model, quant, dit, open_engine, snapshot, addresses, forward):
    engine = open_engine(dit(model, quant))
    before, places, output = snapshot(engine), addresses(engine), forward(engine, model)
    digest = engine.digest()
    for version in ("1", "2"):
        assert engine.update_weights(dit(model), version=version).digest == digest
        assert snapshot(engine) == before
        assert addresses(engine) == places
        assert torch.equal(forward(engine, model), output)
    assert engine.update_weights(dit(model), version="2").status == "unchanged"


@pytest.mark.parametrize("kernel", ["reference", "exact"])
def test_the_quantized_file_into_an_engine_born_from_bf16(kernel, model, quant, dit, open_engine, snapshot, forward):
    born = open_engine(dit(model), quant=quant, linear_kernel=kernel)
    before, output = snapshot(born), forward(born, model)
    report = born.update_weights(SafetensorsSource(dit(model, quant)), version="1")
    assert any("activations are not quantized with static scales" in warning for warning in report.warnings)
    assert snapshot(born) == before
    assert torch.equal(forward(born, model), output)
    assert report.digest == born.load_report.digest


def test_a_dry_digest_tells_what_a_swap_gives(model, quant, dit, open_engine, other_weights):
    engine = open_engine(dit(model, quant))
    weights = other_weights(model)
    said = engine.digest(weights)
    assert said != engine.digest()
    assert engine.update_weights(weights).digest == said == engine.digest()


@pytest.mark.parametrize("activation", ["per_token", "per_tensor"])
@pytest.mark.parametrize("form", ["fp8_channel", "nvfp4_w4a16", "fp8", "nvfp4"])
def test_other_formats_and_activations_are_swapped_alike(
    form, activation, model, dit, open_engine, save, other_weights, snapshot, forward
):
    settings = {"quant": form, "activation": None if form == "nvfp4_w4a16" else activation}
    cold = open_engine(save(model, other_weights(model)), **settings)
    hot = open_engine(dit(model), **settings)
    assert hot.update_weights(other_weights(model), version="1").digest == cold.digest()
    assert snapshot(hot) == snapshot(cold)
    assert torch.equal(forward(hot, model), forward(cold, model))
