"""Too little memory for a second copy is told before the first swap."""

from __future__ import annotations

import pytest
import torch

from rollmill.weight_sync import memory, staging_shortage


class OnGPU(torch.Tensor):
    """Says that it lies on a GPU."""

    is_cuda = True


class Slot:
    def __init__(self, num_bytes):
        self.tensors = {"weight": torch.empty(num_bytes, dtype=torch.uint8).as_subclass(OnGPU)}


@pytest.fixture
def free(monkeypatch):
    return lambda count: monkeypatch.setattr(memory, "free_bytes", lambda device: count)


def test_only_what_does_not_fit_is_told(free):
    slots, backlog = [Slot(1 << 20), Slot(1 << 20)], memory.STAGED_BACKLOG
    free((2 << 20) + backlog)
    assert staging_shortage(slots, "staged") is None
    free((2 << 20) + backlog - 1)
    told = staging_shortage(slots, "staged")
    assert told is not None
    assert "swap='host' or 'streamed' would fit" in told
    assert "needs 1.5 GiB beside what is held now, 1.5 GiB are free" in told
    assert staging_shortage(slots, "host") is staging_shortage(slots, "streamed") is None
    assert staging_shortage([], "staged") is None


def test_a_cpu_is_not_asked(make_policy, scheme):
    assert staging_shortage(make_policy(scheme).plan.slots, "staged") is None
