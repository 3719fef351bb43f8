"""Unquantized rollouts under the ODE solver against diffusers' own pipelines, latent by latent.

float32: both sides multiply the same numbers; they add them up in another order (the engine through oneDNN with
weights in BF16 widened, diffusers through torch's float32 GEMM), so after 4 steps latents of size 1 differ by some
1e-6. BF16: every sum is rounded to 8 bits on both sides, 0.4 % apart at the most, and a model has some layers: 2 %.
"""

from __future__ import annotations

import pytest
import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline

from rollmill.engine import DiffusionParams

STEPS, HEIGHT, WIDTH = 4, 32, 48
SEEDS = [11, 12]
SIZE = {"height": HEIGHT, "width": WIDTH}
FLOAT32 = {"rtol": 0, "atol": 2e-5}

# model, what makes its folder, options of the engine, options of the pipeline
CASES = {
    "flux": ("flux", {}, {"guidance_scale": 3.5}, {"guidance_scale": 3.5}),
    "flux-true-cfg": (
        "flux",
        {},
        {"guidance_scale": 2.0, "true_cfg_scale": 2.5},
        {"guidance_scale": 2.0, "true_cfg_scale": 2.5},
    ),
    "flux-static-shift": ("flux", {"scheduler": {"shift": 3.0}}, {}, {"guidance_scale": 3.5}),
    "schnell": ("schnell", {}, {}, {}),
    "flux2": ("flux2", {}, {"guidance_scale": 2.5}, {"guidance_scale": 2.5}),
    "flux2-static-shift": ("flux2", {"scheduler": {"shift": 2.0}}, {}, {"guidance_scale": 4.0}),
    "klein": ("klein", {}, {}, {"guidance_scale": 1.0}),
    "klein-cfg": ("klein", {}, {"true_cfg_scale": 3.0}, {"guidance_scale": 3.0}),
    "qwen": ("qwen", {}, {}, {"true_cfg_scale": 1.0}),
    "qwen-cfg": ("qwen", {}, {"true_cfg_scale": 4.0}, {"true_cfg_scale": 4.0}),
    "sd3": ("sd3", {}, {}, {"guidance_scale": 1.0}),
    "sd3-cfg": ("sd3", {}, {"true_cfg_scale": 4.5}, {"guidance_scale": 4.5}),
    "sd3-dynamic-shift": (
        "sd3",
        {"scheduler": {"use_dynamic_shifting": True}},
        {"true_cfg_scale": 4.5},
        {"guidance_scale": 4.5},
    ),
    "wan": ("wan", {}, {"num_frames": 5}, {"num_frames": 5, "guidance_scale": 1.0}),
    "wan-cfg": ("wan", {}, {"true_cfg_scale": 5.0}, {"num_frames": 1, "guidance_scale": 5.0}),
    "wan-two-experts": (
        "wan",
        {"experts": True, "boundary_ratio": 0.8},
        {"true_cfg_scale": 4.0, "true_cfg_scale_2": 3.0},
        {"num_frames": 1, "guidance_scale": 4.0, "guidance_scale_2": 3.0},
    ),
    "wan-two-experts-one-scale": (
        "wan",
        {"experts": True, "boundary_ratio": 0.8},
        {"true_cfg_scale": 4.0},
        {"num_frames": 1, "guidance_scale": 4.0},
    ),
    "own-sigmas": ("flux", {}, {"sigmas": [1.0, 0.8, 0.5, 0.1]}, {"sigmas": [1.0, 0.8, 0.5, 0.1]}),
    "sd3-own-sigmas": (
        "sd3",
        {},
        {"sigmas": [0.9, 0.8, 0.5, 0.1]},
        {"sigmas": [0.9, 0.8, 0.5, 0.1], "guidance_scale": 1.0},
    ),
}


def open_pipeline(folder, dtype):
    index = DiffusionPipeline.load_config(folder)
    absent = {part: None for part, entry in index.items() if isinstance(entry, list) and entry[0] is None}
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def run_pipeline(pipeline, embeds, seeds, **options):
    """[len(seeds), steps, *latent shape]: the latents after every step, noise from a CPU generator a sample."""
    latents = []

    def keep(_pipe, _step, _time, tensors):
        latents.append(tensors["latents"])
        return {}

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    pipeline(
        **_embed_options(embeds, len(seeds), pipeline.transformer.dtype),
        generator=generators,
        output_type="latent",
        callback_on_step_end=keep,
        **options,
    )
    return torch.stack(latents, 1)


def _embed_options(embeds, count, dtype):
    options = {}
    for one, prefix in ((embeds, ""), (embeds.negative, "negative_")):
        if one is None:
            continue
        options[f"{prefix}prompt_embeds"] = one.prompt.to(dtype).expand(count, -1, -1)
        if one.pooled is not None:
            options[f"{prefix}pooled_prompt_embeds"] = one.pooled.to(dtype).expand(count, -1)
        if one.mask is not None:
            options[f"{prefix}prompt_embeds_mask"] = one.mask.expand(count, -1)
    return options


