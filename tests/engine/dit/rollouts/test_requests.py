"""What a call may ask for, what comes back, and what is refused before anything is computed."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import msgspec
import pytest
import torch
from msgspec.structs import replace

from rollmill.engine import (
    ConfigError,
    DanceSDE,
    DiffusionParams,
    Embeds,
    FlowSDE,
    ModelError,
    RequestError,
    UnsupportedError,
)

SIZE = {"height": 32, "width": 32}


def params_of(**more):
    return DiffusionParams(**{"steps": 4, "solver": FlowSDE(window=(1, 3)), **SIZE, **more})


@pytest.fixture
def engine(open_engine):
    return open_engine("flux")


@pytest.fixture
def never_computes(monkeypatch):
    """`never_computes(engine)`: fails the test if a transformer is called."""

    def guard(engine):
        def fail(*_args, **_kwargs):
            raise AssertionError("computed before the error")

        monkeypatch.setattr(engine.transformer, "forward", fail)
        return engine

    return guard


# what comes back


@pytest.mark.parametrize(
    ("want", "points"),
    [
        (["latents"], (0, 1, 2, 3, 4)),
        (["latents:window"], (1, 2, 3)),
        (["latents:window", "latents:final"], (1, 2, 3, 4)),
        (["latents:final"], (4,)),
        (["logprobs"], (4,)),
        ([], (4,)),
    ],
    ids=str,
)
def test_wanted_latents(want, points, engine, make_embeds):
    whole, some = (
        engine.generate(make_embeds("flux"), params_of(want=wanted, init_seed=1, step_seed=2))[0]
        for wanted in (["latents"], want)
    )
    assert some.points == points
    assert some.latents.shape == (len(points), 4, 16)
    for point in points:
        assert torch.equal(some.latent(point), whole.latents[point])
    if 0 not in points:
        with pytest.raises(RequestError, match="not kept"):
            some.latent(0)


def test_logprobs_and_means_come_when_wanted(engine, make_embeds):
    (sample,) = engine.generate(make_embeds("flux"), params_of(want=["means"]))
    assert sample.logprobs is None
    assert sample.means.shape == (2, 4, 16)
    (sample,) = engine.generate(make_embeds("flux"), params_of(want=["logprobs"]))
    assert sample.means is None
    assert sample.logprobs.shape == sample.stds.shape == (2,)
    (sample,) = engine.generate(make_embeds("flux"), DiffusionParams(steps=2, want=["means", "logprobs"], **SIZE))
    assert sample.means is None
    assert sample.logprobs is None
    assert len(sample.window) == len(sample.stds) == 0


def test_a_sample_says_how_it_came_about(engine, make_embeds):
    embeds = [make_embeds("flux", seed=seed) for seed in range(2)]
    samples = engine.generate(embeds, DiffusionParams(steps=3, n=2, height=32))
    assert [sample.prompt_index for sample in samples] == [0, 0, 1, 1]
    for sample in samples:
        assert (sample.params.height, sample.params.width, sample.params.guidance_scale) == (32, 1024, 3.5)
        assert (sample.size.height, sample.size.width) == (32, 1024)
        assert sample.sigmas.dtype == sample.timesteps.dtype == torch.float32
        torch.testing.assert_close(sample.timesteps, 1000 * sample.sigmas[:-1])
        assert sample.weight_version == engine.weight_version == "initial"
        assert sample.precisions == ["quantized"] * 3
    assert samples[0].embeds is samples[1].embeds
    assert samples[0].embeds is not samples[2].embeds


@pytest.mark.parametrize("held", ["float32", "bfloat16"])
def test_latents_are_held_and_returned_in_one_dtype(held, engine, make_embeds):
    (sample,) = engine.generate(make_embeds("flux"), params_of(want=["latents"], latents_dtype=held))
    assert sample.latents.dtype == getattr(torch, held)
    assert sample.logprobs is None


def test_a_sample_keeps_no_other_memory_alive(engine, make_embeds):
    """Window latents only: no view of a batch's stack, nor of the whole trajectory."""
    samples = engine.generate(make_embeds("flux"), params_of(n=4, want=["latents:window", "logprobs", "means"]))
    for one in range(4):
        assert all(
            tensor.untyped_storage().nbytes() == tensor.nbytes
            for tensor in (samples[one].latents, samples[one].means, samples[one].logprobs, samples[one].stds)
        )
    stored, kept = weakref.ref(samples[0].latents), samples[1]
    samples.clear()
    gc.collect()
    assert stored() is None
    assert kept.latents.shape == (3, 4, 16)


# seeds


