"""Sleep lets the packed weights go; wake and a full BF16 swap bring the same bytes back."""

from __future__ import annotations

import pytest
import torch

from rollmill.quant import (
    BF16,
    NVFP4,
    Plain,
    QuantLinear,
    UnsupportedError,
    find_capability,
    make_scheme,
    plain_slot,
)
from rollmill.weight_sync import (
    AsleepError,
    CoverageError,
    Policy,
    SessionBusyError,
    ShapeError,
    StagingMemoryError,
    SyncPlan,
)

NVFP4_TOKEN = NVFP4()


def tensors_of(policy):
    return [t for slot in policy.plan.slots for t in slot.tensors.values()]


@pytest.mark.parametrize("mode", ["staged", "host", "streamed"])
def test_a_bf16_swap_after_waking_gives_the_same_bytes(scheme, mode, cold_load, snapshot, weights_a, weights_b):
    """Static activation scales are sent once, before the first sleep."""
    policy = cold_load(scheme, weights_a, mode)
    policy.update(weights_b, "1")
    before, digest, tensors = snapshot(policy), policy.digest(), tensors_of(policy)
    policy.sleep()
    assert sum(slot.num_bytes for slot in policy.plan.slots) == 0
    assert policy.wake() is None
    report = policy.update(weights_b, "2")
    assert (report.digest, policy.version) == (digest, "2")
    policy.check_servable()
    assert snapshot(policy) == before
    assert all(ours is theirs for ours, theirs in zip(tensors, tensors_of(policy), strict=True))
    policy.update(weights_a, "4")  # an ordinary swap again, with a copy where the mode says so
    assert snapshot(policy) == snapshot(cold_load(scheme, weights_a))


def test_what_holds_a_tensor_computes_with_it_after_waking(make_policy):
    common = {"capability": find_capability("cpu"), "dtype": torch.bfloat16}
    linear = QuantLinear(["up"], [48], 64, NVFP4("static"), **common)
    policy = Policy(SyncPlan(linear.slots))
    weight, x = torch.randn(48, 64), torch.randn(3, 64).bfloat16()
    policy.update({"up.weight": weight, "up.input_scale": torch.tensor(0.01)}, "1")
    expected = linear(x)
    policy.sleep()
    policy.wake()
    policy.update({"up.weight": weight}, "2")
    assert torch.equal(linear(x), expected)


def test_kv_scales_sleep_through(snapshot):
    cpu = find_capability("cpu")
    scale = plain_slot(["k_proj"], [1], None, Plain(torch.float32, "k_scale"), cpu, torch.bfloat16, kept=True)
    norm = plain_slot(["norm"], [64], None, BF16, cpu, torch.bfloat16)
    policy, weights = Policy(SyncPlan([scale, norm])), {"norm.weight": torch.randn(64)}
    policy.update({**weights, "k_proj.k_scale": torch.tensor(0.75)}, "1")
    before, digest = snapshot(policy), policy.digest()
    policy.sleep()
    assert scale.tensors["k_scale"].item() == 0.75
    assert norm.num_bytes == 0
    policy.wake()
    assert policy.update(weights, "2").digest == digest
    assert snapshot(policy) == before


def test_asleep_nothing_is_served_or_swapped(cold_load, weights_a, weights_b):
    policy = cold_load(NVFP4_TOKEN, weights_a, master="host")
    digest = policy.digest()
    policy.sleep()
    policy.sleep()  # no error: it sleeps
    adapter = {"odd_proj.lora_A.weight": torch.ones(1, 1040), "odd_proj.lora_B.weight": torch.ones(1000, 1)}
    for call in (
        policy.check_servable,
        lambda: policy.begin("1"),
        lambda: policy.update(weights_b, "1"),
        lambda: policy.update_lora(adapter, 1.0, 1, "1"),
        lambda: policy.remove_lora("1"),
    ):
        with pytest.raises(AsleepError, match="asleep; wake"):
            call()
    assert (policy.version, policy.open_version) == (None, None)
    assert policy.digest() == policy.digest_of(weights_a) == digest


@pytest.mark.parametrize("mode", ["staged", "host", "streamed"])
def test_awake_without_weights_wants_a_full_swap(mode, cold_load, snapshot, weights_a, weights_b):
    policy = cold_load(NVFP4_TOKEN, weights_a, mode)
    policy.sleep()
    policy.wake()
    with pytest.raises(AsleepError, match="holds no weights: call update_weights"):
        policy.check_servable()
    for partial in ({}, {"norm.weight": weights_b["norm.weight"]}):
        with pytest.raises(CoverageError, match="missing"):
            policy.update(partial, "1")
    with pytest.raises(ShapeError):
        policy.update({**weights_b, "norm.weight": torch.ones(3)}, "1")
    with pytest.raises(AsleepError):
        policy.check_servable()
    with policy.begin("1") as session:
        session.load(weights_b)
        with pytest.raises(AsleepError):
            policy.check_servable()
    policy.check_servable()
    assert snapshot(policy) == snapshot(cold_load(NVFP4_TOKEN, weights_b))
    assert policy.wake() is None  # no error, nothing to do
    assert policy.version == "1"


