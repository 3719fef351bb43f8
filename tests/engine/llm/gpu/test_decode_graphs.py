"""Which memory pool graphs are captured into: one for all that live together, never one that all have left."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from rollmill.engine.llm.gpu import decode_graphs  # noqa: E402 (after the conftest's set-up)
from rollmill.engine.llm.paged_attention import Span  # noqa: E402

MODEL = SimpleNamespace(device=torch.device("cpu"))


@pytest.fixture
def captured(monkeypatch):
    """(batch size, pool) of every capture; a batch of 4 cannot be captured the first time."""
    seen, handles = [], itertools.count()

    class Graph:
        def __init__(self, model, cache, attention, size, pool, stream):
            seen.append((size, pool))
            if size == 4 and len(seen) == 1:
                raise MemoryError

        def run(self, ids, positions, spans):
            return ids

    monkeypatch.setattr(decode_graphs, "DecodeGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: None)
    return seen


def decode(graphs, count):
    graphs.run(torch.zeros(count), torch.zeros(count), [Span([1], 0, 1)] * count)


def test_graphs_share_a_pool_until_they_are_forgotten(captured):
    graphs = decode_graphs.DecodeGraphs(MODEL, None, None, 8)
    for count in (1, 2, 1):
        decode(graphs, count)
    graphs.forget()
    decode(graphs, 2)
    assert captured == [(1, 0), (2, 0), (2, 1)]


def test_a_pool_whose_first_capture_failed_is_given_up(captured):
    graphs = decode_graphs.DecodeGraphs(MODEL, None, None, 8)
    with pytest.raises(MemoryError):
        decode(graphs, 4)
    decode(graphs, 4)
    assert captured == [(4, 0), (4, 1)]
