"""Flow-GRPO against a computation of its own; log-probs against the engine's."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from rollmill.engine import Engine, EngineConfig
from rollmill.engine.demo.dit.prompts import embeds_of, make_tables
from rollmill.engine.demo.dit.trainer import FlowGrpoConfig, FlowGrpoTrainer, clipped_gain, group_advantages, load_flux
from rollmill.engine.demo.dit.trajectories import collect, recompute_logprobs

REWARDS = torch.tensor([0.3, 0.0, 0.4, 0.2, 0.2, 0.5])
DIGITS = (4, 7)


@pytest.fixture
def trainer(digits_folder):
    return FlowGrpoTrainer(digits_folder, FlowGrpoConfig(lr=1e-3))


def plain_velocity(model, latents, sigma, labels):
    """diffusers' module called by hand."""
    prompts, pooled = make_tables()
    places = torch.tensor([(0, row, col) for row in range(4) for col in range(4)], dtype=torch.float32)
    return model(
        hidden_states=latents,
        timestep=torch.full((len(latents),), float(sigma)),
        encoder_hidden_states=prompts.float()[labels],
        pooled_projections=pooled.float()[labels],
        txt_ids=torch.zeros(2, 3),
        img_ids=places,
        return_dict=False,
    )[0]


def plain_step(model, found, step, level=0.7):
    """(mean, std) of Flow-GRPO's SDE (arXiv:2505.05470), written out."""
    sigmas = found.sigmas.double()
    sigma, following = sigmas[step], sigmas[step + 1]
    dt = following - sigma
    spread = level * (sigma / (1 - (sigmas[1] if sigma == 1 else sigma))).sqrt()
    x = found.latents[:, step].double()
    v = plain_velocity(model, found.latents[:, step], found.sigmas[step], found.labels).double()
    mean = x * (1 + spread**2 / (2 * sigma) * dt) + v * (1 + spread**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, spread * (-dt).sqrt()


def plain_logprobs(model, found):
    columns = []
    for step in range(len(found.sigmas) - 1):
        mean, std = plain_step(model, found, step)
        density = torch.distributions.Normal(mean, std).log_prob(found.latents[:, step + 1].double())
        columns.append(density.mean((1, 2)))
    return torch.stack(columns, 1)


def test_trainer_and_engine_agree_in_bf16(found, trainer):
    mine = recompute_logprobs(trainer.model, found)
    torch.testing.assert_close(mine, found.logprobs, atol=1e-4, rtol=0)
    assert mine.shape == (6, 3)


def test_logprobs_are_those_of_the_formula(found, trainer):
    with torch.no_grad():
        expected = plain_logprobs(trainer.model, found)
    torch.testing.assert_close(recompute_logprobs(trainer.model, found).double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("quant", ["nvfp4", "fp8"])
def test_quantized_logprobs_are_not_the_trainers_and_replayed_ones_are(quant, digits_folder, small, trainer):
    config = EngineConfig(quant=quant, dual="bf16", dtype="float32")
    with Engine(digits_folder, config) as engine:
        samples = engine.generate([embeds_of(digit) for digit in DIGITS], small.params(3, init_seed=1, step_seed=2))
        replayed = engine.replay(samples, precision="bf16")
    gap = recompute_logprobs(trainer.model, collect(samples, DIGITS)) - collect(samples, DIGITS).logprobs
    assert gap.abs().min() > 1e-7
    again = collect(replayed, DIGITS)
    torch.testing.assert_close(recompute_logprobs(trainer.model, again), again.logprobs, atol=1e-4, rtol=0)


def test_advantages_are_taken_within_a_group():
    rewards = [[0.3, 0.0, 0.4], [0.2, 0.2, 0.5]]
    expected = [(np.array(group) - np.mean(group)) / (np.std(group) + 1e-4) for group in rewards]
    np.testing.assert_allclose(group_advantages(REWARDS, 3), np.concatenate(expected), rtol=1e-5)
    assert group_advantages(torch.full((4,), 0.7), 2).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("ratio", "advantage", "gain"),
    [(1.2, 2.0, 2.02), (0.5, 2.0, 1.0), (1.2, -1.0, -1.2), (0.5, -1.0, -0.99), (1.0, 3.0, 3.0)],
)
def test_gain_is_clipped_where_clipping_is_pessimistic(ratio, advantage, gain):
    found = clipped_gain(torch.tensor([ratio]), torch.tensor([advantage]), 0.01)
    assert found.item() == pytest.approx(gain)


@pytest.mark.parametrize("shift", [None, 0.02], ids=["fresh", "used again"])
def test_gradient_is_flow_grpos(found, trainer, shift):
    with torch.no_grad():
        for parameter in trainer.parameters:  # away from the reference
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    old = None if shift is None else found.logprobs + shift * torch.linspace(-1, 1, 18).view(6, 3)
    copy = trainer.model
    logprobs = plain_logprobs(copy, found)
    before = logprobs.detach() if old is None else old.double()
    ratio = (logprobs - before).exp()
    groups = REWARDS.double().view(2, 3)
    advantages = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, correction=0, keepdim=True) + 1e-4)).view(
        6, 1
    )
    gain = torch.minimum(ratio * advantages, ratio.clamp(0.99, 1.01) * advantages).mean()
    divergences = []
    for step in range(3):
        mean, std = plain_step(copy, found, step)
        with torch.no_grad():
            reference, _ = plain_step(trainer.reference, found, step)
        divergences.append((mean - reference).square().mean() / (2 * std**2))
    kl = torch.stack(divergences).mean()
    gradients = torch.autograd.grad(0.01 * kl - gain, trainer.parameters)
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()

    captured = {}
    trainer.optimizer.step = lambda: captured.update(enumerate(m.grad.clone() for m in trainer.masters))
    metrics = trainer.step(found, REWARDS, old)
    assert metrics.kl == pytest.approx(kl.item(), rel=1e-4)
    assert metrics.kl > 1e-4
    assert metrics.grad_norm == pytest.approx(norm.item(), rel=1e-3)
    scale = min(1.0, 1.0 / norm.item())
    for place, gradient in enumerate(gradients):
        torch.testing.assert_close(captured[place], gradient * scale, atol=1e-4 * norm.item() * scale, rtol=1e-2)
    torch.testing.assert_close(metrics.logprobs.double(), logprobs.detach(), atol=1e-5, rtol=0)


