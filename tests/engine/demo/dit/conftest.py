"""The digits model after a few seconds of training: every part of the demo, and some digits that a judge can read."""

from __future__ import annotations

from pathlib import Path

import pytest

from rollmill.engine import Engine, EngineConfig
from rollmill.engine.demo.dit.config import DitDemoConfig
from rollmill.engine.demo.dit.model import Recipe, build_model
from rollmill.engine.demo.dit.prompts import embeds_of
from rollmill.engine.demo.dit.trajectories import Trajectories, collect

SMALL = DitDemoConfig(
    steps=2, prompts=4, samples=3, denoising_steps=3, compared=2, recipe=Recipe(iterations=80, batch=32, warmup=10)
)
DIGITS = (4, 7)


@pytest.fixture(scope="session")
def small() -> DitDemoConfig:
    return SMALL


@pytest.fixture(scope="session")
def digits_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits")


@pytest.fixture(scope="session")
def digits_folder(digits_cache: Path) -> Path:
    return build_model(digits_cache, print, SMALL.recipe)


@pytest.fixture(scope="session")
def found(digits_folder: Path) -> Trajectories:
    """Rollouts of an unquantized engine."""
    with Engine(digits_folder, EngineConfig(quant="bf16", dtype="float32")) as engine:
        params = SMALL.params(SMALL.samples, init_seed=5, step_seed=6)
        return collect(engine.generate([embeds_of(digit) for digit in DIGITS], params), DIGITS)