def first_latents(samples):
    return [tuple(sample.latents[0].flatten().tolist()) for sample in samples]


def test_seeds_per_sample_and_shared(engine, make_embeds):
    embeds = [make_embeds("flux", seed=seed) for seed in range(2)]
    base = {"n": 3, "want": ["latents"], "init_seed": 10, "step_seed": 50}
    samples = engine.generate(embeds, params_of(**base))
    assert [(sample.seeds.init, sample.seeds.step) for sample in samples] == [(10 + i, 50 + i) for i in range(6)]
    assert len(set(first_latents(samples))) == 6
    shared = engine.generate(embeds, params_of(**base, init_noise="shared"))
    assert [(sample.seeds.init, sample.seeds.step) for sample in shared] == [(10 + i // 3, 50 + i) for i in range(6)]
    assert len(set(first_latents(shared))) == 2
    assert not torch.equal(shared[0].latents[-1], shared[1].latents[-1])
    both = engine.generate(embeds, params_of(**base, init_noise="shared", step_noise="shared"))
    assert torch.equal(both[0].latents, both[2].latents)
    assert not torch.equal(both[0].latents, both[3].latents)


def test_seeds_end_where_torchs_generator_does(engine, make_embeds):
    """Beyond 32 bits they would begin again at the first ones, silently."""
    params = params_of(want=["latents"], init_seed=2**32 - 2, n=3)
    with pytest.raises(RequestError, match="beyond 2"):
        engine.generate(make_embeds("flux"), params)
    assert len(set(first_latents(engine.generate(make_embeds("flux"), replace(params, n=2))))) == 2


def test_calls_without_seeds_differ_and_their_seeds_repeat_them(engine, open_engine, make_embeds):
    embeds = make_embeds("flux")
    params = params_of(want=["latents"], n=2)
    once, twice = engine.generate(embeds, params), engine.generate(embeds, params)
    assert len(set(first_latents([*once, *twice]))) == 4
    assert {sample.seeds.init for sample in once}.isdisjoint(sample.seeds.init for sample in twice)
    again = engine.generate(embeds, replace(params, init_seed=twice[0].seeds.init, step_seed=twice[0].seeds.step))
    assert torch.equal(again[1].latents, twice[1].latents)
    elsewhere = open_engine("flux", seed=1).generate(embeds, params)
    assert len(set(first_latents([*once, *elsewhere]))) == 4
    same = open_engine("flux").generate(embeds, params)
    assert first_latents(same) == first_latents(once)


def test_chosen_seeds_do_not_meet_those_of_calls_without(engine, make_embeds):
    drawn = engine.generate(make_embeds("flux"), params_of(want=["latents"]))
    chosen = engine.generate(make_embeds("flux"), params_of(want=["latents"], init_seed=0, n=8))
    assert len(set(first_latents([*drawn, *chosen]))) == 9


# grids


def test_truncated_timesteps_are_what_dancegrpo_hands_to_the_model(engine, make_embeds):
    """int(sigma * 1000) of float32 sigmas; the sigmas of the steps stay exact."""
    params = {"steps": 7, "solver": DanceSDE(), "want": ["latents"], "init_seed": 1, "step_seed": 1, **SIZE}
    exact, truncated = (
        engine.generate(make_embeds("flux"), DiffusionParams(timesteps=name, **params))[0]
        for name in ("exact", "truncated")
    )
    assert torch.equal(exact.sigmas, truncated.sigmas)
    assert truncated.timesteps.tolist() == [int(sigma * 1000) for sigma in exact.sigmas[:-1]]
    assert not torch.equal(exact.latents[1], truncated.latents[2])


def test_sigmas_of_ones_own(open_engine, make_embeds, pipeline_folder):
    engine = open_engine(pipeline_folder("sd3", scheduler={"shift": 1.0}))
    (sample,) = engine.generate(make_embeds("sd3"), params_of(sigmas=[0.7, 0.5, 0.2, 0.1]))
    torch.testing.assert_close(sample.sigmas, torch.tensor([0.7, 0.5, 0.2, 0.1, 0.0]))


def test_unipc_gives_wan_its_grid(open_engine, make_embeds, pipeline_folder):
    """diffusers' own UniPC lays it; the steps are those of the solver, whose SDE stays finite on it."""
    config = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
    folder = pipeline_folder("wan", scheduler=config, scheduler_class="UniPCMultistepScheduler")
    engine = open_engine(folder)
    (sample,) = engine.generate(make_embeds("wan"), params_of(want=["latents"]))
    scheduler = engine.pipeline.scheduler
    scheduler.set_timesteps(4)
    assert torch.equal(sample.sigmas, scheduler.sigmas.cpu())
    assert torch.equal(sample.timesteps, scheduler.timesteps.float().cpu())
    (noisy,) = engine.generate(make_embeds("wan"), params_of(solver=FlowSDE(noise_level=0.7), want=["logprobs"]))
    assert noisy.stds.max() < 2


@pytest.mark.parametrize(
    ("name", "scheduler", "scheduler_class", "words"),
    [
        ("wan", {}, "UniPCMultistepScheduler", "UniPC.*no grid for flow matching.*use_flow_sigmas"),
        ("flux", {}, "UniPCMultistepScheduler", "UniPC.*use_flow_sigmas"),
        ("wan", {}, "FlowMatchHeunDiscreteScheduler", "Heun.*no falling grid of 4 steps"),
        ("wan", {}, "DDIMScheduler", "DDIM"),
    ],
    ids=["unipc-epsilon", "unipc-sigmas", "heun", "ddim"],
)
def test_grids_that_are_not_of_a_flow(
    name, scheduler, scheduler_class, words, open_engine, pipeline_folder, make_embeds
):
    engine = open_engine(pipeline_folder(name, scheduler=scheduler, scheduler_class=scheduler_class))
    with pytest.raises(ModelError, match=words):
        engine.generate(make_embeds(name), params_of())


# guidance


def test_guidance_reaches_the_model(engine, make_embeds):
    first = [
        engine.generate(make_embeds("flux"), params_of(want=["latents"], init_seed=1, guidance_scale=scale))[0].latents[
            1
        ]
        for scale in (None, 3.5, 1.0)
    ]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_true_cfg_of_1_is_one_forward(open_engine, make_embeds):
    engine = open_engine("sd3")
    calls = []
    engine.transformer.register_forward_hook(lambda *_: calls.append(1))
    embeds = make_embeds("sd3", negative=True)
    plain, one, two = (
        engine.generate(embeds, params_of(want=["latents"], init_seed=1, true_cfg_scale=scale))[0]
        for scale in (None, 1.0, 2.0)
    )
    assert torch.equal(plain.latents[1], one.latents[1])
    assert not torch.equal(plain.latents[1], two.latents[1])
    assert len(calls) == 4 + 4 + 8


def test_a_negative_prompt_may_have_another_length(open_engine, make_embeds):
    engine = open_engine("qwen")
    embeds = replace(make_embeds("qwen", 6), negative=make_embeds("qwen", 3, 9))
    (sample,) = engine.generate(embeds, params_of(true_cfg_scale=4.0, want=["latents"]))
    assert sample.latents.isfinite().all()
    assert sample.embeds.negative.prompt.shape == (3, 48)


def test_a_mask_hides_tokens_of_qwen(open_engine, make_embeds):
    """Padding behind the prompt changes nothing but the last bits; what is not masked counts."""
    engine = open_engine("qwen", dtype="float32")
    short = make_embeds("qwen", 5)
    long = Embeds(torch.cat([short.prompt, torch.randn(3, 48)]))
    masked = replace(long, mask=torch.arange(8) < 5)
    plain, hidden, seen = (
        engine.generate(one, params_of(want=["latents"], init_seed=1, step_seed=1))[0].latents
        for one in (short, masked, long)
    )
    torch.testing.assert_close(hidden, plain, rtol=0, atol=2e-5)
    assert (seen - plain).abs().max() > 1e-2
    together = engine.generate([masked, long, short], params_of(want=["latents"], init_seed=1, step_seed=1))
    assert torch.equal(together[0].latents, hidden)


# refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"want": ["latent"]}, "'latents', 'latents:window'"),
        ({"want": "image"}, "want"),
        ({"steps": 0}, "steps >= 1"),
        ({"n": 0}, "n >= 1"),
        ({"sigmas": [0.9, 0.5]}, "sigmas falling"),
        ({"sigmas": [0.9, 0.5, 0.6, 0.1]}, "sigmas falling"),
        ({"sigmas": [0.9, 0.5, 0.2, 0.0]}, "sigmas falling"),
        ({"init_seed": -1}, "0 <= init_seed < 2"),
        ({"step_seed": 2**32}, "0 <= step_seed < 2"),
        ({"true_cfg_scale": 0.5}, "true_cfg_scale >= 1"),
        ({"true_cfg_scale_2": 3.0}, "true_cfg_scale_2"),
        ({"negative_prompt": "blur"}, "negative_prompt with true_cfg_scale"),
        ({"timesteps": "rounded"}, "'exact', 'truncated'"),
        ({"latents_dtype": "float16"}, "'float32', 'bfloat16'"),
        ({"init_noise": "group"}, "'per_sample', 'shared'"),
        ({"solver": "ode"}, "solver"),
        ({"cfg": 2}, "no field 'cfg'"),
    ],
    ids=str,
)
def test_wrong_parameters(options, words):
    with pytest.raises(ConfigError, match=words):
        params_of(**options)


