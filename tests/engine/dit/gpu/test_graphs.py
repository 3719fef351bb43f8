"""When forwards are captured, from which pool and in which stream: on a CPU, with stand-ins for torch's CUDA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.engine.dit.gpu import forward as found  # noqa: E402 (after the check above)
from rollmill.quant import BF16, Capability, WeightSlot  # noqa: E402
from rollmill.quant.linear import plain_slot  # noqa: E402

CPU = Capability(torch.device("cpu"), None, ())


class Stream:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_stream(self, other: Any) -> None:
        """There is nothing to wait for."""


class Graph:
    def replay(self) -> None:
        """What was captured was computed, too: inputs are the same in every call here."""


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, object]]:
    """(pool, stream) of every capture so far."""
    made: list[tuple[object, object]] = []

    @contextmanager
    def capture(graph: Graph, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        made.append((pool, stream))
        yield

    stand_ins = {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": capture,
        "graph_pool_handle": object,
        "stream": lambda stream: nullcontext(),
        "current_stream": Stream,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return made


class Doubled:
    """In place of a fused forward."""

    def unsupported(self, given: Any) -> None:
        return None

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * 2


@pytest.fixture
def slot() -> WeightSlot:
    return plain_slot(["layer"], [4], 4, BF16, CPU, torch.bfloat16)


@pytest.fixture
def forward(slot: WeightSlot) -> found.FusedForward:
    made = found.FusedForward(torch.nn.Identity(), {}, [slot], graphs=True)
    made._made["quantized"] = Doubled()  # pyright: ignore[reportArgumentType]
    return made


def call(forward: found.FusedForward, tokens: int) -> torch.Tensor:
    velocity = forward("quantized", {"hidden_states": torch.ones(1, tokens, 2)})
    assert velocity is not None
    return velocity


def test_a_shape_is_captured_once(forward, captures):
    assert torch.equal(call(forward, 3), call(forward, 3))
    assert len(captures) == 1


def test_shapes_share_a_pool_and_a_stream(forward, captures):
    """Memory of a pool goes from one graph to the next only where both were captured in one stream."""
    for tokens in (3, 5, 7):
        call(forward, tokens)
    assert len(captures) == 3
    assert len(set(captures)) == 1


def test_moved_weights_are_captured_again(forward, captures, slot):
    call(forward, 3)
    slot.tensors = {key: value.clone() for key, value in slot.tensors.items()}  # elsewhere, as after sleep
    call(forward, 3)
    assert len(captures) == 2


def test_what_is_forgotten_is_captured_from_a_new_pool(forward, captures):
    call(forward, 3)
    forward.forget_graphs()
    call(forward, 3)
    (first, _), (second, _) = captures
    assert first is not second


def test_only_so_many_graphs_are_kept(forward, captures):
    for tokens in range(1, found.MOST_GRAPHS + 2):
        call(forward, tokens)
    call(forward, 1)  # the oldest made room
    call(forward, found.MOST_GRAPHS + 1)
    assert len(captures) == found.MOST_GRAPHS + 2
