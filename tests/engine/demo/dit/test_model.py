"""The model's cache, and that training learns."""

from __future__ import annotations

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from rollmill.engine.demo.dit import model as digits_model
from rollmill.engine.demo.dit.digits import load_digits
from rollmill.engine.demo.dit.model import Recipe, build_model, flow_loss, make_flux, train
from rollmill.engine.demo.dit.trainer import load_flux


def test_second_call_trains_nothing(monkeypatch, digits_cache, digits_folder, small):
    monkeypatch.setattr(digits_model, "train", lambda *_: pytest.fail("trained again"))
    assert build_model(digits_cache, print, small.recipe) == digits_folder


def test_another_recipe_is_another_folder(small):
    other = msgspec.structs.replace(small.recipe, lr=1e-3)
    assert other.digest != small.recipe.digest == msgspec.structs.replace(other, lr=small.recipe.lr).digest


def test_folder_is_diffusers_in_bf16(digits_folder):
    (file,) = digits_folder.glob("*.safetensors")
    stored = load_file(file)
    assert {value.dtype for value in stored.values()} == {torch.bfloat16}
    loaded = dict(load_flux(digits_folder).named_parameters())
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name].float(), loaded[name]) for name in stored)


def test_training_lowers_the_loss():
    recipe = Recipe(iterations=30, batch=32, warmup=5)
    images, _ = load_digits()
    torch.manual_seed(0)
    untrained = make_flux()
    trained = train(recipe, print)
    with torch.no_grad():
        losses = []
        for model in (untrained, trained):
            torch.manual_seed(1)
            losses.append(flow_loss(model, images, Recipe(batch=256)).item())
    assert losses[1] < 0.8 * losses[0]
