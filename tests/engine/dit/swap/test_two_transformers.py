"""Wan 2.2 has two transformers: swaps and adapters are for one of them, or for both."""

from __future__ import annotations

import pytest
import torch

from rollmill.engine import ConfigError, CoverageError
from rollmill.engine.checkpoint import is_diffusers

ALPHA, RANK = 8.0, 4
MODULE = "blocks.0.attn1.to_q"


@pytest.fixture(params=["bare", "prefixed"])
def prefix(request):
    """A function: module -> what its names begin with."""
    return {"bare": lambda module: "", "prefixed": lambda module: f"{module}."}[request.param]


def of_component(snapshot, component):
    return {name: value for name, value in snapshot.items() if name.startswith(f"{component}.")}


def make_adapter(seed, prefix):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"A": (RANK, 128), "B": (128, RANK)}
    return {
        f"{prefix}{MODULE}.lora_{side}.weight": torch.randn(shape, generator=generator)
        for side, shape in shapes.items()
    }


def test_each_is_swapped_by_itself(prefix, quant, two_transformers, open_engine, other_weights, snapshot, forward):
    engine = open_engine(two_transformers, quant=quant)
    assert list(engine.transformers) == ["transformer", "transformer_2"]
    start = snapshot(engine)
    outputs = {name: forward(engine, "wan", name) for name in engine.transformers}
    for version, module in enumerate(("transformer_2", "transformer"), 1):
        named = {f"{prefix(module)}{name}": w for name, w in other_weights("wan", seed=20 + version).items()}
        said = engine.digest(named, module=module)
        report = engine.update_weights(named, version=str(version), module=module)
        assert (report.version, engine.weight_version) == (str(version), str(version))
        assert report.digest == said
        assert not torch.equal(forward(engine, "wan", module), outputs[module])
        if module == "transformer_2":
            assert of_component(snapshot(engine), "transformer") == of_component(start, "transformer")
            assert torch.equal(forward(engine, "wan", "transformer"), outputs["transformer"])
    assert engine.update_weights(two_transformers / "transformer", module="transformer").status == "committed"
    assert engine.update_weights(two_transformers / "transformer_2", module="transformer_2").version == "4"
    assert snapshot(engine) == start


def test_both_at_once_under_one_version(quant, two_transformers, open_engine, other_weights):
    engine = open_engine(two_transformers, quant=quant)
    both = {
        f"{module}.{name}": w
        for seed, module in enumerate(engine.transformers)
        for name, w in other_weights("wan", seed=30 + seed).items()
    }
    report = engine.update_weights(both, version="7")
    apart = open_engine(two_transformers, quant=quant)
    for seed, module in enumerate(apart.transformers):
        with apart.weight_session(module=module) as session:
            session.load(other_weights("wan", seed=30 + seed))
    assert report.digest == apart.digest()
    assert (report.version, report.coverage) == ("7", 1.0)


def test_unprefixed_names_without_a_module(two_transformers, open_engine, weights_of, unchanged):
    engine = open_engine(two_transformers, quant="nvfp4", master="host")
    check = unchanged(engine, "wan")
    with pytest.raises(CoverageError, match=r"2 modules.*'transformer\.' or 'transformer_2\.'.*module=") as error:
        engine.update_weights(weights_of("wan"), version="1")
    assert set(error.value.unexpected) == set(weights_of("wan"))
    check()
    with pytest.raises(CoverageError, match="module="):
        engine.update_lora(make_adapter(1, ""), alpha=ALPHA, rank=RANK)
    check()