def wide(embeds, width):
    return replace(embeds, prompt=torch.randn(6, width))


EMBEDS = {
    "width": ("flux", lambda e: wide(e, 32), r"\[num_tokens, 48\].*got float32 \[6, 32\]"),
    "batch-of-one": ("flux", lambda e: replace(e, prompt=e.prompt[None]), r"got float32 \[1, 6, 48\] \(a batch of one"),
    "batch": ("wan", lambda e: replace(e, prompt=e.prompt.expand(2, -1, -1)), r"got float32 \[2, 6, 48\]"),
    "no-tokens": ("flux", lambda e: replace(e, prompt=e.prompt[:0]), r"got float32 \[0, 48\]"),
    "integers": ("flux", lambda e: replace(e, prompt=e.prompt.long()), "got int64"),
    "no-tensor": ("flux", lambda e: replace(e, prompt=[1.0]), "got list"),
    "no-pooled": (
        "flux",
        lambda e: replace(e, pooled=None),
        r"reads a pooled embedding, floating-point \[32\]; got None",
    ),
    "pooled-width": ("sd3", lambda e: replace(e, pooled=torch.randn(16)), r"\[32\]; got float32 \[16\]"),
    "pooled-batch": ("sd3", lambda e: replace(e, pooled=e.pooled[None]), r"got float32 \[1, 32\] \(a batch of one"),
    "needless-pooled": ("wan", lambda e: replace(e, pooled=torch.randn(32)), "reads no pooled"),
    "needless-mask": ("flux2", lambda e: replace(e, mask=torch.ones(6).bool()), "reads no mask"),
    "mask-length": ("qwen", lambda e: replace(e, mask=torch.ones(5).bool()), r"bool \[6\].*got bool \[5\]"),
    "mask-dtype": ("qwen", lambda e: replace(e, mask=torch.ones(6)), "got float32"),
    "mask-of-none": ("qwen", lambda e: replace(e, mask=torch.zeros(6).bool()), "hides every token"),
    "negative": ("qwen", lambda e: replace(e, negative=wide(e, 16)), r"prompt 1, negative: .*got float32 \[6, 16\]"),
    "negative-of-negative": (
        "qwen",
        lambda e: replace(e, negative=replace(e, negative=e)),
        "no negative embeds of their own",
    ),
}