def test_versions_count_on_after_sleep(cold_load, weights_a):
    policy = cold_load(NVFP4_TOKEN, weights_a)
    policy.update(weights_a, "3")
    policy.sleep()
    policy.wake()
    assert policy.update(weights_a, None).version == "4"


def test_an_open_session_keeps_the_weights_awake(cold_load, weights_a, weights_b):
    policy = cold_load(NVFP4_TOKEN, weights_a)
    with policy.begin("1") as session:
        with pytest.raises(SessionBusyError, match="'1'"):
            policy.sleep()
        session.load(weights_b)
    policy.check_servable()


def test_sleep_waits_for_the_gate(cold_load, weights_a):
    """A decoding step that is under way ends on whole weights."""
    events = []

    class Gate:
        def __enter__(self):
            events.append(policy.plan.slots[0].num_bytes > 0)

        def __exit__(self, *error):
            events.append(policy.plan.slots[0].num_bytes > 0)

    policy = cold_load(NVFP4_TOKEN, weights_a)
    policy.commit_gate = Gate
    policy.sleep()
    assert events == [True, False]


@pytest.mark.parametrize("mode", ["staged", "host", "streamed"])
@pytest.mark.parametrize("adapted", [False, True], ids=["base", "adapted"])
@pytest.mark.parametrize("scheme", [BF16, make_scheme("fp8", "static"), NVFP4("static")], ids=lambda s: s.name)
def test_a_master_restores_what_went_to_sleep(scheme, mode, adapted, cold_load, snapshot, weights_a, weights_b):
    policy = cold_load(scheme, weights_a, mode, master="host")
    policy.update(weights_b, "5")
    base = snapshot(policy)
    if adapted:
        generator = torch.Generator().manual_seed(0)
        shapes = {"q_proj.lora_A.weight": (2, 64), "q_proj.lora_B.weight": (96, 2)}
        adapter = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        policy.update_lora(adapter, 1.0, 2, "5+lora")
    before, digest, version = snapshot(policy), policy.digest(), policy.version
    policy.sleep()
    report = policy.wake()
    assert (report.version, report.digest, report.coverage, report.warnings) == (version, digest, 1.0, ())
    assert policy.version == version
    policy.check_servable()
    assert snapshot(policy) == before
    policy.remove_lora("off")
    assert snapshot(policy) == base


def test_a_master_with_gaps_restores_nothing(cold_load, weights_a):
    policy = cold_load(NVFP4_TOKEN, weights_a, master="host")
    zeros = {"weight": (520, torch.uint8), "weight_scale": (65, torch.float8_e4m3fn)}
    stored = {f"odd_proj.{name}": torch.zeros(1000, cols, dtype=dtype) for name, (cols, dtype) in zeros.items()}
    policy.update({**stored, "odd_proj.weight_scale_2": torch.tensor(1.0)}, "1")
    policy.sleep()
    assert policy.wake() is None
    with pytest.raises(AsleepError, match="holds no weights"):
        policy.check_servable()
    assert policy.update(weights_a, "2").version == "2"


def test_a_poisoned_policy_wakes_empty(cold_load, snapshot, weights_a, weights_b):
    """The master is of the version before: nothing says that it is what the trainer wants served."""
    policy = cold_load(NVFP4_TOKEN, weights_a, "streamed", master="host")
    with pytest.raises(ShapeError):
        policy.update({**weights_b, "odd_proj.weight": torch.ones(3)}, "1")
    policy.sleep()
    assert policy.wake() is None
    with pytest.raises(AsleepError):
        policy.check_servable()
    policy.update(weights_b, "1")
    assert snapshot(policy) == snapshot(cold_load(NVFP4_TOKEN, weights_b))


def test_memory_that_runs_out_on_waking(cold_load, snapshot, weights_a, monkeypatch):
    policy = cold_load(make_scheme("fp8", "static"), weights_a)
    before, last = snapshot(policy), policy.plan.slots[-1]
    allocate = type(last).allocate

    def short(slot):
        if slot is last:
            raise RuntimeError("can't allocate memory")
        allocate(slot)

    policy.sleep()
    with monkeypatch.context() as patched:
        patched.setattr(type(last), "allocate", short)
        with pytest.raises(StagingMemoryError, match="still asleep"):
            policy.wake()
    assert sum(slot.num_bytes for slot in policy.plan.slots) == 0
    with pytest.raises(AsleepError, match="asleep; wake"):
        policy.check_servable()
    policy.wake()
    policy.update(weights_a, "1")
    assert snapshot(policy) == before


def test_storage_that_others_see_is_not_freed(cold_load, snapshot, weights_a):
    policy = cold_load(NVFP4_TOKEN, weights_a)
    before, slot = snapshot(policy), policy.plan.slots[-1]
    shared = next(iter(slot.tensors.values())).view(torch.uint8).numpy()
    with pytest.raises(UnsupportedError, match=r"experts\.w2: a numpy view"):
        policy.sleep()
    policy.check_servable()
    assert snapshot(policy) == before
    assert shared.size
