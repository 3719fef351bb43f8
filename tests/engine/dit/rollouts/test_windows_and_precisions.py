"""Which steps are drawn, and in which precision every step is computed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from rollmill.engine import (
    ODE,
    ConfigError,
    DanceSDE,
    DiffusionParams,
    Embeds,
    FlowCPS,
    FlowSDE,
    ProgressiveWindow,
    QuantSpec,
    RandomWindow,
)
from rollmill.engine.dit.params import step_precisions, window_steps
from rollmill.quant.kernels.exact import ExactKernel

SIZE = {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("solver", "steps", "drawn"),
    [
        (ODE(), 5, range(0)),
        (FlowSDE(), 5, range(5)),
        (FlowCPS(), 5, range(4)),
        (FlowSDE(window=(1, 3)), 5, range(1, 3)),
        (DanceSDE(window=(4, 5)), 5, range(4, 5)),
        (FlowCPS(window=(2, 5)), 5, range(2, 4)),
    ],
)
def test_fixed_windows(solver, steps, drawn):
    assert window_steps(solver, steps, 0) == drawn
    assert window_steps(solver, steps, 1000) == drawn


def test_a_progressive_window_moves_with_training_and_begins_again():
    """MixGRPO: 4 steps of 8, one further every 25 training steps: places 0 to 4, then 0 again."""
    solver = FlowSDE(window=ProgressiveWindow(size=4, every=25))
    starts = [window_steps(solver, 8, step).start for step in range(0, 160, 5)]
    assert starts == [step // 25 % 5 for step in range(0, 160, 5)]
    assert all(len(window_steps(solver, 8, step)) == 4 for step in range(160))


def test_a_progressive_window_with_start_and_stride():
    solver = DanceSDE(window=ProgressiveWindow(size=2, every=1, start=2, stride=2))
    assert [window_steps(solver, 7, step).start for step in range(5)] == [2, 4, 2, 4, 2]


@pytest.mark.parametrize("window", [ProgressiveWindow(size=2, every=1), RandomWindow(size=2)], ids=["moves", "random"])
def test_moving_windows_of_cps_never_reach_its_last_step(window):
    """It has no noise: a window that came to hold it alone would stop a training run half-way."""
    drawn = [window_steps(FlowCPS(window=window), 5, step) for step in range(60)]
    assert {one.start for one in drawn} == {0, 1, 2}
    assert {len(one) for one in drawn} == {2}


def test_a_random_window_is_a_function_of_seed_and_training_step():
    def starts(seed):
        solver = FlowSDE(window=RandomWindow(size=2, range=(1, 7), seed=seed))
        return [window_steps(solver, 10, step).start for step in range(200)]

    assert starts(0) == starts(0) != starts(1)
    assert set(starts(0)) == set(range(1, 6))


@pytest.mark.parametrize(
    "window",
    [
        (3, 3),
        (-1, 2),
        (2, 6),
        ProgressiveWindow(size=6),
        ProgressiveWindow(size=2, start=4),
        RandomWindow(size=6),
        RandomWindow(size=2, range=(0, 9)),
    ],
    ids=str,
)
def test_a_window_outside_of_the_steps_is_refused_at_every_training_step(window):
    for step in range(10):
        with pytest.raises(ConfigError, match="5 steps"):
            window_steps(FlowSDE(window=window), 5, step)


def test_cps_needs_a_step_with_noise():
    with pytest.raises(ConfigError, match="last step only"):
        window_steps(FlowCPS(window=(4, 5)), 5, 0)
    with pytest.raises(ConfigError, match="1 step"):
        window_steps(FlowCPS(), 1, 0)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: FlowSDE(noise_level=0), "noise_level > 0"),
        (lambda: FlowSDE(noise_level=float("nan")), "noise_level > 0"),
        (lambda: FlowSDE(noise_level=float("inf")), "noise_level > 0, finite; got noise_level=inf"),
        (lambda: FlowCPS(noise_level=1.1), "<= 1"),
        (lambda: DanceSDE(eta=float("inf")), "eta > 0, finite"),
        (lambda: DanceSDE(eta=-1), "eta > 0"),
        (lambda: FlowSDE(window="all"), "window"),
        (lambda: FlowSDE(log_density="mean"), "gaussian"),
        (lambda: ProgressiveWindow(size=0), "size >= 1"),
        (lambda: ProgressiveWindow(every=0), "every >= 1"),
        (lambda: RandomWindow(size=3, range=(0, 2)), "as long as size"),
        (lambda: FlowSDE(sigma=1), "no field 'sigma'"),
    ],
)
def test_wrong_solvers_are_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


# precisions


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        (None, "qqqqqq"),
        ("bf16", "bbbbbb"),
        ({"window": "bf16"}, "qbbqqq"),
        ({"window": "bf16", "rest": "weight_only"}, "wbbwww"),
        ({"first": ("bf16", 1), "last": ("weight_only", 2)}, "bqqqww"),
        ({"window": "weight_only", "first": ("bf16", 3), "rest": "bf16"}, "bwwbbb"),
        ({"last": ("bf16", 9)}, "bbbbbb"),
    ],
    ids=str,
)
def test_parts_of_a_precision(precision, expected):
    names = {"q": "quantized", "b": "bf16", "w": "weight_only"}
    assert step_precisions(precision, 6, range(1, 3)) == [names[letter] for letter in expected]


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        ({"middle": "bf16"}, "no part middle; possible: window, first, last, rest"),
        ({"window": ("bf16", 2)}, "precision\\['window'\\] is the name"),
        ({"first": "bf16"}, "number of steps"),
        ({"first": ("bf16", 0)}, "number of steps"),
    ],
    ids=str,
)
def test_wrong_parts_are_refused(precision, words):
    with pytest.raises(ConfigError, match=words):
        step_precisions(precision, 6, range(1, 3))


def params_of(precision, **more):
    solver = FlowSDE(window=(1, 3))
    return DiffusionParams(steps=4, solver=solver, precision=precision, want=["latents"], init_seed=1, **SIZE, **more)


@pytest.mark.parametrize("quant", ["fp8", "nvfp4"])
def test_every_step_is_computed_in_its_precision(quant, open_engine, make_embeds):
    """A step's mean follows from its own latent: step by step it equals that of an engine in that precision."""
    engine = open_engine("flux", quant=quant, dual="bf16")
    embeds = make_embeds("flux")
    (mixed,) = engine.generate(embeds, params_of({"window": "bf16", "last": ("weight_only", 1), "rest": quant}))
    assert mixed.precisions == ["quantized", "bf16", "bf16", "weight_only"]

    def velocity(step, precision):
        family = engine.rollouts.family
        inputs = family.inputs(
            mixed.latent(step)[None].bfloat16(),
            mixed.timesteps[step : step + 1],
            [mixed.embeds],
            mixed.size,
            mixed.params.guidance_scale,
        )
        with torch.no_grad(), engine.rollouts.first.switch.at(precision):
            return engine.transformer(**inputs, return_dict=False)[0][0].float()

    for step, used in [(0, "quantized"), (3, "weight_only")]:  # the steps of the ODE
        dt = float(mixed.sigmas[step + 1] - mixed.sigmas[step])
        for precision in ("quantized", "weight_only", "bf16"):
            euler = mixed.latent(step) + dt * velocity(step, precision)
            assert torch.allclose(euler, mixed.latent(step + 1), rtol=0, atol=1e-6) == (precision == used)


