"""Pages of keys and values: as asked for, as a share of a GPU's memory, or a little."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from rollmill.engine import ConfigError, EngineConfig, UnsupportedError
from rollmill.engine.llm import kv_room
from rollmill.engine.llm.attention import AttentionSpec
from rollmill.engine.llm.page_pool import PAGE_SIZE

GIB = 1 << 30
PER_TOKEN = 2 * (4 * 128 * 2) + 2 * 8 * 2  # one layer of keys and values in BF16, routed experts of two


@pytest.fixture
def pages(monkeypatch):
    """`pages(config)` on a GPU of 80 GiB, 50 of them free; a second packed copy and what waits take 20."""
    monkeypatch.setattr(kv_room, "cache_dtype", lambda model, config: torch.bfloat16)
    monkeypatch.setattr(kv_room, "free_bytes", lambda device: 50 * GIB)
    monkeypatch.setattr(kv_room, "staging_bytes", lambda slots, mode: 20 * GIB if mode == "staged" else 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=80 * GIB))

    def count(config, device="cuda", max_position=1 << 30):
        spec = AttentionSpec(layer=0, num_kv_heads=4, key_dim=128, value_dim=128, scale=1.0)
        model = SimpleNamespace(
            device=torch.device(device),
            attention_specs=[spec],
            routing=(2, 8),
            config=SimpleNamespace(max_position=max_position),
        )
        return kv_room.num_pages(model, config, ())

    return count


def test_tokens_are_rounded_up_to_pages(pages):
    assert pages(EngineConfig(kv_cache_tokens=17)) == 3


def test_unasked_two_gib_or_what_sequences_can_need(pages):
    assert pages(EngineConfig()) == 2 * GIB // (PAGE_SIZE * PER_TOKEN) + 1
    assert pages(EngineConfig(max_batch_size=3), max_position=100) == 19 + 1  # 300 tokens


@pytest.mark.parametrize(("swap", "room"), [("host", 42), ("staged", 22)])
def test_a_share_of_the_gpus_memory(pages, swap, room):
    found = pages(EngineConfig(memory_fraction=0.9, swap=swap))  # 72 GiB of 80, 30 of them in use
    assert found == room * GIB // (PAGE_SIZE * PER_TOKEN) + 1
    assert pages(EngineConfig(memory_fraction=0.9, max_batch_size=3), max_position=100) == 19 + 1


def test_a_share_that_is_in_use_already(pages):
    with pytest.raises(
        ConfigError, match=r"memory_fraction=0.6 .* 30.0 of 80.0 GiB are in use, and swaps need 20.0 more"
    ):
        pages(EngineConfig(memory_fraction=0.6))


def test_a_cpu_has_no_such_share(pages):
    with pytest.raises(UnsupportedError, match="of a GPU's memory: set kv_cache_tokens"):
        pages(EngineConfig(memory_fraction=0.9), device="cpu")


@pytest.mark.parametrize("given", [{"memory_fraction": 1.5}, {"memory_fraction": 0.9, "kv_cache_tokens": 64}], ids=str)
def test_bounds(given):
    with pytest.raises(ConfigError, match="memory_fraction"):
        EngineConfig(**given)
