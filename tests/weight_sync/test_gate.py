"""The commit gate: a session driven from any thread changes served bytes between two decoding steps only."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest
import torch

from rollmill.quant import BF16, NVFP4, find_capability, plain_slot
from rollmill.weight_sync import CoverageError, PoisonedError, Policy, SessionClosedError, SyncPlan

NVFP4_TOKEN = NVFP4()


@pytest.fixture
def events():
    return []


@pytest.fixture
def gate(events):
    @contextmanager
    def enter():
        events.append("in")
        try:
            yield
        finally:
            events.append("out")

    return enter


def test_a_staged_commit_waits_for_the_gate(cold_load, snapshot, weights_a, weights_b):
    policy, lock = cold_load(NVFP4_TOKEN, weights_a), threading.Lock()
    policy.commit_gate = lambda: lock
    before = snapshot(policy)
    session = policy.begin("1")
    session.load(weights_b)  # staging needs no gate
    trainer = threading.Thread(target=session.commit)
    with lock:  # a decoding step
        trainer.start()
        trainer.join(timeout=0.3)
        assert trainer.is_alive()
        policy.check_servable()
        assert (snapshot(policy), policy.version) == (before, "cold")
    trainer.join(timeout=10)
    assert session.report.version == policy.version == "1"
    assert session.report.seconds["pause"] < 0.3  # waiting is no pause
    assert snapshot(policy) == snapshot(cold_load(NVFP4_TOKEN, weights_b))
    assert not lock.locked()


def test_a_loop_that_decodes_never_sees_two_versions():
    cpu, lock, seen, done = find_capability("cpu"), threading.Lock(), set(), threading.Event()
    slots = [plain_slot([name], [4096], None, BF16, cpu, torch.bfloat16) for name in "abcdefgh"]
    weights = [{f"{name}.weight": torch.full((4096,), float(step)) for name in "abcdefgh"} for step in range(40)]
    policy = Policy(SyncPlan(slots))
    policy.update(weights[0], "0")
    policy.commit_gate = lambda: lock

    def train():
        for step, tensors in enumerate(weights[1:], 1):
            policy.update(tensors, str(step))
        done.set()

    trainer = threading.Thread(target=train)
    trainer.start()
    while not done.is_set():
        with lock:
            policy.check_servable()
            values = {slot.tensors["weight"][i].item() for slot in slots for i in (0, -1)} | {float(policy.version)}
        assert len(values) == 1
        seen |= values
    trainer.join()
    assert len(seen) > 1
    assert policy.version == "39"


@pytest.mark.parametrize("end", ["commit", "abort", "fail"])
def test_a_streamed_session_holds_the_gate_from_its_first_write(end, cold_load, gate, events, weights_a, weights_b):
    policy = cold_load(NVFP4_TOKEN, weights_a, "streamed")
    policy.commit_gate = gate
    policy.on_flip.append(lambda: events.append(f"flip {policy.version}"))
    session = policy.begin("1")
    assert events == []
    session.load(list(weights_b.items())[:2])
    assert events == ["in"]
    if end == "commit":
        session.load(list(weights_b.items())[2:])
        session.commit()
        assert events == ["in", "flip 1", "out"]
        return
    if end == "abort":
        session.abort()
    else:
        with pytest.raises(CoverageError):
            session.commit()
    assert events == ["in", "out"]
    with pytest.raises(PoisonedError):
        policy.check_servable()


def test_flips_are_told_inside_the_gate_with_the_new_bytes_in_place(cold_load, gate, events, weights_a, weights_b):
    policy = cold_load(NVFP4_TOKEN, weights_a, master="host")
    norm = policy.plan.slots[0].tensors["weight"]
    policy.commit_gate = gate
    policy.on_flip.append(lambda: events.append((policy.version, torch.equal(norm, weights_b["norm.weight"]))))
    policy.update(weights_b, "1")
    assert events == ["in", ("1", True), "out"]
    events.clear()
    assert policy.update(weights_b, "1").status == "unchanged"
    with pytest.raises(CoverageError):
        policy.update({"q_proj.weight": weights_a["q_proj.weight"]}, "2")
    policy.digest_of(weights_a)
    assert events == []
    factors = {"q_proj.lora_A.weight": torch.ones(1, 64), "q_proj.lora_B.weight": torch.ones(96, 1)}
    policy.update_lora(factors, 1.0, 1, "2")
    assert events == ["in", ("2", True), "out"]


@pytest.mark.parametrize("mode", ["staged", "host", "streamed"])
def test_a_listener_that_fails_poisons(mode, cold_load, gate, events, snapshot, weights_a, weights_b):
    """It might be a prefix cache that could not be dropped."""
    policy = cold_load(NVFP4_TOKEN, weights_a, mode)

    def fail():
        raise RuntimeError("the cache is stuck")

    policy.commit_gate = gate
    policy.on_flip.append(fail)
    with pytest.raises(RuntimeError, match="stuck"):
        policy.update(weights_b, "1")
    assert events == ["in", "out"]
    assert policy.version is None
    with pytest.raises(PoisonedError):
        policy.check_servable()
    policy.on_flip.clear()
    policy.update(weights_b, "1")
    assert snapshot(policy) == snapshot(cold_load(NVFP4_TOKEN, weights_b))


@pytest.mark.parametrize("mode", ["staged", "host", "streamed"])
def test_a_gate_that_does_not_open_changes_nothing(mode, cold_load, snapshot, weights_a, weights_b):
    policy = cold_load(NVFP4_TOKEN, weights_a, mode)
    before = snapshot(policy)

    def shut():
        raise TimeoutError("the loop hangs")

    policy.commit_gate = shut
    with pytest.raises(TimeoutError):
        policy.update(weights_b, "1")
    assert (snapshot(policy), policy.version, policy.open_version) == (before, "cold", None)
    policy.check_servable()


@pytest.mark.parametrize("mode", ["staged", "host", "streamed"])
def test_closed_while_waiting_for_the_gate(mode, cold_load, events, weights_a, weights_b):
    policy = cold_load(NVFP4_TOKEN, weights_a, mode)

    @contextmanager
    def closing():
        policy.close()
        yield
        events.append("out")

    policy.commit_gate = closing
    with pytest.raises(SessionClosedError, match="closed"):
        policy.update(weights_b, "1")
    assert policy.version == "cold"
