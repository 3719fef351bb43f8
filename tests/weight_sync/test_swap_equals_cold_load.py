"""A hot swap to B equals a cold load of B, byte for byte, however the tensors come."""

from __future__ import annotations

import random

import pytest
import torch

from rollmill.quant import NVFP4, WeightShape, make_scheme
from rollmill.quant.numerics import decode_fp8
from rollmill.weight_sync import FlatBucketSource, FlatEntry


def ordered(weights, order):
    names = list(weights)
    if order == "reversed":
        names.reverse()
    elif order == "shuffled":
        random.Random(7).shuffle(names)
    return {name: weights[name] for name in names}


@pytest.mark.parametrize("form", ["split", "joined"])
@pytest.mark.parametrize("size", [1, 3, 1000], ids=["bucket1", "bucket3", "one_bucket"])
@pytest.mark.parametrize("order", ["natural", "reversed", "shuffled"])
def test_any_order_bucket_and_form(
    scheme, order, size, form, cold_load, joined, buckets, snapshot, addresses, weights_a, weights_b
):
    expected = cold_load(scheme, weights_b)
    policy = cold_load(scheme, weights_a)
    before = addresses(policy)
    assert snapshot(policy) != snapshot(expected)
    sent = ordered(joined(weights_b) if form == "joined" else weights_b, order)
    with policy.begin("hot") as session:
        for bucket in buckets(sent, size):
            session.load(bucket)
    assert snapshot(policy) == snapshot(expected)
    assert policy.digest() == expected.digest() == session.report.digest
    assert addresses(policy) == before
    assert policy.version == session.report.version == "hot"


@pytest.mark.parametrize("kernel", ["reference", "torch_fp8"])
def test_every_kernel_swaps_alike(kernel, cold_load, snapshot, weights_a, weights_b):
    scheme = make_scheme("fp8", "static") if kernel == "torch_fp8" else NVFP4("static")
    policy, expected = (cold_load(scheme, w, kernel=kernel) for w in (weights_a, weights_b))
    policy.update(weights_b, "hot")
    assert snapshot(policy) == snapshot(expected)
    assert policy.digest() == cold_load(scheme, weights_b).digest()  # of stored values: no kernel in it


@pytest.mark.parametrize("mode", ["host", "streamed"])
def test_swaps_in_place_give_the_same_bytes(mode, scheme, cold_load, snapshot, addresses, weights_a, weights_b):
    policy = cold_load(scheme, weights_a, mode=mode)
    before = addresses(policy)
    policy.update(weights_b, "hot")
    assert snapshot(policy) == snapshot(cold_load(scheme, weights_b))
    assert addresses(policy) == before
    policy.check_servable()


def test_ten_repeats_change_nothing(scheme, cold_load, snapshot, addresses, weights_a, weights_b):
    policy = cold_load(scheme, weights_a)
    policy.update(weights_b, "first")
    served, places = snapshot(policy), addresses(policy)
    for repeat in range(10):
        policy.update(weights_b, f"repeat {repeat}")
        assert snapshot(policy) == served
    assert addresses(policy) == places


def test_an_empty_session_touches_nothing(scheme, cold_load, snapshot, weights_a):
    policy = cold_load(scheme, weights_a)
    served, digest = snapshot(policy), policy.digest()
    with policy.begin("empty"):
        pass
    assert snapshot(policy) == served
    assert policy.digest() == digest


@pytest.mark.parametrize("touched", ["norm", "q_proj", "odd_proj", "experts"])
def test_a_partial_session_touches_its_layers_only(scheme, touched, cold_load, snapshot, weights_a, weights_b):
    layer = {"q_proj": ("q_proj.weight", "k_proj.weight", "v_proj.weight")}.get(touched, (touched,))
    policy, full = cold_load(scheme, weights_a), cold_load(scheme, weights_b)
    before = snapshot(policy)
    report = policy.update({n: w for n, w in weights_b.items() if n.startswith(layer)}, "partial")
    after, swapped = snapshot(policy), snapshot(full)
    slot_of_layer = {"norm": "norm/", "q_proj": "qkv_proj/weight/", "odd_proj": "odd_proj/", "experts": "experts."}
    for key in before:
        inside = key.startswith(slot_of_layer[touched])
        assert after[key] == (swapped if inside else before)[key], key
    assert 0 < report.coverage < 1


