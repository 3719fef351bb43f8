"""Adapters: merged into the BF16 master, requantized like any weight, taken off without a trace."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from rollmill.quant import NVFP4, ConfigError, ModelError, RollmillError, UnsupportedError, WeightShape, make_scheme
from rollmill.weight_sync import (
    CoverageError,
    NonFiniteError,
    PoisonedError,
    ShapeError,
    StaleVersionError,
    TransportError,
)

NVFP4_TOKEN = NVFP4()
SCHEMES = [make_scheme("bf16"), make_scheme("fp8", "static"), make_scheme("fp8_channel"), NVFP4("static")]
MODULES = {
    "one_of_fused": ["q_proj"],
    "dense": ["k_proj", "v_proj", "gate_proj", "odd_proj"],
    "experts": ["experts.0.up_proj", "experts.3.gate_proj", "experts.1.down_proj"],
}
RANK, ALPHA = 4, 24.0


def make_adapter(weights, modules, seed=5, rank=RANK, prefix="base_model.model.", infix=""):
    """Factors in float32, so large that most weights move by several BF16 ulps."""
    generator = torch.Generator().manual_seed(seed)
    adapter = {}
    for module in modules:
        rows, cols = weights[f"{module}.weight"].shape
        adapter[f"{prefix}{module}.lora_A{infix}.weight"] = torch.randn(rank, cols, generator=generator) * 0.1
        adapter[f"{prefix}{module}.lora_B{infix}.weight"] = torch.randn(rows, rank, generator=generator) * 0.1
    return adapter


def merge(weights, adapter, scale=ALPHA / RANK):
    """What a trainer would save after merging: an own computation in float32, rounded once."""
    merged = dict(weights)
    for name, a in adapter.items():
        if ".lora_A" in name:
            b = adapter[name.replace("lora_A", "lora_B")]
            weight = name.removeprefix("base_model.model.").split(".lora_A")[0] + ".weight"
            merged[weight] = (weights[weight].float() + scale * (b.float() @ a.float())).bfloat16()
            assert not torch.equal(merged[weight], weights[weight])
    return merged


@pytest.fixture(params=SCHEMES, ids=lambda s: f"{s.name}-{s.activation}")
def scheme(request):
    return request.param


@pytest.fixture
def load(cold_load):
    return lambda scheme, weights, mode="staged": cold_load(scheme, weights, mode, master="host")


@pytest.mark.parametrize("modules", MODULES.values(), ids=MODULES.keys())
def test_a_merged_adapter_equals_a_cold_load_of_merged_weights(
    scheme, modules, load, cold_load, snapshot, addresses, weights_a
):
    policy = load(scheme, weights_a)
    base, places = snapshot(policy), addresses(policy)
    adapter = make_adapter(weights_a, modules)
    report = policy.update_lora(adapter, ALPHA, RANK, "lora")
    expected = cold_load(scheme, merge(weights_a, adapter))
    assert snapshot(policy) == snapshot(expected)
    assert report.digest == policy.digest() == expected.digest()
    assert (policy.version, report.status, report.warnings) == ("lora", "committed", ())
    assert policy.remove_lora("off").digest == cold_load(scheme, weights_a).digest()
    assert snapshot(policy) == base
    assert addresses(policy) == places


@pytest.mark.parametrize("mode", ["staged", "host", "streamed"])
def test_adapters_replace_each_other(mode, load, cold_load, snapshot, weights_a):
    policy = load(NVFP4_TOKEN, weights_a, mode)
    first = make_adapter(weights_a, ["q_proj", "odd_proj", "experts.2.down_proj"])
    second = make_adapter(weights_a, ["k_proj", "experts.2.gate_proj"], seed=6)
    policy.update_lora(first, ALPHA, RANK)
    report = policy.update_lora(second, 2 * ALPHA, RANK)
    assert snapshot(policy) == snapshot(cold_load(NVFP4_TOKEN, merge(weights_a, second, 2 * ALPHA / RANK)))
    assert report.layers == 4  # qkv, odd, w2 of the first; qkv, w13 of the second
    assert policy.remove_lora().layers == 2
    assert snapshot(policy) == snapshot(cold_load(NVFP4_TOKEN, weights_a))


def test_only_adapted_layers_are_touched(load, weights_a):
    policy = load(NVFP4_TOKEN, weights_a)
    assert policy.update_lora(make_adapter(weights_a, ["q_proj"]), ALPHA, RANK).layers == 1
    assert policy.remove_lora().layers == 1
    assert policy.remove_lora().layers == 0


@pytest.mark.parametrize(("prefix", "infix"), [("", ""), ("base_model.model.", ".default"), ("", ".default")])
def test_names_of_peft(prefix, infix, load, cold_load, weights_a):
    policy, modules = load(NVFP4_TOKEN, weights_a), MODULES["experts"]
    adapter = make_adapter(weights_a, modules, prefix=prefix, infix=infix)
    policy.update_lora(iter(adapter.items()), ALPHA, RANK, "1")
    assert policy.digest() == cold_load(NVFP4_TOKEN, merge(weights_a, adapter)).digest()


def test_a_joined_projection_has_one_pair(load, cold_load, weights_a):
    policy = load(NVFP4_TOKEN, weights_a)
    shards = ["q_proj", "k_proj", "v_proj"]
    joined = {"qkv_proj.weight": torch.cat([weights_a[f"{shard}.weight"] for shard in shards])}
    adapter = make_adapter(joined, ["qkv_proj"], prefix="")
    policy.update_lora(adapter, ALPHA, RANK)
    parts = dict(zip(shards, merge(joined, adapter)["qkv_proj.weight"].split([96, 32, 32]), strict=True))
    expected = {**weights_a, **{f"{shard}.weight": part for shard, part in parts.items()}}
    assert policy.digest() == cold_load(NVFP4_TOKEN, expected).digest()
    with pytest.raises(CoverageError, match="duplicate"):
        policy.update_lora({**adapter, **make_adapter(weights_a, ["k_proj"])}, ALPHA, RANK)


def test_factors_are_copied_and_may_be_bf16(load, cold_load, snapshot, weights_a):
    policy = load(NVFP4_TOKEN, weights_a)
    adapter = {name: t.bfloat16() for name, t in make_adapter(weights_a, ["odd_proj"]).items()}
    expected = merge(weights_a, adapter)
    policy.update_lora(adapter, ALPHA, RANK)
    for tensor in adapter.values():
        tensor.fill_(float("nan"))
    policy.sleep()
    policy.wake()  # merges again, from its own factors
    assert snapshot(policy) == snapshot(cold_load(NVFP4_TOKEN, expected))


def dying(adapter):
    yield from list(adapter.items())[:1]
    raise OSError("gone")


A, B = "base_model.model.q_proj.lora_A.weight", "base_model.model.q_proj.lora_B.weight"
NAN = torch.full((96, RANK), float("nan"))
FAULTS = {
    "unpaired": (lambda good: {A: good[A]}, CoverageError, r"1 missing: .*q_proj\.lora_B\.weight"),
    "unpaired_b": (lambda good: {B: good[B]}, CoverageError, r"1 missing: .*q_proj\.lora_A\.weight"),
    "unknown": (lambda good: {**good, "ghost.lora_A.weight": good[A]}, CoverageError, "1 unexpected: ghost"),
    "no_lora": (lambda good: {**good, "q_proj.weight": good[A]}, CoverageError, r"1 unexpected: q_proj\.weight"),
    "vector": (lambda good: {**good, "norm.lora_A.weight": good[A]}, CoverageError, "1 unexpected: norm"),
    "doubled": (lambda good: [*good.items(), (A, good[A])], CoverageError, "1 duplicate: .*q_proj.lora_A"),
    "two_adapters": (
        lambda good: {**good, A.replace(".weight", ".other.weight"): good[A]},
        CoverageError,
        "1 duplicate: .*lora_A.other",
    ),
    "shape": (lambda good: {**good, B: good[B][:-1]}, ShapeError, r"lora_B.*expected shape \[96, 4\].*\[95, 4\]"),
    "rank": (lambda good: {**good, A: good[A][:2]}, ShapeError, r"lora_A.*expected shape \[4, 64\] at rank 4"),
    "dtype": (lambda good: {**good, A: good[A].long()}, ShapeError, "int64"),
    "nan": (lambda good: {**good, B: NAN}, NonFiniteError, "lora_B.weight holds NaN"),
    "overflow": (
        lambda good: {name: factor * 3e20 for name, factor in good.items()},
        NonFiniteError,
        r"q_proj\.weight holds NaN or infinity",
    ),
    "dora": (lambda good: {**good, A.replace("lora_A", "lora_magnitude_vector"): NAN}, UnsupportedError, "DoRA"),
    "embedding": (lambda good: {**good, "x.lora_embedding_A": NAN}, UnsupportedError, "embeddings"),
    "bias": (lambda good: {**good, "q_proj.lora_B.bias": NAN}, UnsupportedError, "biases"),
    "empty": (lambda good: {}, ModelError, "remove_lora"),
    "dies": (dying, TransportError, r"last tensor received: .*lora_A"),
    "no_pair": (lambda good: ["q_proj"], ShapeError, "pairs"),
}


@pytest.mark.parametrize(
    ("fault", "mode"), [*((fault, "staged") for fault in FAULTS), ("dies", "streamed"), ("overflow", "streamed")]
)
def test_a_broken_adapter_changes_nothing(fault, mode, load, snapshot, weights_a):
    broken, error, message = FAULTS[fault]
    policy = load(NVFP4_TOKEN, weights_a, mode)
    base = snapshot(policy)
    good = make_adapter(weights_a, ["q_proj"])
    policy.update_lora(make_adapter(weights_a, ["odd_proj"]), ALPHA, RANK, "1")
    before = snapshot(policy), policy.version, policy.digest(), policy.master_bytes
    with pytest.raises(error, match=message):
        policy.update_lora(broken(good), ALPHA, RANK, "2")
    if (fault, mode) == ("overflow", "streamed"):  # seen after the first write
        with pytest.raises(PoisonedError):
            policy.check_servable()
        return
    assert (snapshot(policy), policy.version, policy.digest(), policy.master_bytes) == before
    policy.check_servable()
    policy.remove_lora()
    assert snapshot(policy) == base


@pytest.mark.parametrize(
    ("alpha", "rank"), [(None, 4), (1.0, None), (1.0, 0), (1.0, 4.0), (math.nan, 4), ("1", 4), (1.0, True)], ids=repr
)
def test_alpha_and_rank_are_numbers(alpha, rank, load, weights_a):
    policy = load(NVFP4_TOKEN, weights_a)
    with pytest.raises(ConfigError, match=r"give (alpha|rank)"):
        policy.update_lora(make_adapter(weights_a, ["q_proj"]), alpha, rank)
    assert policy.version == "cold"


def test_versions_of_adapters(load, weights_a):
    policy = load(NVFP4_TOKEN, weights_a)
    adapter = make_adapter(weights_a, ["q_proj"])
    policy.update_lora(adapter, ALPHA, RANK, "7")
    assert policy.update_lora(adapter, ALPHA, RANK, "7").status == "unchanged"
    with pytest.raises(StaleVersionError):
        policy.update_lora(adapter, ALPHA / 2, RANK, "7")
    with pytest.raises(StaleVersionError):
        policy.remove_lora("7")
    assert policy.remove_lora().version == "8"


def test_a_tied_weight_is_not_adapted(load, weights_a):
    policy = load(make_scheme("bf16"), weights_a)
    policy.plan.tied["head.weight"] = "odd_proj.weight"
    adapter = make_adapter({"head.weight": weights_a["odd_proj.weight"]}, ["head"])
    with pytest.raises(UnsupportedError, match="tied"):
        policy.update_lora(adapter, ALPHA, RANK)


# the master


def test_without_a_master(cold_load, weights_a):
    policy = cold_load(NVFP4_TOKEN, weights_a)
    adapter = make_adapter(weights_a, ["q_proj"])
    for call in (lambda: policy.update_lora(adapter, 1.0, 4), policy.remove_lora, policy.quantization_error):
        with pytest.raises(ConfigError, match=r"EngineConfig\(master='host'\)"):
            call()
    assert policy.master_bytes == 0


def test_the_master_holds_two_bytes_a_parameter(load, weights_a, weights_b):
    policy = load(NVFP4_TOKEN, weights_a)
    assert policy.master_bytes == sum(w.nbytes for w in weights_a.values())
    policy.update(weights_b, "1")
    assert policy.master_bytes == sum(w.nbytes for w in weights_b.values())


@pytest.mark.parametrize("form", ["split", "joined"])
def test_an_adapter_goes_onto_the_last_base(form, load, cold_load, joined, weights_a, weights_b):
    policy = load(NVFP4_TOKEN, weights_a)
    policy.update(joined(weights_b) if form == "joined" else weights_b, "1")
    adapter = make_adapter(weights_b, ["v_proj", *MODULES["experts"]])
    policy.update_lora(adapter, ALPHA, RANK)
    assert policy.digest() == cold_load(NVFP4_TOKEN, merge(weights_b, adapter)).digest()


def test_a_failed_swap_leaves_the_master(load, cold_load, weights_a, weights_b):
    policy = load(NVFP4_TOKEN, weights_a)
    with pytest.raises(CoverageError):
        policy.update({**weights_b, "ghost": torch.ones(1)}, "1")
    with pytest.raises(ShapeError), policy.begin("1") as session:
        session.load({"odd_proj.weight": weights_b["odd_proj.weight"], "norm.weight": torch.ones(3)})
    adapter = make_adapter(weights_a, MODULES["dense"])
    policy.update_lora(adapter, ALPHA, RANK)
    assert policy.digest() == cold_load(NVFP4_TOKEN, merge(weights_a, adapter)).digest()


def test_base_weights_drop_the_adapter_of_their_layers(load, cold_load, snapshot, weights_a, weights_b):
    policy = load(NVFP4_TOKEN, weights_a)
    adapter = make_adapter(weights_a, ["q_proj", "odd_proj"])
    policy.update_lora(adapter, ALPHA, RANK, "1")
    report = policy.update({"odd_proj.weight": weights_b["odd_proj.weight"]}, "2")
    assert report.warnings == ("base weights took the place of adapted ones, without the adapter: odd_proj",)
    base = {**weights_a, "odd_proj.weight": weights_b["odd_proj.weight"]}
    q_only = {name: t for name, t in adapter.items() if "q_proj" in name}
    assert snapshot(policy) == snapshot(cold_load(NVFP4_TOKEN, merge(base, q_only)))
    assert policy.remove_lora("3").layers == 1
    assert snapshot(policy) == snapshot(cold_load(NVFP4_TOKEN, base))
    assert policy.update(weights_b, "4").warnings == ()


def quantized(weights, module):
    weight = weights[f"{module}.weight"]
    stored = NVFP4_TOKEN.quantize(weight, WeightShape((len(weight),), weight.shape[1]))
    return {f"{module}.{name}": value for name, value in stored.items()}


def test_layers_that_came_quantized_have_no_master(load, cold_load, snapshot, weights_a):
    policy = load(NVFP4_TOKEN, weights_a)
    policy.update_lora(make_adapter(weights_a, ["odd_proj"]), ALPHA, RANK, "1")
    policy.update(quantized(weights_a, "odd_proj"), "2")  # takes the adapter off
    assert snapshot(policy) == snapshot(cold_load(NVFP4_TOKEN, weights_a))
    with pytest.raises(ModelError, match="odd_proj came quantized"):
        policy.update_lora(make_adapter(weights_a, ["q_proj", "odd_proj"]), ALPHA, RANK)
    assert policy.version == "2"
    adapter = make_adapter(weights_a, ["q_proj"])
    policy.update_lora(adapter, ALPHA, RANK)  # the others have
    assert policy.digest() == cold_load(NVFP4_TOKEN, merge(weights_a, adapter)).digest()


def test_a_poisoned_policy_takes_no_adapter(load, cold_load, weights_a, weights_b):
    policy = load(NVFP4_TOKEN, weights_a, "streamed")
    adapter = make_adapter(weights_b, ["q_proj"])
    with pytest.raises(RollmillError):
        policy.update({**weights_b, "ghost": torch.ones(1)}, "1")
    with pytest.raises(PoisonedError):
        policy.update_lora(adapter, ALPHA, RANK)
    policy.update(weights_b, "2")
    policy.update_lora(adapter, ALPHA, RANK)
    assert policy.digest() == cold_load(NVFP4_TOKEN, merge(weights_b, adapter)).digest()


# quantization error


def decoded(slot):
    """The served values of a slot of the reference kernel, by hand."""
    codes = slot.tensors["weight"]
    if slot.scheme.name == "fp8":
        scale = slot.tensors["weight_scale"]
        repeats = torch.tensor(slot.shape.rows)
        return codes.double() * scale.double().repeat_interleave(repeats, dim=-1)[..., None]
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
    codes = values[torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()]
    rows = slot.tensors["weight_scale_2"].double().repeat_interleave(torch.tensor(slot.shape.rows), dim=-1)
    return codes * slot.tensors["weight_scale"].double().repeat_interleave(16, dim=-1) * rows[..., None]


@pytest.mark.parametrize("scheme", [make_scheme("fp8"), NVFP4()], ids=lambda s: s.name)
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
def test_quantization_error_against_the_last_bf16_input(scheme, adapted, cold_load, joined, weights_a):
    policy = cold_load(scheme, weights_a, kernel="reference", master="host")
    weights = weights_a
    if adapted:
        adapter = make_adapter(weights_a, ["k_proj", "experts.1.up_proj"])
        policy.update_lora(adapter, ALPHA, RANK)
        weights = merge(weights_a, adapter)
    fused = joined(weights)
    fused |= {"experts.w13.weight": fused["experts.gate_up_proj"], "experts.w2.weight": fused["experts.down_proj"]}
    fused["odd_proj.weight"] = weights["odd_proj.weight"]
    slots = {slot.name: slot for slot in policy.plan.slots if "weight_scale" in slot.tensors}
    errors = policy.quantization_error()
    assert errors.keys() == slots.keys() == {"qkv_proj", "gate_up_proj", "odd_proj", "experts.w13", "experts.w2"}
    for name, slot in slots.items():
        sent = fused[f"{name}.weight"].double()
        expected = float((decoded(slot) - sent).norm() / sent.norm())
        assert errors[name] == pytest.approx(expected, rel=1e-5)
        assert 0.01 < errors[name] < (0.05 if scheme.name == "fp8" else 0.15)


def test_quantization_error_where_there_is_none_to_tell(load, weights_a):
    assert load(make_scheme("bf16"), weights_a).quantization_error() == {}
    policy = load(NVFP4_TOKEN, weights_a)
    policy.update({"odd_proj.weight": torch.zeros(1000, 1040)}, "1")
    assert policy.quantization_error()["odd_proj"] == 0.0
    policy.update(quantized(weights_a, "odd_proj"), "2")
    assert "odd_proj" not in policy.quantization_error()


# PEFT's folders


@pytest.fixture
def save_adapter(tmp_path):
    def save(adapter, **config):
        settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none", "use_dora": False}
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | config))
        save_file(adapter, tmp_path / "adapter_model.safetensors")
        return tmp_path

    return save


@pytest.mark.parametrize("rslora", [False, True])
def test_a_folder_of_peft(rslora, save_adapter, load, cold_load, weights_a):
    policy = load(NVFP4_TOKEN, weights_a)
    adapter = make_adapter(weights_a, ["q_proj", *MODULES["experts"]])
    policy.update_lora(save_adapter(adapter, use_rslora=rslora), version="1")
    scale = ALPHA / (math.sqrt(RANK) if rslora else RANK)
    assert policy.digest() == cold_load(NVFP4_TOKEN, merge(weights_a, adapter, scale)).digest()
    policy.update_lora(str(save_adapter(adapter)), alpha=6.0, version="2")  # arguments come first
    assert policy.digest() == cold_load(NVFP4_TOKEN, merge(weights_a, adapter, 6.0 / RANK)).digest()


@pytest.mark.parametrize(
    "setting",
    [
        {"use_dora": True},
        {"peft_type": "IA3"},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"rank_pattern": {"q_proj": 2}},
        {"fan_in_fan_out": True},
        {"init_lora_weights": "pissa"},
    ],
    ids=lambda s: next(iter(s)),
)
def test_more_than_plain_lora_is_refused(setting, save_adapter, load, weights_a):
    policy = load(NVFP4_TOKEN, weights_a)
    folder = save_adapter(make_adapter(weights_a, ["q_proj"]), **setting)
    with pytest.raises(UnsupportedError, match=next(iter(setting))) as error:
        policy.update_lora(folder, version="1")
    assert len(error.value.reasons) == 1
    assert policy.version == "cold"


def test_broken_folders(save_adapter, tmp_path, load, weights_a):
    policy = load(NVFP4_TOKEN, weights_a)
    with pytest.raises(ModelError, match=r"adapter_config\.json and adapter_model\.safetensors not found"):
        policy.update_lora(tmp_path / "nowhere")
    folder = save_adapter(make_adapter(weights_a, ["q_proj"]))
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="no valid JSON"):
        policy.update_lora(folder)
    save_adapter(make_adapter(weights_a, ["q_proj"]), r=None)
    with pytest.raises(ConfigError, match="rank"):
        policy.update_lora(folder)
    assert policy.version == "cold"