@pytest.fixture
def both(pipeline_folder, open_engine, make_embeds):
    """(samples of the engine, latents after every step of diffusers' pipeline) of a case, in a dtype."""

    def run(case, dtype="float32", **more):
        name, folder_options, ours, theirs = CASES[case]
        folder = pipeline_folder(name, **folder_options)
        engine = open_engine(folder, dtype=dtype)
        params = DiffusionParams(steps=STEPS, n=len(SEEDS), init_seed=SEEDS[0], want=["latents"], **SIZE, **ours)
        embeds = make_embeds(name, negative=params.wants_cfg)
        samples = engine.generate(embeds, params)
        if dtype != "float32":  # pipelines draw BF16 noise otherwise: hand them ours
            noise = torch.stack([sample.latents[0] for sample in samples])
            more["latents"] = noise if name != "flux2" else noise.mT.unflatten(2, (HEIGHT // 16, WIDTH // 16))
        pipeline = open_pipeline(folder, getattr(torch, dtype))
        return samples, run_pipeline(pipeline, embeds, SEEDS, num_inference_steps=STEPS, **SIZE, **theirs, **more)

    return run


@pytest.mark.parametrize("case", CASES)
def test_float32_latents_equal_the_pipelines(case, both):
    samples, expected = both(case)
    for sample, theirs in zip(samples, expected, strict=True):
        torch.testing.assert_close(sample.latents[1:], theirs, **FLOAT32)
    assert (samples[0].latents[-1] - samples[1].latents[-1]).abs().max() > 0.1


@pytest.mark.parametrize("case", ["flux", "flux2", "qwen-cfg", "sd3-cfg", "wan-cfg", "wan-two-experts"])
def test_bf16_latents_equal_the_pipelines_within_bf16(case, both):
    """Guidance needs the pipelines' own roundings: 3.5 * 1000 is 3504 in BF16, which moves FLUX's latents by 16 %."""
    samples, expected = both(case, "bfloat16")
    assert distance(torch.stack([sample.latents[1:] for sample in samples]), expected) < 0.02


def distance(left, right):
    return float((left.float() - right.float()).norm() / right.float().norm())


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen", "sd3", "wan"])
def test_parameters_are_served_in_diffusers_dtypes(name, transformer_folder, open_engine):
    """Some modules of Wan stay in float32 in a BF16 model."""
    folder = transformer_folder(name)
    ours = open_engine(folder).transformer
    theirs = type(ours).from_pretrained(folder, torch_dtype=torch.bfloat16)
    expected = {path: tensor.dtype for path, tensor in theirs.state_dict().items()}
    for path, dtype in expected.items():
        module, _, leaf = path.rpartition(".")
        assert getattr(ours.get_submodule(module), leaf).dtype == dtype, path
    assert (torch.float32 in expected.values()) == (name == "wan")
    assert ours.dtype == theirs.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen", "sd3", "wan"])
def test_one_bf16_forward_equals_diffusers(name, transformer_folder, open_engine, make_embeds):
    """The same inputs, timestep and guidance formed as the pipelines form them: only sums in other orders differ."""
    folder = transformer_folder(name)
    engine = open_engine(folder)
    theirs = type(engine.transformer).from_pretrained(folder, torch_dtype=torch.bfloat16)
    (sample,) = engine.generate(make_embeds(name), DiffusionParams(steps=2, want=["latents"], init_seed=1, **SIZE))
    family, now = engine.rollouts.family, sample.timesteps[1:]
    inputs = family.inputs(
        sample.latents[1:2].bfloat16(), now, [sample.embeds], sample.size, sample.params.guidance_scale
    )
    with torch.no_grad():
        ours, expected = (model(**inputs, return_dict=False)[0].float() for model in (engine.transformer, theirs))
    assert distance(ours, expected) < 2**-8


@pytest.mark.parametrize("name", ["flux", "schnell", "qwen", "sd3", "wan"])
def test_a_transformer_alone_gets_the_schedule_of_its_model(
    name, transformer_folder, pipeline_folder, open_engine, make_embeds
):
    """These pipelines' schedulers are those that the models were published with."""
    alone, whole = (open_engine(make(name)) for make in (transformer_folder, pipeline_folder))
    ours, theirs = (
        engine.generate(make_embeds(name), DiffusionParams(steps=4, **SIZE))[0] for engine in (alone, whole)
    )
    assert torch.equal(ours.sigmas, theirs.sigmas)
    assert torch.equal(ours.timesteps, theirs.timesteps)


def recorded(module):
    """The keywords of every forward of a transformer."""
    calls = []
    module.register_forward_pre_hook(lambda _module, _args, options: calls.append(options), with_kwargs=True)
    return calls


@pytest.mark.parametrize("case", ["flux", "schnell", "flux2", "klein", "qwen", "sd3", "wan"])
def test_the_transformer_is_called_with_what_the_pipeline_calls_it_with(
    case, pipeline_folder, open_engine, make_embeds
):
    """Every tensor in value and dtype, timestep and guidance in their roundings, over the steps of a BF16 rollout."""
    name, folder_options, ours, theirs = CASES[case]
    folder = pipeline_folder(name, **folder_options)
    engine, pipeline, embeds = open_engine(folder), open_pipeline(folder, torch.bfloat16), make_embeds(name)
    calls, expected = recorded(engine.transformer), recorded(pipeline.transformer)
    engine.generate(embeds, DiffusionParams(steps=9, init_seed=1, **SIZE, **ours))
    run_pipeline(pipeline, embeds, [1], num_inference_steps=9, **SIZE, **theirs)
    assert len(calls) == len(expected) == 9
    for one, other in zip(calls, expected, strict=True):
        for key in set(other) - {"hidden_states", "return_dict", "joint_attention_kwargs", "attention_kwargs"}:
            if not isinstance(other[key], torch.Tensor):
                assert one[key] == other[key], key
                continue
            assert one[key].dtype == other[key].dtype, key
            assert torch.equal(one[key], other[key]), key
        assert one["hidden_states"].dtype == other["hidden_states"].dtype
        assert one["hidden_states"].shape == other["hidden_states"].shape
