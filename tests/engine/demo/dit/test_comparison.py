"""Measures against others' code, and strips against the model."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import spearmanr

from rollmill.engine import Engine, EngineConfig, FlowSDE
from rollmill.engine.demo.dit.compare import to_pixels
from rollmill.engine.demo.dit.measures import psnr, rank_correlation, top_overlap
from rollmill.engine.demo.dit.model import velocity
from rollmill.engine.demo.dit.prompts import embeds_of
from rollmill.engine.demo.dit.strips import clean_predictions, make_strip
from rollmill.engine.demo.dit.trainer import load_flux
from rollmill.engine.demo.dit.trajectories import final_ink


@pytest.mark.parametrize("ties", [False, True], ids=["no ties", "ties"])
def test_rank_correlation_is_scipys(ties):
    values = torch.randn(50, generator=torch.Generator().manual_seed(0))
    others = values + 0.5 * torch.randn(50, generator=torch.Generator().manual_seed(1))
    if ties:
        values, others = values.clamp(min=0), others.clamp(min=0.1)
    assert rank_correlation(values, others) == pytest.approx(spearmanr(values, others).statistic, abs=1e-12)


def test_rank_correlation_of_equal_rewards():
    flat = torch.zeros(5)
    assert rank_correlation(flat, flat) == 1
    assert rank_correlation(flat, torch.arange(5.0)) == 0


def test_psnr_is_that_of_signals_from_minus_one_to_one():
    images = torch.zeros(2, 4)
    others = torch.tensor([[0.2, -0.2, 0.2, -0.2], [0.0, 0.0, 0.0, 0.0]])
    first, same = psnr(images, others).tolist()
    assert first == pytest.approx(10 * math.log10(2**2 / 0.2**2), rel=1e-5)
    assert same == pytest.approx(100, abs=20)


def test_overlap_counts_the_best_quarter():
    values = torch.arange(8.0)
    assert top_overlap(values, values) == 1
    assert top_overlap(values, values.flip(0)) == 0
    assert top_overlap(values, torch.tensor([9.0, 0, 0, 0, 0, 0, 0, 9.0])) == 0.5


@pytest.mark.parametrize("window", [None, (1, 2)], ids=["all drawn", "window"])
def test_strip_shows_what_the_model_predicts(window, digits_folder, small):
    params = small.params(1, init_seed=3, step_seed=4, solver=FlowSDE(noise_level=0.7, window=window))
    with Engine(digits_folder, EngineConfig(quant="bf16", dtype="float32")) as engine:
        (sample,) = engine.generate(embeds_of(8), params)
    model = load_flux(digits_folder)
    with torch.no_grad():
        steps = [
            sample.latents[i] - sigma * velocity(model, sample.latents[i][None], sigma[None], torch.tensor([8]))[0]
            for i, sigma in enumerate(sample.sigmas[:-1])
        ]
    expected = torch.stack(steps)
    torch.testing.assert_close(clean_predictions(sample), expected, atol=2e-4, rtol=1e-3)
    strip = make_strip("one", 8, sample, "bf16")
    assert strip.window == (window or (0, 3))
    assert [len(picture) for picture in strip.pictures] == [64] * 4
    assert strip.pictures[-1] == to_pixels(final_ink(sample.latents[-1:]))[0]