@pytest.mark.parametrize("case", EMBEDS)
def test_embeds_that_the_model_cannot_read(case, open_engine, make_embeds, never_computes):
    name, spoil, words = EMBEDS[case]
    engine, good = never_computes(open_engine(name)), make_embeds(name)
    with pytest.raises(RequestError, match=f"prompt 1.*{words}" if "prompt 1" not in words else words):
        engine.generate([good, spoil(good)], params_of())


REQUESTS = {
    "nothing": ("flux", [], {}, "at least one"),
    "mixed": ("flux", ["a", Embeds(torch.randn(6, 48), torch.randn(32))], {}, "got Embeds, str"),
    "number": ("flux", [3], {}, "got int"),
    "text-without-encoder": ("flux", "a digit", {}, "no text encoder"),
    "image-without-vae": ("flux", None, {"want": ["image"]}, "needs a VAE"),
    "size": ("flux", None, {"height": 40}, "40 x 32.*multiples of 16"),
    "frames-of-an-image": ("flux", None, {"num_frames": 5}, "single images"),
    "frames": ("wan", None, {"num_frames": 4}, r"1 \+ 4k frames"),
    "guidance": ("sd3", None, {"guidance_scale": 4.0}, "not distilled"),
    "guidance-of-schnell": ("schnell", None, {"guidance_scale": 4.0}, "not distilled"),
    "no-negative": ("sd3", None, {"true_cfg_scale": 4.0}, "prompt 0: true_cfg_scale needs"),
    "negative-prompt": ("sd3", None, {"true_cfg_scale": 4.0, "negative_prompt": "blur"}, "for prompts of text"),
    "second-scale": ("sd3", None, {"true_cfg_scale": 4.0, "true_cfg_scale_2": 3.0}, "second transformer"),
}