def test_the_bf16_window_of_a_quantized_rollout_has_exact_logprobs(open_engine, make_embeds):
    """From the same latents BF16 weights give the same means: the trainer's log-probs are the engine's."""
    engine, plain = open_engine("flux", quant="nvfp4", dual="bf16"), open_engine("flux")
    params = params_of({"window": "bf16"}, latents_dtype="float32")
    (sample,) = engine.generate(make_embeds("flux"), params)
    family = plain.rollouts.family
    for place, i in enumerate(sample.window):
        inputs = family.inputs(
            sample.latent(i)[None].bfloat16(), sample.timesteps[i : i + 1], [sample.embeds], sample.size, 3.5
        )
        with torch.no_grad():
            theirs, ours = plain.transformer(**inputs)[0], engine.transformer(**inputs)[0]
        assert not torch.equal(theirs, ours)
        with engine.rollouts.first.switch.at("bf16"), torch.no_grad():
            assert torch.equal(engine.transformer(**inputs)[0], theirs)
        assert sample.stds[place] > 0


@pytest.mark.parametrize(
    ("config", "precision", "words"),
    [
        ({"quant": "fp8"}, "bf16", "possible: quantized, fp8, weight_only; for 'bf16' open the engine with .*dual"),
        ({"quant": "fp8"}, "nvfp4", "'nvfp4' is not to be had"),
        ({"quant": "nvfp4", "dual": "bf16"}, "fp16", "possible: quantized, nvfp4, weight_only, bf16$"),
        ({}, "weight_only", "possible: quantized, bf16$"),
    ],
    ids=str,
)
def test_precisions_that_are_not_to_be_had(config, precision, words, open_engine, make_embeds):
    engine = open_engine("flux", **config)
    for asked in (precision, {"rest": precision}):
        with pytest.raises(ConfigError, match=words):
            engine.generate(make_embeds("flux"), params_of(asked))


def test_an_unquantized_engine_computes_in_bf16_by_that_name(open_engine, make_embeds):
    engine = open_engine("flux")
    named, unnamed = (engine.generate(make_embeds("flux"), params_of(name))[0] for name in ("bf16", None))
    assert named.precisions == unnamed.precisions == ["quantized"] * 4


DATA = Path(__file__).parents[3] / "data" / "dit"