def test_static_scales_outlive_a_bf16_swap_and_yield_to_new_ones(cold_load, snapshot, weights_a, weights_b):
    scheme = NVFP4("static")
    policy = cold_load(scheme, weights_a)
    slot = next(slot for slot in policy.plan.slots if slot.name == "odd_proj")
    old = slot.tensors["input_scale"].clone()
    policy.update(weights_b, "1")
    assert torch.equal(slot.tensors["input_scale"], old)
    policy.update({"odd_proj.weight": weights_b["odd_proj.weight"], "odd_proj.input_scale": torch.tensor(0.25)}, "2")
    assert slot.tensors["input_scale"].item() == slot.scales["input_scale"].item() == 0.25


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["float16", "float32"])
def test_wider_tensors_are_rounded_to_bf16_first(scheme, dtype, cold_load, snapshot, weights_a, weights_b):
    noisy = {n: w.to(dtype) * (1 + 2.0**-10) for n, w in weights_b.items()}
    rounded = {n: w.bfloat16() for n, w in noisy.items()}
    policy = cold_load(scheme, weights_a)
    policy.update(noisy, "wide")
    assert snapshot(policy) == snapshot(cold_load(scheme, rounded))


def stored_form(scheme, weights, modules):
    """What ModelOpt would have exported for these modules, fused as one weight: quantized apart from the engine."""
    shards = [weights[f"{module}.weight"] for module in modules]
    rows = tuple(len(shard) for shard in shards)
    stored = scheme.quantize(torch.cat(shards), WeightShape(rows, shards[0].shape[1]))
    tensors = {}
    for index, (module, start) in enumerate(zip(modules, [sum(rows[:i]) for i in range(len(rows))], strict=True)):
        part = slice(start, start + rows[index])
        for name, value in stored.items():
            per_row = value.ndim == 2 or len(value) == sum(rows) != len(rows)
            tensors[f"{module}.{name}"] = value[part] if per_row else value[index]
    return tensors


@pytest.mark.parametrize("scheme", [NVFP4(), make_scheme("fp8"), make_scheme("fp8_channel")], ids=lambda s: s.name)
def test_quantized_tensors_are_taken_as_they_are(scheme, cold_load, snapshot, weights_a, weights_b):
    policy = cold_load(scheme, weights_a)
    sent = stored_form(scheme, weights_b, ["q_proj", "k_proj", "v_proj"])
    policy.update(dict(reversed(sent.items())), "stored")
    policy.update({n: w for n, w in weights_b.items() if n not in ("q_proj", "k_proj", "v_proj")}, "rest")
    assert snapshot(policy) == snapshot(cold_load(scheme, weights_b))


@pytest.mark.parametrize("scheme", [NVFP4(), make_scheme("fp8"), make_scheme("fp8_channel")], ids=lambda s: s.name)
def test_quantized_tensors_for_a_bf16_layer_are_dequantized(scheme, cold_load, weights_a, weights_b):
    policy = cold_load(make_scheme("bf16"), weights_a)
    sent = stored_form(scheme, weights_b, ["odd_proj"])
    policy.update(sent, "stored")
    if scheme.name == "fp8":
        scale = sent["odd_proj.weight_scale"].reshape(-1, 1)
        expected = decode_fp8(sent["odd_proj.weight"]) * scale
    else:
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
        codes = sent["odd_proj.weight"]
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).long()
        scale = sent["odd_proj.weight_scale"].float() * sent["odd_proj.weight_scale_2"]
        expected = values[codes] * scale.repeat_interleave(16, dim=-1)
    slot = next(slot for slot in policy.plan.slots if slot.name == "odd_proj")
    # one BF16 ulp: amax / 2688 is often a multiple of 1/3, so that exact ties are common
    torch.testing.assert_close(slot.tensors["weight"].bfloat16(), expected.bfloat16(), rtol=2**-7, atol=0)


