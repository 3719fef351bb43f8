"""A twin takes whatever its slot takes, in another scheme; a prefix completes names that come without it."""

from __future__ import annotations

import pytest
import torch

from rollmill.quant import BF16, QuantLinear, find_capability, make_scheme
from rollmill.weight_sync import CoverageError, NonFiniteError, Policy, SyncPlan

CPU = find_capability("cpu")


def linear(name, scheme, modules=("q", "k")):
    paths = [f"{name.partition('@')[0]}.{module}" for module in modules]
    made = QuantLinear(paths, [32] * len(paths), 64, scheme, capability=CPU, dtype=torch.float32, kernel="reference")
    made.slot.name = name
    return made.slot


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@pytest.fixture(params=["fp8", "nvfp4", "fp8-static", "nvfp4-static"])
def scheme(request):
    name, _, static = request.param.partition("-")
    return make_scheme(name, "static" if static else "per_token")


@pytest.fixture
def slots(scheme):
    """A slot and its twin in BF16."""
    return linear("a.x", scheme), linear("a.x@bf16", BF16)


@pytest.fixture
def policy(slots):
    slot, twin = slots
    return Policy(SyncPlan([slot, linear("b.x", BF16)], twins={slot: twin}, components=("a", "b")))


@pytest.fixture
def weights(scheme):
    def make(seed, prefix="a."):
        tensors = {f"{prefix}{module}.weight": normal(32, 64, seed=seed + i) for i, module in enumerate("qk")}
        return {"a.x." + name.removeprefix("a."): w for name, w in tensors.items()} if prefix == "a." else tensors

    return make


@pytest.fixture
def full(scheme):
    """Tensors of both components, scales included."""

    def make(seed):
        tensors = {f"{part}.x.{m}.weight": normal(32, 64, seed=seed + i) for i, m in enumerate("qk") for part in "ab"}
        if scheme.activation == "static":
            tensors |= {f"a.x.{module}.input_scale": torch.tensor(0.01) for module in "qk"}
        return tensors

    return make


def served(policy):
    return [t.clone() for slot in policy.plan.slots for t in [*slot.tensors.values(), *slot.scales.values()]]


def equal(left, right):
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(left, right, strict=True))


def test_both_copies_hold_the_same_weight(policy, slots, full, scheme):
    policy.update(full(1), "1")
    slot, twin = slots
    weight = torch.cat([full(1)["a.x.q.weight"], full(1)["a.x.k.weight"]])
    assert torch.equal(twin.tensors["weight"], weight.float())
    expected = scheme.quantize(weight, slot.shape)
    assert torch.equal(slot.tensors["weight"].view(torch.uint8), expected["weight"].view(torch.uint8))
    assert [policy.plan.is_twin(one) for one in policy.plan.slots] == [False, False, True]
    assert policy.plan.copies(slot) == (slot, twin)


@pytest.mark.parametrize("change", ["missing", "double", "non-finite"])
def test_a_failure_changes_neither(change, policy, full):
    policy.update(full(1), "1")
    before, digest, bad = served(policy), policy.digest(), full(2)
    name = "a.x.k.weight"
    if change == "missing":
        del bad[name]
    if change == "non-finite":
        bad[name] = torch.full_like(bad[name], torch.inf)
    pairs = [*bad.items(), *([(name, bad[name])] if change == "double" else [])]
    with pytest.raises((CoverageError, NonFiniteError)) as error:
        policy.update(pairs, "2")
    if isinstance(error.value, CoverageError):
        assert (error.value.missing or error.value.duplicate) == (name,), "a twin's lack is its slot's, said once"
    assert equal(served(policy), before)
    assert (policy.digest(), policy.version) == (digest, "1")


def test_a_quantized_form_reaches_the_twin_decoded(policy, slots, full, scheme):
    policy.update(full(1), "1")
    slot, twin = slots
    stored = scheme.quantize(torch.cat([full(2)[f"a.x.{module}.weight"] for module in "qk"]), slot.shape)
    tensors = {}
    for shard, module in enumerate("qk"):
        rows = slot.shape.shard_slice(shard)
        tensors |= {f"a.x.{module}.{k}": v[rows] if k in slot.matrices else v[shard] for k, v in stored.items()}
    policy.update(tensors, "2")
    assert torch.equal(twin.tensors["weight"], scheme.dequantize(stored, slot.shape).bfloat16().float())


def test_the_digest_is_over_both(policy, slots, full):
    said = policy.update(full(1), "1").digest
    assert policy.digest_of(full(1)) == said
    twin = slots[1]
    twin.digests["weight"] ^= 1
    assert policy.digest() != said


def test_names_with_and_without_the_prefix(policy, full):
    policy.update(full(1), "1")
    bare = {name.removeprefix("a."): w for name, w in full(2).items() if name.startswith("a.")}
    named = {f"a.{name}": w for name, w in bare.items()}
    mixed = dict([next(iter(bare.items())), *list(named.items())[1:]])
    digests = {policy.digest_of(source, "a.") for source in (bare, named, mixed)}
    assert digests == {policy.update(bare, "2", "a.").digest}
    assert policy.digest_of(named) in digests, "whole names need no prefix"


def test_a_prefix_does_not_reach_the_other_component(policy, full):
    policy.update(full(1), "1")
    with pytest.raises(CoverageError) as error:
        policy.update({"b.x.q.weight": normal(32, 64), "b.x.k.weight": normal(32, 64)}, "2", "a.")
    assert error.value.unexpected == ("a.b.x.q.weight", "a.b.x.k.weight")
    assert "module=" not in str(error.value)


def test_unknown_names_without_a_prefix_are_explained(policy, full):
    policy.update(full(1), "1")
    with pytest.raises(CoverageError, match=r"2 modules: begin every name with 'a\.' or 'b\.', or say module="):
        policy.update({"x.q.weight": normal(32, 64)}, "2")


def test_one_component_needs_no_explanation(scheme):
    plan = SyncPlan([linear("a.x", scheme)], components=("a",))
    assert plan.hint("") == ""


def test_the_master_holds_no_twin(slots, full, scheme):
    slot, twin = slots
    policy = Policy(SyncPlan([slot, linear("b.x", BF16)], twins={slot: twin}), master="host")
    policy.update(full(1), "1")
    assert policy.master_bytes == 4 * 32 * 64 * 2
    before = served(policy)
    policy.sleep()
    policy.wake()
    assert equal(served(policy), before)
    factors = {"a.x.q.lora_A.weight": normal(4, 64).float(), "a.x.q.lora_B.weight": normal(32, 4).float()}
    policy.update_lora(factors, 4.0, 4, "2", "a.")
    delta = factors["a.x.q.lora_B.weight"] @ factors["a.x.q.lora_A.weight"]
    merged = (full(1)["a.x.q.weight"].float() + delta).bfloat16().float()
    assert torch.equal(twin.tensors["weight"][:32], merged)
    policy.remove_lora("3")
    assert equal(served(policy), before)
