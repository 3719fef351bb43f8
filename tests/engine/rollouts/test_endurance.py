"""The endurance benchmark, in small."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def endurance(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("endurance", BENCHMARKS / "endurance.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "endurance", module)
    spec.loader.exec_module(module)
    return module


def test_three_hundred_requests_and_five_swaps(endurance, open_engine, all_pages_are_back):
    engine = open_engine("qwen3_moe", max_batch_size=16, kv_cache_tokens=512)
    result = asyncio.run(endurance.endure(engine, 300, 5))
    assert result.finished + result.cancelled == 300
    assert result.cancelled > 20
    assert (result.swaps, result.lost_pages) == (5, 0)
    assert result.growth < 50
    all_pages_are_back(engine)