def test_a_module_that_is_not_there(two_transformers, dit, open_engine, weights_of):
    engine = open_engine(two_transformers, quant="nvfp4")
    with pytest.raises(ConfigError, match="transformer_3.*possible: transformer, transformer_2"):
        engine.update_weights(weights_of("wan"), module="transformer_3")
    single = open_engine(dit("wan"), quant="nvfp4")
    with pytest.raises(ConfigError, match="possible: transformer"):
        single.weight_session(module="transformer_2")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_weights_of_one_transformer_need_a_module(kind, two_transformers, open_engine, unchanged):
    """Nothing in a bare folder or file tells whose weights they are."""
    engine = open_engine(two_transformers, quant="nvfp4")
    check = unchanged(engine, "wan")
    place = two_transformers / "transformer_2"
    place = place if kind == "folder" else next(place.glob("*.safetensors"))
    with pytest.raises(ConfigError, match="module=.*possible: transformer, transformer_2"):
        engine.update_weights(place, version="1")
    with pytest.raises(ConfigError, match="module="):
        engine.digest(place)
    check()
    assert engine.update_weights(place, module="transformer_2").status == "committed"


def test_a_pipeline_brings_both_without_a_module(two_transformers, open_engine, other_weights, snapshot):
    engine = open_engine(two_transformers, quant="nvfp4")
    start = snapshot(engine)
    for seed, module in enumerate(engine.transformers):
        engine.update_weights(other_weights("wan", seed=40 + seed), module=module)
    assert snapshot(engine) != start
    assert engine.update_weights(two_transformers).coverage == 1.0
    assert snapshot(engine) == start


def test_a_pipeline_of_one_transformer_is_not_half_a_swap(two_transformers, tmp_path, open_engine, unchanged):
    engine = open_engine(two_transformers, quant="nvfp4")
    check = unchanged(engine, "wan")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "transformer").symlink_to(two_transformers / "transformer")
    with pytest.raises(ConfigError, match="module="):
        engine.update_weights(tmp_path / "half")
    check()
    assert engine.update_weights(tmp_path / "half", module="transformer").status == "committed"


def test_a_pipeline_with_more_transformers_than_the_engine(two_transformers, dit, open_engine):
    engine = open_engine(dit("wan"), quant="nvfp4")
    assert engine.update_weights(two_transformers).status == "committed"


def test_names_of_the_other_module_are_unknown(two_transformers, open_engine, weights_of, unchanged):
    engine = open_engine(two_transformers, quant="nvfp4")
    check = unchanged(engine, "wan")
    with pytest.raises(CoverageError, match="unexpected"):
        engine.update_weights(
            {f"transformer.{name}": w for name, w in weights_of("wan").items()}, module="transformer_2"
        )
    check()


def test_each_keeps_its_own_adapter(prefix, quant, two_transformers, open_engine, snapshot):
    engine = open_engine(two_transformers, quant=quant, master="host")
    base = snapshot(engine)

    def put(module, seed):
        engine.update_lora(make_adapter(seed, prefix(module)), alpha=ALPHA, rank=RANK, module=module)
        return of_component(snapshot(engine), module)

    first = put("transformer", 1)
    second = put("transformer_2", 2)
    assert first != of_component(base, "transformer")
    assert second != of_component(base, "transformer_2")
    assert of_component(snapshot(engine), "transformer") == first, "the second adapter took the first one off"
    assert put("transformer", 3) != first
    assert of_component(snapshot(engine), "transformer_2") == second
    engine.remove_lora(module="transformer")
    assert of_component(snapshot(engine), "transformer") == of_component(base, "transformer")
    assert of_component(snapshot(engine), "transformer_2") == second
    engine.remove_lora()
    assert snapshot(engine) == base


@pytest.mark.parametrize("first", ["transformer", "transformer_2"])
def test_full_names_without_a_module_leave_the_adapter_of_the_other(first, two_transformers, open_engine, snapshot):
    """As with `module=`: an adapter takes the place of those of the modules that it names."""
    engine = open_engine(two_transformers, quant="nvfp4", master="host")
    (second,) = engine.transformers.keys() - {first}
    engine.update_lora(make_adapter(1, ""), alpha=ALPHA, rank=RANK, module=first)
    adapted = of_component(snapshot(engine), first)
    engine.update_lora(make_adapter(2, f"{second}."), alpha=ALPHA, rank=RANK)
    assert of_component(snapshot(engine), first) == adapted
    engine.update_lora(make_adapter(3, f"{second}."), alpha=ALPHA, rank=RANK)
    apart = open_engine(two_transformers, quant="nvfp4", master="host")
    both = make_adapter(1, f"{first}.") | make_adapter(3, f"{second}.")
    assert apart.update_lora(both, alpha=ALPHA, rank=RANK).digest == engine.digest()
    engine.remove_lora()
    assert snapshot(engine) == snapshot(open_engine(two_transformers, quant="nvfp4"))


