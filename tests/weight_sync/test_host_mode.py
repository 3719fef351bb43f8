"""`swap="host"`: written in place while generation is paused, put back from a mirror on the host when it fails."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import contextmanager
from textwrap import dedent

import pytest
import torch

from rollmill.quant import NVFP4
from rollmill.weight_sync import CoverageError, PoisonedError, StagingMemoryError, TransportError, mirror
from rollmill.weight_sync.mirror import Mirror

NVFP4_TOKEN = NVFP4()


def dying(weights, after):
    for count, pair in enumerate(weights.items()):
        if count == after:
            raise ConnectionResetError("the trainer is gone")
        yield pair


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


@pytest.mark.parametrize("end", ["commit", "abort", "fail"])
def test_generation_is_paused_from_the_first_write_to_the_end(
    end, cold_load, gate, events, snapshot, weights_a, weights_b
):
    policy = cold_load(NVFP4_TOKEN, weights_a, "host")
    before, digest = snapshot(policy), policy.digest()
    policy.commit_gate = gate
    policy.on_flip.append(lambda: events.append(f"flip {policy.version}"))
    pairs, session = list(weights_b.items()), policy.begin("1")
    assert events == []
    session.load(pairs[:5])
    assert events == ["in"]
    with pytest.raises(PoisonedError, match="a host swap to version '1' has not finished"):
        policy.check_servable()
    if end == "commit":
        session.load(pairs[5:])
        session.commit()
        assert events == ["in", "flip 1", "out"]
        assert snapshot(policy) == snapshot(cold_load(NVFP4_TOKEN, weights_b))
        return
    if end == "abort":
        session.abort()
    else:
        with pytest.raises(CoverageError):
            session.commit()
    assert events == ["in", "out"]
    policy.check_servable()
    assert (snapshot(policy), policy.digest(), policy.version) == (before, digest, "cold")


def test_a_failed_swap_did_write(cold_load, gate, snapshot, weights_a, weights_b, monkeypatch):
    """Else the tests of what is put back would show nothing."""
    policy, seen = cold_load(NVFP4_TOKEN, weights_a, "host"), []
    before, restore = snapshot(policy), Mirror.restore
    monkeypatch.setattr(Mirror, "restore", lambda self, slots: (seen.append(snapshot(policy)), restore(self, slots)))
    with pytest.raises(TransportError):
        policy.update(dying(weights_b, 12), "1")
    assert seen[0] != before
    assert snapshot(policy) == before


def test_an_interrupted_commit_is_undone(cold_load, snapshot, weights_a, weights_b, monkeypatch):
    policy = cold_load(NVFP4_TOKEN, weights_a, "host", master="host")
    before, last = snapshot(policy), policy.plan.slots[-1]
    commit = type(last).commit

    def interrupted(slot, *staged):
        commit(slot, *staged)
        if slot is last:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(last), "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            policy.update(weights_b, "1")
    policy.check_servable()
    assert (snapshot(policy), policy.version) == (before, "cold")
    assert policy.digest() == cold_load(NVFP4_TOKEN, weights_a).digest()
    assert torch.equal(policy.master.weights[policy.plan.slots[0]][0], weights_a["norm.weight"])
    policy.update(weights_b, "1")
    assert snapshot(policy) == snapshot(cold_load(NVFP4_TOKEN, weights_b))


def test_an_interrupt_while_bytes_are_put_back_poisons(cold_load, gate, events, weights_a, weights_b, monkeypatch):
    policy = cold_load(NVFP4_TOKEN, weights_a, "host")
    policy.commit_gate = gate

    def interrupted(self, slots):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Mirror, "restore", interrupted)
        with pytest.raises(KeyboardInterrupt):
            policy.update(dying(weights_b, 12), "1")
    assert events == ["in", "out"]
    assert (policy.version, policy.open_version) == (None, None)
    with pytest.raises(PoisonedError, match="half-way"):
        policy.check_servable()
    policy.update(weights_b, "1")
    with pytest.raises(TransportError):  # the mirror is whole again
        policy.update(dying(weights_a, 12), "2")
    policy.check_servable()
    assert policy.digest() == cold_load(NVFP4_TOKEN, weights_b).digest()


def test_a_swap_waits_for_the_mirror(cold_load, gate, events, snapshot, weights_a, weights_b, monkeypatch):
    policy, go_on, copying = cold_load(NVFP4_TOKEN, weights_a, "host"), threading.Event(), threading.Event()
    policy.mirror.complete()
    copy = Mirror._copy

    def slow(self, slot, *, back):
        copying.set()
        assert go_on.wait(30)
        copy(self, slot, back=back)

    monkeypatch.setattr(Mirror, "_copy", slow)
    policy.update(weights_b, "1")  # returns, and generation goes on, while the mirror is still being made
    assert copying.wait(30)
    policy.check_servable()
    served = snapshot(policy)
    policy.commit_gate = gate
    failed = []

    def swap():
        with pytest.raises(TransportError):
            policy.update(dying(weights_a, 12), "2")
        failed.append(True)

    trainer = threading.Thread(target=swap)
    trainer.start()
    trainer.join(0.2)
    assert (trainer.is_alive(), events) == (True, [])
    policy.check_servable()
    go_on.set()
    trainer.join(30)
    assert (failed, events) == ([True], ["in", "out"])
    assert (snapshot(policy), policy.version) == (served, "1")


@pytest.mark.parametrize("size", [70_001, 1 << 20])
def test_tensors_lie_across_slabs(size, scheme, cold_load, snapshot, weights_a, weights_b, monkeypatch):
    monkeypatch.setattr(mirror, "SLAB", size)
    policy = cold_load(scheme, weights_a, "host")
    policy.update(weights_b, "1")
    before = snapshot(policy)
    with pytest.raises(TransportError):
        policy.update(dying(weights_a, 15), "2")
    assert snapshot(policy) == before
    held = sum(t.nbytes for slot in policy.plan.slots for t in (*slot.tensors.values(), *slot.scales.values()))
    assert policy.mirror_bytes == held


def test_a_step_waits_for_one_piece_of_the_mirror_at_the_most(cold_load, snapshot, weights_a, weights_b, monkeypatch):
    """A GPU's copies to its host come one after the other: a step's tokens among those that are not yet asked for."""
    monkeypatch.setattr(mirror, "PIECE", 10_000)
    policy = cold_load(NVFP4_TOKEN, weights_a, "host")
    policy.mirror.complete()
    before, pieces = snapshot(policy), [0]
    parts, wait = Mirror._parts, Mirror._wait

    def counted(self, raw, start):
        for part, place in parts(self, raw, start):
            pieces[-1] += len(part)
            yield part, place

    def waited(self):
        wait(self)
        pieces.append(0)

    slots = policy.plan.slots[::-1][::2]  # in the order and as few as weights come
    with monkeypatch.context() as patched:
        patched.setattr(Mirror, "_parts", counted)
        patched.setattr(Mirror, "_wait", waited)
        policy.mirror.renew(slots)
        policy.mirror.complete()
    assert sum(pieces) == sum(t.nbytes for slot in slots for t in (*slot.tensors.values(), *slot.scales.values()))
    assert max(pieces) == 10_000
    with pytest.raises(TransportError):
        policy.update(dying(weights_b, 15), "2")
    assert snapshot(policy) == before


def test_a_host_without_room_says_what_would_fit(cold_load, snapshot, weights_a, weights_b, monkeypatch):
    policy = cold_load(NVFP4_TOKEN, weights_a, "host")
    policy.mirror.complete()
    policy.mirror = Mirror(policy.plan.slots)
    before = snapshot(policy)

    def empty(*shape, original=torch.empty, **options):
        if "pin_memory" in options:
            raise RuntimeError("CUDA error: out of memory")
        return original(*shape, **options)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", empty)
        policy.mirror.renew(policy.plan.slots)  # in its thread: nobody to tell yet
        with pytest.raises(StagingMemoryError, match=r"host memory, which ran out at 0\.00 GiB.*swap='staged' or"):
            policy.update(weights_b, "1")
    assert (snapshot(policy), policy.version) == (before, "cold")
    policy.check_servable()
    policy.update(weights_b, "1")
    assert policy.version == "1"


SENDER = """
    import sys, torch
    out = sys.stdout.buffer
    for name, *shape in (line.split() for line in open(sys.argv[1])):
        value = torch.full([int(size) for size in shape], 0.5, dtype=torch.bfloat16)
        out.write(value.view(torch.uint8).numpy().tobytes())
    out.flush()
    sys.stdin.read()
"""


@pytest.mark.parametrize("mode", ["staged", "host"])
def test_a_sender_that_is_killed(mode, cold_load, snapshot, weights_a, weights_b, tmp_path):
    """A process that writes tensors to a pipe, killed while the engine reads the third quarter of them."""
    policy, names = cold_load(NVFP4_TOKEN, weights_a, mode), list(weights_b)
    before = snapshot(policy)
    listed = tmp_path / "shapes"
    sent = names[: len(names) * 3 // 4]
    listed.write_text("".join(f"{name} {' '.join(map(str, weights_b[name].shape))}\n" for name in sent))
    command = [sys.executable, "-c", dedent(SENDER), str(listed)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as sender:

        def received():
            for index, name in enumerate(names):
                if index == len(names) // 2:
                    sender.kill()
                raw = sender.stdout.read(weights_b[name].nbytes)
                if len(raw) < weights_b[name].nbytes:
                    raise EOFError(f"the sender ended with {sender.wait()}")
                yield name, torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).view(weights_b[name].shape)

        with pytest.raises(TransportError, match="the sender ended with -9"):
            policy.update(received(), "1")
    policy.check_servable()
    assert (snapshot(policy), policy.version) == (before, "cold")
