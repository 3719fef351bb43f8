"""Stored embeds: what is read, and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from rollmill.engine import Embeds, ModelError
from rollmill.engine.dit.embeds_file import read_embeds, save_embeds


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def test_there_and_back(tmp_path):
    negative = Embeds(normal(3, 8), normal(4), torch.tensor([True, True, False]))
    embeds = [Embeds(normal(5, 8) + i, normal(4) + i, torch.ones(5, dtype=torch.bool), negative) for i in range(3)]
    save_embeds(tmp_path / "e.safetensors", embeds)
    found = read_embeds(tmp_path / "e.safetensors")
    for left, right in zip(found, embeds, strict=True):
        for one, other in ((left, right), (left.negative, right.negative)):
            assert torch.equal(one.prompt, other.prompt)
            assert torch.equal(one.pooled, other.pooled)
            assert torch.equal(one.mask, other.mask)


def test_one_negative_serves_all(tmp_path):
    save_file({"prompt_embeds": normal(2, 5, 8), "negative_prompt_embeds": normal(1, 3, 8)}, tmp_path / "e")
    found = read_embeds(tmp_path / "e")
    assert len(found) == 2
    assert all(torch.equal(one.negative.prompt, normal(1, 3, 8)[0]) for one in found)
    assert found[0].pooled is found[0].mask is None


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"prompt": normal(1, 2, 3)}, "prompt_embeds and, as needed"),
        ({"prompt_embeds": normal(1, 2, 3), "extra": normal(1)}, "extra"),
        ({"prompt_embeds": normal(2, 3)}, r"\[n, num_tokens, dim\]"),
        ({"prompt_embeds": normal(0, 2, 3)}, "n = 0"),
        ({"prompt_embeds": normal(2, 2, 3), "pooled_prompt_embeds": normal(3, 4)}, r"\[n, dim\] with n = 2"),
        ({"prompt_embeds": normal(3, 2, 3), "negative_prompt_embeds": normal(2, 2, 3)}, "n = 3"),
        ({"prompt_embeds": normal(1, 2, 3), "negative_pooled_prompt_embeds": normal(1, 3)}, "without negative_prompt"),
    ],
)
def test_what_is_refused(tensors, says, tmp_path):
    save_file(tensors, tmp_path / "e.safetensors")
    with pytest.raises(ModelError, match=says):
        read_embeds(tmp_path / "e.safetensors")


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "e.safetensors").write_text("no header")
    for name in ("e.safetensors", "absent"):
        with pytest.raises(ModelError, match="no readable safetensors file"):
            read_embeds(tmp_path / name)