def test_a_step_makes_rewarded_trajectories_likelier(found, trainer):
    before = trainer.step(found, REWARDS).logprobs
    change = (recompute_logprobs(trainer.model, found) - before).mean(1)
    assert (group_advantages(REWARDS, 3) * change).sum() > 0


def test_equal_rewards_teach_nothing(found, trainer):
    before = dict(trainer.weights())
    trainer.step(found, torch.full((6,), 0.4))
    assert all(torch.equal(before[name], weight) for name, weight in trainer.weights())


def test_a_trajectory_beyond_the_clip_range_teaches_nothing(found, digits_folder):
    trainer = FlowGrpoTrainer(digits_folder, FlowGrpoConfig(kl=0.0))
    signs = group_advantages(REWARDS, 3).sign()[:, None]
    metrics = trainer.step(found, REWARDS, found.logprobs - 0.05 * signs)  # all moved already, the way they should
    assert metrics.grad_norm == 0


def test_sent_weights_are_exactly_what_the_trainer_computes_with(found, trainer, digits_folder):
    before = dict(load_flux(digits_folder).named_parameters())
    trainer.step(found, REWARDS)
    held = dict(trainer.model.named_parameters())
    sent = dict(trainer.weights())
    assert sent.keys() == held.keys()
    assert all(weight.dtype == torch.bfloat16 and torch.equal(weight.float(), held[n]) for n, weight in sent.items())
    assert any(not torch.equal(before[name], held[name]) for name in held)


def test_a_swap_brings_the_trainers_policy(found, trainer, digits_folder, small):
    trainer.step(found, REWARDS)
    with Engine(digits_folder, EngineConfig(quant="bf16", dtype="float32")) as engine:
        report = engine.update_weights(trainer.weights(), version="1")
        samples = engine.generate([embeds_of(digit) for digit in DIGITS], small.params(3, init_seed=1, step_seed=2))
    assert report.status == "committed"
    assert {sample.weight_version for sample in samples} == {"1"}
    drawn = collect(samples, DIGITS)
    torch.testing.assert_close(recompute_logprobs(trainer.model, drawn), drawn.logprobs, atol=1e-4, rtol=0)
    off = recompute_logprobs(trainer.reference, drawn) - drawn.logprobs
    assert off.abs().max() > 1e-3


def test_samples_of_a_prompt_lie_side_by_side(found):
    assert found.labels.tolist() == [4, 4, 4, 7, 7, 7]
    assert found.group == 3
    assert found.latents.shape == (6, 4, 16, 4)
    assert msgspec.structs.asdict(found)["noise_level"] == 0.7