@pytest.mark.parametrize("case", REQUESTS)
def test_requests_that_cannot_be_served(case, open_engine, make_embeds, never_computes):
    name, prompts, options, words = REQUESTS[case]
    engine = never_computes(open_engine(name))
    with pytest.raises(RequestError, match=words):
        engine.generate(make_embeds(name) if prompts is None else prompts, params_of(**options))


def test_a_pipeline_without_encoders_takes_embeds_only(open_engine, pipeline_folder, make_embeds):
    engine = open_engine(pipeline_folder("flux"))
    assert engine.generate(make_embeds("flux"), params_of())[0].latents.isfinite().all()
    with pytest.raises(RequestError, match="no text encoder"):
        engine.generate("a digit", params_of())
    with pytest.raises(RequestError, match="needs a VAE"):
        engine.generate(make_embeds("flux"), params_of(want=["image"]))


def test_wan_with_a_timestep_a_token_is_not_built(open_engine, pipeline_folder, make_embeds):
    engine = open_engine(pipeline_folder("wan", expand_timesteps=True))
    with pytest.raises(UnsupportedError, match="expand_timesteps"):
        engine.generate(make_embeds("wan"), params_of())


def test_a_boundary_needs_two_transformers(open_engine, pipeline_folder, make_embeds):
    engine = open_engine(pipeline_folder("wan", boundary_ratio=0.8))
    with pytest.raises(ModelError, match="boundary_ratio"):
        engine.generate(make_embeds("wan"), params_of())


# what cannot change, and what no number is


def test_params_keep_nothing_that_the_caller_can_change():
    parts, sigmas, want, window = {"window": "bf16", "first": ["fp8", 1]}, [1.0, 0.5], ["latents"], [0, 1]
    params = DiffusionParams(steps=2, precision=parts, sigmas=sigmas, want=want, solver=FlowSDE(window=window))
    before = copy.deepcopy(params)
    parts["window"] = "fp8"
    parts["first"][0] = "bf16"
    for changed in (sigmas, want, window):
        changed.clear()
    assert params == before
    assert params.precision == {"window": "bf16", "first": ("fp8", 1)}
    assert (params.sigmas, params.want, params.solver.window) == ((1.0, 0.5), ("latents",), (0, 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts.__setitem__("rest", "fp8"),
        lambda parts: parts.update(rest="fp8"),
        lambda parts: parts.pop("rest"),
        lambda parts: parts.setdefault("last", "fp8"),
        lambda parts: parts.clear(),
        lambda parts: parts.__delitem__("rest"),
        lambda parts: parts.__ior__({"rest": "fp8"}),
    ],
    ids=["set", "update", "pop", "setdefault", "clear", "delete", "merge"],
)
def test_parts_of_a_precision_are_frozen(change):
    params = DiffusionParams(precision={"rest": "bf16"})
    with pytest.raises(TypeError, match="frozen"):
        change(params.precision)
    assert params.precision == {"rest": "bf16"}


def test_frozen_params_travel():
    params = DiffusionParams(precision={"rest": "bf16", "first": ("fp8", 2)}, want=["image"])
    assert pickle.loads(pickle.dumps(params)) == params
    assert msgspec.json.decode(msgspec.json.encode(params), type=DiffusionParams) == params


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("name", ["guidance_scale", "true_cfg_scale", "true_cfg_scale_2"])
def test_guidance_is_finite(name, value):
    more = {"true_cfg_scale": 2.0} if name == "true_cfg_scale_2" else {}
    with pytest.raises(ConfigError, match=f"{name}.* finite"):
        DiffusionParams(**{**more, name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("part", ["prompt", "pooled", "negative"])
def test_embeds_are_finite(part, value, engine, make_embeds, never_computes):
    embeds = make_embeds("flux", negative=True)
    tensor = embeds.negative.prompt if part == "negative" else getattr(embeds, part)
    told = "prompt 0, negative.* in prompt" if part == "negative" else f"prompt 0.* in {part}"
    tensor.view(-1)[3] = value
    with pytest.raises(RequestError, match=told):
        never_computes(engine).generate(embeds, params_of())


@pytest.mark.parametrize(
    "settings",
    [
        {"moe_runner": "reference"},
        {"max_batch_size": 8},
        {"max_step_tokens": 512},
        {"kv_cache_tokens": 1024},
        {"prefix_cache": False},
    ],
    ids=str,
)
def test_settings_of_language_models_are_refused(settings, open_engine):
    ((name, value),) = settings.items()
    with pytest.raises(UnsupportedError, match=f"{name}={value!r}\n.*language models"):
        open_engine("flux", **settings)