@pytest.mark.parametrize("start", ["transformer.", "base_model.model.transformer."])
def test_a_file_for_the_first_transformer_goes_into_the_second_one(start, two_transformers, open_engine, snapshot):
    """diffusers begins the names of either's adapter with `transformer.`: `load_into_transformer_2=True` chooses."""
    engine = open_engine(two_transformers, quant="nvfp4", master="host")
    base = snapshot(engine)
    digest = engine.update_lora(make_adapter(1, ""), alpha=ALPHA, rank=RANK, module="transformer_2").digest
    engine.remove_lora()
    report = engine.update_lora(make_adapter(1, start), alpha=ALPHA, rank=RANK, module="transformer_2")
    assert report.digest == digest
    assert of_component(snapshot(engine), "transformer") == of_component(base, "transformer")


def test_an_adapter_for_both_does_not_go_into_one(two_transformers, open_engine, unchanged):
    engine = open_engine(two_transformers, quant="nvfp4", master="host")
    check = unchanged(engine, "wan")
    first = {name.replace("to_q", "to_out.0"): value for name, value in make_adapter(1, "transformer.").items()}
    for second in (make_adapter(2, "transformer_2."), make_adapter(2, "")):
        with pytest.raises(CoverageError, match="unexpected") as error:
            engine.update_lora(first | second, alpha=ALPHA, rank=RANK, module="transformer_2")
        assert set(error.value.unexpected) == set(first)
    with pytest.raises(CoverageError, match="unexpected"):
        engine.update_lora(make_adapter(2, "transformer_2."), alpha=ALPHA, rank=RANK, module="transformer")
    check()


def test_new_base_weights_of_one_leave_the_adapter_of_the_other(two_transformers, open_engine, snapshot):
    engine = open_engine(two_transformers, quant="nvfp4", master="host")
    for seed, module in enumerate(engine.transformers):
        engine.update_lora(make_adapter(seed, ""), alpha=ALPHA, rank=RANK, module=module)
    adapted = of_component(snapshot(engine), "transformer_2")
    report = engine.update_weights(two_transformers / "transformer", module="transformer")
    assert any("without the adapter" in warning for warning in report.warnings)
    assert of_component(snapshot(engine), "transformer_2") == adapted
    fresh = open_engine(two_transformers, quant="nvfp4")
    assert of_component(snapshot(engine), "transformer") == of_component(snapshot(fresh), "transformer")


def test_a_sleeping_engine_wakes_with_both_adapters(two_transformers, open_engine, snapshot, forward):
    engine = open_engine(two_transformers, quant="nvfp4", master="host")
    for seed, module in enumerate(engine.transformers):
        engine.update_lora(make_adapter(seed, ""), alpha=ALPHA, rank=RANK, module=module)
    served, outputs = snapshot(engine), [forward(engine, "wan", name) for name in engine.transformers]
    engine.sleep()
    engine.wake()
    assert snapshot(engine) == served
    assert all(
        torch.equal(forward(engine, "wan", name), out) for name, out in zip(engine.transformers, outputs, strict=True)
    )


def test_a_folder_of_transformers_without_an_index(two_transformers, open_engine, weights_of):
    """As a pipeline of which nothing else was kept."""
    indexed = open_engine(two_transformers, quant="fp8").digest()
    (two_transformers / "model_index.json").unlink()
    engine = open_engine(two_transformers, quant="fp8")
    assert is_diffusers(two_transformers)
    assert list(engine.transformers) == ["transformer", "transformer_2"]
    assert engine.digest() == indexed
    assert engine.pipeline is None
