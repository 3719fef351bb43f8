"""Every solver against the papers' formulas, written out in float64 from their own variables, not from ours."""

from __future__ import annotations

import math

import pytest
import torch

from rollmill.engine import ODE, DanceSDE, DiffusionParams, FlowCPS, FlowSDE
from rollmill.engine.dit.solvers import StepNoise, draw_noise, log_density, make_steps

GRID = [1.0, 0.9, 0.7, 0.45, 0.1, 0.0]
ALL = range(5)
SIZE = {"height": 32, "width": 48}


def flow_grpo(x, v, sigmas, i, level):
    """arXiv:2505.05470, eq. 9: the reverse SDE of rectified flow with sigma_t = level sqrt(t / (1 - t))."""
    sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
    s = math.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma))) * level
    drift = v + s**2 / (2 * sigma) * (x + (1 - sigma) * v)
    return x + drift * dt, s * math.sqrt(-dt)


def flow_cps(x, v, sigmas, i, level):
    """arXiv:2509.05952: the predicted clean latent and noise, recombined so that the variances add up."""
    sigma, following = sigmas[i], sigmas[i + 1]
    std = following * math.sin(level * math.pi / 2)
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    return clean * (1 - following) + noise * math.sqrt(following**2 - std**2), std


def dance_grpo(x, v, sigmas, i, level):
    """arXiv:2505.07818: dx = (v - eta^2 / 2 score) dt + eta dw, the score of the noised Gaussian."""
    sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
    clean = x - sigma * v
    score = -(x - (1 - sigma) * clean) / sigma**2
    return x + dt * v - 0.5 * level**2 * score * dt, level * math.sqrt(-dt)


SOLVERS = {
    "flow-grpo": (lambda level: FlowSDE(noise_level=level), flow_grpo, 0.7),
    "flow-cps": (lambda level: FlowCPS(noise_level=level), flow_cps, 0.8),
    "dance-grpo": (lambda level: DanceSDE(eta=level), dance_grpo, 0.3),
}


@pytest.fixture
def latents():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(3)]


NOISY_STEPS = [(solver, i) for solver in SOLVERS for i in ALL if (solver, i) != ("flow-cps", 4)]


@pytest.mark.parametrize(("solver", "i"), NOISY_STEPS)
def test_mean_and_std(solver, i, latents):
    make, formula, level = SOLVERS[solver]
    x, v, _ = latents
    step = make_steps(make(level), GRID, ALL)[i]
    mean, std = formula(x, v, GRID, i, level)
    torch.testing.assert_close(step.x * x + step.v * v, mean, rtol=1e-12, atol=1e-12)
    assert step.std == pytest.approx(std, rel=1e-12)
    assert std > 0


def test_the_first_step_of_flow_grpo_takes_the_second_sigma_for_1():
    step = make_steps(FlowSDE(noise_level=0.7), GRID, ALL)[0]
    assert step.std == pytest.approx(0.7 * math.sqrt(1 / (1 - 0.9)) * math.sqrt(0.1), rel=1e-12)


@pytest.mark.parametrize("first", [1 - 2**-24, 1 - 1e-6], ids=["a-shift's-rounding", "UniPC"])
def test_a_first_sigma_of_almost_1_is_1(first):
    """Else std would be some hundreds: the formula divides by 1 - sigma."""
    exact, almost = (make_steps(FlowSDE(), [sigma, *GRID[1:]], ALL)[0] for sigma in (1.0, first))
    assert almost.std == pytest.approx(exact.std, rel=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_noise_every_solver_is_the_ode(solver, latents):
    x, v, _ = latents
    for i, step in enumerate(make_steps(SOLVERS[solver][0](1e-6), GRID, range(4))):
        euler = make_steps(ODE(), GRID, range(0))[i]
        torch.testing.assert_close(step.x * x + step.v * v, x + v * (GRID[i + 1] - GRID[i]), rtol=0, atol=1e-9)
        assert (euler.x, euler.v, euler.std) == (1.0, GRID[i + 1] - GRID[i], 0.0)
        assert step.std < 1e-5


@pytest.mark.parametrize("level", [0.1, 0.7, 1.0])
def test_cps_keeps_the_variance_of_the_flow(level):
    """From x = (1 - s) clean + s noise with v = noise - clean, the next latent is (1 - s') clean and noise of s'^2."""
    for i, step in enumerate(make_steps(FlowCPS(noise_level=level), GRID, range(4))[:4]):
        sigma, following = GRID[i], GRID[i + 1]
        of_clean = step.x * (1 - sigma) - step.v
        of_noise = step.x * sigma + step.v
        assert of_clean == pytest.approx(1 - following, rel=1e-12)
        assert of_noise**2 + step.std**2 == pytest.approx(following**2, rel=1e-12)


def test_steps_outside_the_window_follow_the_ode():
    steps = make_steps(DanceSDE(), GRID, range(1, 3))
    assert [step.std > 0 for step in steps] == [False, True, True, False, False]
    assert steps[3] == make_steps(ODE(), GRID, range(0))[3]


@pytest.mark.parametrize("std", [0.05, 0.7])
def test_log_densities_are_the_mean_over_elements(std, latents):
    x, mean, _ = latents
    gaussian = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).mean(1)
    squares = -((x - mean) ** 2).flatten(1).mean(1)
    ours = [log_density(x.float(), mean.float(), std, kind) for kind in ("gaussian", "squared_error")]
    torch.testing.assert_close(ours[0].double(), gaussian, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1].double(), squares, rtol=1e-5, atol=1e-5)
    assert ours[0].dtype == ours[1].dtype == torch.float32


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("size", [(1, 5), (3, 1000), (100_000,), (4096, 64)], ids=str)
def test_a_log_density_depends_on_neither_company_nor_threads(size, two_threads):
    """A plain sum is split over threads once it is alone and large."""
    x, mean = torch.randn(2, 7, *size)
    together = log_density(x, mean, 0.3, "gaussian")
    alone = torch.cat([log_density(x[i : i + 1], mean[i : i + 1], 0.3, "gaussian") for i in range(7)])
    torch.set_num_threads(1)
    assert torch.equal(together, alone)
    assert torch.equal(together, log_density(x, mean, 0.3, "gaussian"))


