"""What a trainer does with a sample: the same inputs through its own transformer, the same densities, gradients."""

from __future__ import annotations

import pytest
import torch

from rollmill.engine import ODE, DanceSDE, DiffusionParams, FlowCPS, FlowSDE, RequestError

SOLVERS = {"flow-grpo": FlowSDE(window=(0, 3)), "cps": FlowCPS(), "dance": DanceSDE(window=(1, 4))}
SIZE = {"height": 32, "width": 48}
WANT = ["latents:window", "logprobs", "means"]
MAKES_TRUE_CFG = ["qwen", "sd3", "wan"]


@pytest.fixture
def open_trainer(transformer_folder):
    """diffusers' own model of the same weights, in float32."""

    def open_one(engine, name):
        model = type(engine.transformer).from_pretrained(transformer_folder(name), torch_dtype=torch.float32)
        return model.requires_grad_(True)

    return open_one


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["flux", "flux2", "qwen", "sd3", "wan"])
def test_a_trainers_logprobs_are_the_engines(name, solver, open_engine, open_trainer, make_embeds):
    engine = open_engine(name, dtype="float32")
    trainer = open_trainer(engine, name)
    scale = 3.0 if name in MAKES_TRUE_CFG else None
    params = DiffusionParams(steps=4, n=2, solver=SOLVERS[solver], want=WANT, true_cfg_scale=scale, **SIZE)
    samples = engine.generate(make_embeds(name, negative=True), params)
    for place, step in enumerate(samples[0].window):
        velocity = trainer(**engine.step_inputs(samples, step), return_dict=False)[0]
        if scale is not None:
            without = trainer(**engine.step_inputs(samples, step, negative=True), return_dict=False)[0]
            velocity = engine.rollouts.family.guide(velocity, without, scale)
        for sample, one in zip(samples, velocity, strict=True):
            torch.testing.assert_close(sample.step_mean(step, one), sample.means[place], rtol=0, atol=2e-5)
            logprob = sample.step_logprob(step, one)
            assert logprob.dtype == torch.float32
            assert float(logprob.detach()) == pytest.approx(float(sample.logprobs[place]), abs=2e-5)


def test_gradients_reach_the_trainers_weights(open_engine, open_trainer, make_embeds):
    """Their sign: a step along them makes the drawn latents likelier."""
    engine = open_engine("flux", dtype="float32")
    trainer = open_trainer(engine, "flux")
    params = DiffusionParams(steps=4, solver=FlowSDE(window=(1, 2)), want=WANT, **SIZE)
    (sample,) = engine.generate(make_embeds("flux"), params)

    def logprob():
        velocity = trainer(**engine.step_inputs([sample], 1), return_dict=False)[0][0]
        return sample.step_logprob(1, velocity)

    before = logprob()
    before.backward()
    norm = sum(float(weight.grad.square().sum()) for weight in trainer.parameters() if weight.grad is not None)
    assert norm > 0
    with torch.no_grad():
        for weight in trainer.parameters():
            if weight.grad is not None:
                weight += weight.grad * 1e-3 / norm
    assert float(logprob() - before) == pytest.approx(1e-3, rel=0.1)


def test_only_drawn_steps_have_a_density(open_engine, make_embeds):
    engine = open_engine("flux")
    params = DiffusionParams(steps=4, solver=FlowSDE(window=(1, 2)), want=["latents"], **SIZE)
    (sample,) = engine.generate(make_embeds("flux"), params)
    with pytest.raises(RequestError, match=r"step 2 was not drawn; drawn: \[1\]"):
        sample.step_logprob(2, sample.latent(2))
    (plain,) = engine.generate(make_embeds("flux"), DiffusionParams(steps=2, solver=ODE(), **SIZE))
    with pytest.raises(RequestError, match="not drawn"):
        plain.step_mean(0, plain.latent(2))
    with pytest.raises(RequestError, match="negative embeds"):
        engine.step_inputs([sample], 1, negative=True)
    with pytest.raises(RequestError, match="wants samples"):
        engine.step_inputs([], 1)
    (longer,) = engine.generate(make_embeds("flux", 9), params)
    with pytest.raises(RequestError, match="equal lengths"):
        engine.step_inputs([sample, longer], 1)
    with pytest.raises(RequestError, match="one call"):
        engine.step_inputs([sample, plain], 1)
