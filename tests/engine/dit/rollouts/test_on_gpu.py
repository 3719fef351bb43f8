"""Rollouts on a GPU: CUDA graphs of the fused forward give what calls give, before and after swaps and sleep."""

from __future__ import annotations

import pytest
import torch

from rollmill.engine import DiffusionParams, FlowSDE, UnsupportedError
from rollmill.quant import find_capability

pytestmark = pytest.mark.gpu
PARAMS = DiffusionParams(
    steps=3, n=4, solver=FlowSDE(), want=["latents", "logprobs"], init_seed=1, step_seed=2, height=32, width=32
)
QUANTS = ["bf16", "fp8", "fp8_channel"]


@pytest.fixture(autouse=True)
def gpu():
    try:
        find_capability("cuda")
    except UnsupportedError as error:
        pytest.skip(str(error))


@pytest.fixture
def latents(make_embeds):
    """All latents of a rollout of two prompts."""

    def roll(engine):
        prompts = [make_embeds("flux", seed=seed) for seed in range(2)]
        return torch.stack([sample.latents for sample in engine.generate(prompts, PARAMS)])

    return roll


def assert_equal(found, expected):
    """Bit for bit; samples, points of the trajectory and the worst of all are told where they differ."""
    assert found.shape == expected.shape
    apart = (found != expected).flatten(2).any(2)  # NaN differs from everything
    told = {
        "NaN": (int(found.isnan().sum()), int(expected.isnan().sum())),
        "first point of each sample": {i: row.nonzero()[0].item() for i, row in enumerate(apart.cpu()) if row.any()},
        "worst": (found - expected).abs().max().item(),
        "largest": expected.abs().max().item(),
    }
    assert torch.equal(found, expected), told


def source(engine):
    """The weights that an engine was opened with."""
    return dict(engine.checkpoint.transformers["transformer"].source)


@pytest.mark.parametrize("quant", QUANTS)
def test_graphs_give_what_calls_give(quant, open_engine, latents):
    graphs, calls = (open_engine("flux", quant=quant, device="cuda", cuda_graphs=on) for on in (True, False))
    assert graphs.info()["unfused"] == {"transformer": None}
    assert_equal(latents(graphs), latents(calls))


@pytest.mark.parametrize("quant", QUANTS)
def test_graphs_outlive_swaps_and_notice_sleep(quant, open_engine, transformer_folder, latents):
    engine, cold = (open_engine(transformer_folder("flux", seed), quant=quant, device="cuda") for seed in (0, 1))
    before, expected = latents(engine), latents(cold)
    assert not torch.equal(before, expected)
    engine.update_weights(source(cold))
    assert engine.digest() == cold.digest()
    assert_equal(latents(engine), expected)
    engine.sleep()
    engine.wake()
    filler = torch.full((1 << 22,), float("nan"), device="cuda")  # takes what was freed, if anything was
    engine.update_weights(source(cold))
    assert_equal(latents(engine), expected)
    assert filler.isnan().all()


@pytest.mark.parametrize("quant", QUANTS)
def test_a_rollout_is_near_the_cpus(quant, open_engine, make_embeds):
    """The first velocity: later ones start from other latents."""
    params = DiffusionParams(steps=1, n=2, want=["latents"], init_seed=1, height=32, width=32)
    on_gpu, on_cpu = (
        torch.stack(
            [
                one.latents[-1]
                for one in open_engine("flux", quant=quant, device=device).generate([make_embeds("flux")], params)
            ]
        )
        .float()
        .cpu()
        for device in ("cuda", "cpu")
    )
    assert on_gpu.isfinite().all()
    apart = ((on_gpu - on_cpu).norm() / on_cpu.norm()).item()
    assert apart < 0.1, f"{apart:.3f} of the CPU's norm apart"