@pytest.fixture
def two_quants(pipeline_folder, tmp_path):
    """`two_quants("bf16", "fp8")`: a Wan pipeline, its transformers stored so: high noise, low noise."""

    def make(*forms):
        folder = tmp_path / "wan"
        shutil.copytree(pipeline_folder("wan", experts=True, boundary_ratio=0.8), folder)
        for name, form in zip(("transformer", "transformer_2"), forms, strict=True):
            shutil.rmtree(folder / name)
            shutil.copytree(DATA / f"wan-{form}" / "transformer", folder / name)
        return folder

    return make


WAN_PARAMS = {"steps": 4, "height": 32, "width": 32, "init_seed": 1}


@pytest.fixture
def wan_embeds():
    return Embeds(torch.randn(5, 128, generator=torch.Generator().manual_seed(3)))


@pytest.mark.parametrize("forms", [("bf16", "fp8"), ("fp8", "bf16")], ids="-".join)
def test_bf16_of_a_pipeline_that_is_quantized_by_half(forms, two_quants, open_engine, wan_embeds):
    """Each transformer has its own plan: what is one's own format is the other's copy."""
    folder = two_quants(*forms)
    engine, plain = open_engine(folder, dual="bf16"), open_engine(folder, quant="bf16")
    params = DiffusionParams(precision="bf16", **WAN_PARAMS)
    (sample,), (expected,) = (one.generate(wan_embeds, params) for one in (engine, plain))
    assert torch.equal(sample.latents, expected.latents)
    assert set(sample.precisions) == {"quantized", "bf16"}
    quantized = engine.generate(wan_embeds, DiffusionParams(**WAN_PARAMS))[0]
    assert not torch.equal(quantized.latents, expected.latents)


@pytest.mark.parametrize(
    ("forms", "name", "words"),
    [
        (("bf16", "fp8"), "bf16", "transformer_2.*possible: quantized, fp8, weight_only; .*dual"),
        (("bf16", "fp8"), "fp8", "'fp8' is not to be had of transformer; possible: quantized, bf16"),
        (("fp8", "nvfp4"), "nvfp4", "of transformer; possible: quantized, fp8, weight_only"),
        (("fp8", "nvfp4"), "fp8", "transformer_2; possible: quantized, nvfp4, weight_only"),
    ],
    ids=str,
)
def test_a_format_of_one_transformer_only(forms, name, words, two_quants, open_engine, wan_embeds):
    engine = open_engine(two_quants(*forms))
    with pytest.raises(ConfigError, match=words):
        engine.generate(wan_embeds, DiffusionParams(precision=name, **WAN_PARAMS))


def test_the_default_format_is_no_name_for_layers_in_another(open_engine, make_embeds):
    """quant="bf16" with some layers in FP8: "bf16" is not what is computed."""
    quant = QuantSpec(quant="bf16", layers={"transformer_blocks.0.*": "fp8"})
    engine = open_engine("flux", quant=quant, keep=["*norm*"])
    with pytest.raises(ConfigError, match="possible: quantized, fp8, weight_only"):
        engine.generate(make_embeds("flux"), params_of("bf16"))
    dual = open_engine("flux", quant=quant, keep=["*norm*"], dual="bf16")
    (sample,) = dual.generate(make_embeds("flux"), params_of("bf16", step_seed=1))
    (plain,) = open_engine("flux").generate(make_embeds("flux"), params_of(None, step_seed=1))
    assert torch.equal(sample.latents, plain.latents)


# weight_only, kernel by kernel


@pytest.mark.parametrize("activation", ["per_token", "per_tensor"])
def test_weight_only_through_scaled_mm(activation, open_engine, make_embeds):
    """Its weights are those of the exact kernel: results differ by BF16 roundings only."""
    asked = params_of("weight_only", step_seed=1)
    settings = {"quant": "fp8", "activation": activation}
    served, exact = (open_engine("flux", linear_kernel=name, **settings) for name in ("torch_fp8", "exact"))
    (ours,), (theirs,) = (one.generate(make_embeds("flux"), asked) for one in (served, exact))
    (quantized,) = served.generate(make_embeds("flux"), params_of(None, step_seed=1))
    close = (ours.latents - theirs.latents).abs().mean()
    assert 0 < close < (ours.latents - quantized.latents).abs().mean() / 2


def test_a_kernel_that_cannot_is_refused_before_anything_runs(open_engine, make_embeds, monkeypatch):
    monkeypatch.setattr(ExactKernel, "unsupported", staticmethod(quantizes_only))
    engine = open_engine("flux", quant="fp8")
    monkeypatch.setattr(engine.transformer, "forward", lambda *_, **__: pytest.fail("computed before the error"))
    with pytest.raises(ConfigError, match="possible: quantized, fp8.*weight_only: .*exact: quantizes activations"):
        engine.generate(make_embeds("flux"), params_of({"window": "fp8", "rest": "weight_only"}))


def quantizes_only(scheme, shape, dtype, capability):
    return "quantizes activations" if scheme.activation == "none" else None