def test_unequal_global_scales_of_a_foreign_checkpoint_stay_apart(cold_load, weights_a, weights_b):
    scheme = NVFP4()
    policy = cold_load(scheme, weights_a)
    sent = {}
    for module in ("q_proj", "k_proj", "v_proj"):  # quantized one by one: three global scales
        sent |= stored_form(scheme, weights_b, [module])
    scales = {sent[f"{module}.weight_scale_2"].item() for module in ("q_proj", "k_proj", "v_proj")}
    assert len(scales) == 3
    policy.update(sent, "foreign")
    slot = next(s for s in policy.plan.slots if s.name == "qkv_proj" and "weight" in s.matrices)
    expected = torch.cat(
        [sent[f"{m}.weight_scale_2"].expand(len(weights_b[f"{m}.weight"])) for m in ("q_proj", "k_proj", "v_proj")]
    )
    assert torch.equal(slot.tensors["row_scale"], expected)


@pytest.mark.parametrize(
    "modules", [["q_proj", "k_proj", "v_proj"], ["experts.0.gate_proj", "experts.0.up_proj"]], ids=["qkv", "gate_up"]
)
def test_a_shared_scale_costs_little_accuracy_at_twofold_amax(modules, weights_b):
    """T6: shards differ twofold in amax; sharing the global scale costs at most 2 % of the own-scale error."""
    scheme = NVFP4()
    together = torch.cat([weights_b[f"{m}.weight"] for m in modules])
    shape = WeightShape(tuple(len(weights_b[f"{m}.weight"]) for m in modules), together.shape[1])
    fused = scheme.dequantize(scheme.quantize(together, shape), shape)
    for index, module in enumerate(modules):
        weight = weights_b[f"{module}.weight"]
        alone = WeightShape((len(weight),), weight.shape[1])
        own = (scheme.dequantize(scheme.quantize(weight, alone), alone) - weight.float()).norm() / weight.float().norm()
        shared = (fused[shape.shard_slice(index)] - weight.float()).norm() / weight.float().norm()
        assert shared <= own * 1.02


def test_flat_buckets_of_odd_sizes(cold_load, snapshot, weights_a, weights_b):
    """T7: an odd number of bytes before bfloat16 and float32 tensors."""
    scheme = NVFP4()
    sent = stored_form(scheme, weights_b, ["odd_proj"])
    sent = {"odd_proj.weight_scale": sent.pop("odd_proj.weight_scale"), **weights_b, **sent}
    del sent["odd_proj.weight"]
    sent["odd_proj.weight"] = stored_form(scheme, weights_b, ["odd_proj"])["odd_proj.weight"]
    entries, chunks, start = [], [torch.zeros(1, dtype=torch.uint8)], 1
    for name, value in sent.items():
        entries.append(FlatEntry(name, str(value.dtype).removeprefix("torch."), tuple(value.shape), start))
        chunks += [value.contiguous().reshape(-1).view(torch.uint8), torch.zeros(1, dtype=torch.uint8)]
        start += value.nbytes + 1
    policy = cold_load(scheme, weights_a)
    policy.update(FlatBucketSource(torch.cat(chunks), entries), "flat")
    assert snapshot(policy) == snapshot(cold_load(scheme, weights_b))


def test_a_sender_may_reuse_its_buffer(scheme, cold_load, snapshot, weights_a, weights_b):
    """T4: the shards of one weight come in different buckets, and the buffer is overwritten in between."""
    policy = cold_load(scheme, weights_a)
    buffer = torch.empty(max(w.numel() for w in weights_b.values()), dtype=torch.bfloat16)
    with policy.begin("reused") as session:
        for name, weight in weights_b.items():
            view = buffer[: weight.numel()].view(weight.shape)
            view.copy_(weight)
            session.load([(name, view)])
            buffer.fill_(float("nan"))
    assert snapshot(policy) == snapshot(cold_load(scheme, weights_b))