def test_noise_is_that_of_a_generator_a_sample():
    noise = draw_noise([5, 6], (4, 3))
    for row, seed in zip(noise, [5, 6], strict=True):
        assert torch.equal(row, torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(seed))[0])


def step_noise(seed, *steps):
    noise = StepNoise([seed], (64,))
    return [noise.draw(step)[0] for step in steps]


def test_every_step_and_seed_draws_its_own_noise():
    """Step noise is of streams of its own: no step's equals a first latent's or another seed's."""
    seeds = [0, 1, 2, 2**31, 2**32 - 1]
    drawn = [noise for seed in seeds for noise in (*draw_noise([seed], (64,)), *step_noise(seed, 0, 1, 2))]
    products = torch.stack(drawn) @ torch.stack(drawn).T / 64
    assert (products.fill_diagonal_(0).abs() < 0.6).all()


def test_the_noise_of_a_step_depends_on_neither_window_nor_company():
    assert torch.equal(step_noise(3, 2)[0], step_noise(3, 0, 1, 2)[2])
    assert torch.equal(StepNoise([7, 3], (64,)).draw(2)[1], step_noise(3, 2)[0])


# what comes back


CHECKED = {
    "flow-grpo": (FlowSDE(noise_level=0.7), flow_grpo, 0.7),
    "flow-grpo-squared": (FlowSDE(noise_level=0.7, log_density="squared_error"), flow_grpo, 0.7),
    "flow-cps": (FlowCPS(noise_level=0.8), flow_cps, 0.8),
    "flow-cps-gaussian": (FlowCPS(noise_level=0.8, window=(0, 3), log_density="gaussian"), flow_cps, 0.8),
    "dance-grpo": (DanceSDE(eta=0.3, window=(1, 4)), dance_grpo, 0.3),
}


def density(solver, following, mean, std):
    following, mean = following.double(), mean.double()
    if solver.log_density == "squared_error":
        return -((following - mean) ** 2).mean()
    return torch.distributions.Normal(mean, std).log_prob(following).mean()


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CHECKED)
@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_logprobs_follow_from_what_came_back(name, case, held, open_engine, make_embeds):
    """A trainer has the stored latents, the sigmas and the embeds, and runs the transformer again."""
    solver, formula, level = CHECKED[case]
    engine = open_engine(name, dtype="float32")
    params = DiffusionParams(
        steps=5, solver=solver, latents_dtype=held, want=["latents:window", "logprobs", "means"], init_seed=1, **SIZE
    )
    (sample,) = engine.generate(make_embeds(name), params)
    assert sample.latents.dtype == getattr(torch, held)
    sigmas, family = sample.sigmas.double().tolist(), engine.rollouts.family
    for place, i in enumerate(sample.window):
        now, following = sample.latent(i), sample.latent(i + 1)
        inputs = family.inputs(
            now[None].float(), sample.timesteps[i : i + 1], [sample.embeds], sample.size, sample.params.guidance_scale
        )
        with torch.no_grad():
            velocity = engine.transformer(**inputs, return_dict=False)[0][0]
        mean, std = formula(now.double(), velocity.double(), sigmas, i, level)
        torch.testing.assert_close(sample.means[place].double(), mean, rtol=0, atol=1e-5)
        assert float(sample.stds[place]) == pytest.approx(std, rel=1e-6)
        again = density(solver, following, mean, std)
        from_means = density(solver, following, sample.means[place], std)
        assert float(sample.logprobs[place]) == pytest.approx(float(from_means), abs=1e-5)
        assert float(sample.logprobs[place]) == pytest.approx(float(again), abs=1e-5)
    assert sample.logprobs.shape == sample.stds.shape == (len(sample.window),)


@pytest.mark.parametrize("steps", [1, 4])
def test_flow_grpo_and_dance_draw_the_last_step_and_cps_does_not(steps, open_engine, make_embeds):
    engine = open_engine("sd3")
    for solver in (FlowSDE(), DanceSDE()):
        (sample,) = engine.generate(make_embeds("sd3"), DiffusionParams(steps=steps, solver=solver, **SIZE))
        assert sample.window == range(steps)
        assert sample.logprobs.isfinite().all()
    if steps > 1:
        (sample,) = engine.generate(make_embeds("sd3"), DiffusionParams(steps=steps, solver=FlowCPS(), **SIZE))
        assert sample.window == range(steps - 1)
        assert sample.logprobs.isfinite().all()
        assert sample.latents.isfinite().all()
