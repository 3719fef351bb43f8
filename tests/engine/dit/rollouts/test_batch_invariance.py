"""A sample is the same, bit for bit, alone and in company, and again in a replay."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollmill.engine import DanceSDE, DiffusionParams, FlowCPS, FlowSDE

FAMILIES = ["flux", "flux2", "qwen", "sd3", "wan"]
SIZE = {"height": 32, "width": 48}
STEPS = {"steps": 3, "want": ["latents", "means", "logprobs"], **SIZE}
NUM_FRAMES = {"wan": 5}
SOLVER = {"flux": FlowSDE(), "flux2": DanceSDE(), "qwen": FlowCPS(), "sd3": FlowSDE(window=(1, 2)), "wan": DanceSDE()}
MODES = [
    ("bf16", None, "bfloat16"),
    ("fp8", "per_token", "bfloat16"),
    ("fp8", "per_tensor", "bfloat16"),
    ("fp8_channel", "per_token", "bfloat16"),
    ("nvfp4", "per_token", "bfloat16"),
    ("nvfp4", "per_tensor", "bfloat16"),
    ("nvfp4_w4a16", None, "bfloat16"),
    ("bf16", None, "float32"),
    ("fp8", "per_tensor", "float32"),
    ("fp8", "per_token", "float32"),
    ("nvfp4", "per_token", "float32"),
]
MODE_IDS = ["-".join(part for part in mode if part) for mode in MODES]


@pytest.fixture
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


@pytest.fixture
def static_fp8_folder(transformer_folder, tmp_path):
    """ModelOpt's FP8 of the linears in attentions and feed-forwards, with a scale for their inputs."""

    def make(name):
        folder = transformer_folder(name)
        tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
        kept = []
        for key in [key for key in tensors if key.endswith(".weight") and tensors[key].ndim == 2]:
            module = key.removesuffix(".weight")
            if not re.search(r"\.(attn|ff|ffn|img_mlp)", module):
                kept.append(module)
                continue
            scale = tensors[key].float().abs().max() / 448
            tensors[key] = (tensors[key] / scale).to(torch.float8_e4m3fn)
            tensors |= {f"{module}.weight_scale": scale, f"{module}.input_scale": torch.tensor(6 / 448)}
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": kept}
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
        return tmp_path

    return make


def params_of(name, **more):
    cfg = {"true_cfg_scale": 3.0} if name in ("qwen", "wan") else {}
    return DiffusionParams(solver=SOLVER[name], num_frames=NUM_FRAMES.get(name, 1), **STEPS, **cfg, **more)


def same(left, right):
    """Bit for bit: latents at every point, means, log-probs."""
    for field in ("latents", "means", "logprobs", "stds"):
        ours, theirs = getattr(left, field), getattr(right, field)
        assert torch.equal(ours, theirs), (field, (ours.float() - theirs.float()).abs().max())
    assert left.latents.isfinite().all()


def check_alone_and_among_7(engine, name, make_embeds):
    """Batches of 7 of one prompt and of two, beside another prompt of another length; then every sample alone."""
    embeds = [make_embeds(name, 6, seed, negative=True) for seed in range(2)]
    embeds.append(make_embeds(name, 9, 2, negative=True))
    together = engine.generate(embeds, params_of(name, n=4, init_seed=3, step_seed=4))
    assert len(together) == 12
    for place in (0, 3, 5, 11):
        (alone,) = engine.generate(embeds[place // 4], params_of(name, init_seed=3 + place, step_seed=4 + place))
        same(alone, together[place])
    return together


@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_alone_and_in_a_batch_of_7(name, mode, open_engine, make_embeds):
    quant, activation, dtype = mode
    engine = open_engine(name, quant=quant, activation=activation, dtype=dtype, max_denoise_batch=7)
    check_alone_and_among_7(engine, name, make_embeds)


@pytest.mark.parametrize("name", FAMILIES)
def test_static_activation_scales(name, static_fp8_folder, open_engine, make_embeds):
    engine = open_engine(static_fp8_folder(name), max_denoise_batch=7)
    assert engine.info()["activation"] == ["static"]
    check_alone_and_among_7(engine, name, make_embeds)


@pytest.mark.parametrize("threads", [2, 3], indirect=True)
@pytest.mark.parametrize("quant", ["bf16", "nvfp4"])
@pytest.mark.parametrize("name", FAMILIES)
def test_more_threads(name, quant, threads, open_engine, make_embeds):
    """Of samples large enough for torch to split them over threads: shares fall anywhere, and must not matter."""
    engine = open_engine(name, quant=quant, dtype="float32")
    size = 128 if name == "sd3" else 208
    params = {**STEPS, "steps": 2, "height": size, "width": size, "solver": SOLVER["flux"]}
    embeds = make_embeds(name, 13)
    together = engine.generate(embeds, DiffusionParams(n=4, init_seed=1, step_seed=1, **params))
    (alone,) = engine.generate(embeds, DiffusionParams(init_seed=3, step_seed=3, **params))
    same(alone, together[2])


@pytest.mark.parametrize("max_denoise_batch", [1, 3, 16])
@pytest.mark.parametrize("quant", ["bf16", "fp8", "nvfp4"])
@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_a_replay_gives_the_same_sample(name, quant, max_denoise_batch, open_engine, make_embeds):
    """In the precision that it was sampled in, by another engine, in other batches, in another order."""
    engine = open_engine(name, quant=quant, max_denoise_batch=7, seed=5)
    embeds = [make_embeds(name, 6, seed, negative=True) for seed in range(2)]
    samples = engine.generate(embeds, params_of(name, n=4))
    for again, sample in zip(engine.replay(samples), samples, strict=True):
        same(again, sample)
        assert again.prompt_index == sample.prompt_index
    other = open_engine(name, quant=quant, max_denoise_batch=max_denoise_batch)
    for again, sample in zip(other.replay(samples[::-1], precision=quant), samples[::-1], strict=True):
        same(again, sample)


def test_a_replay_in_bf16_is_the_bf16_engines_sample(open_engine, make_embeds):
    quantized = open_engine("flux", quant="nvfp4", dual="bf16")
    samples = quantized.generate(make_embeds("flux"), params_of("flux", n=3))
    expected = open_engine("flux").replay(samples)
    for ours, theirs, sample in zip(quantized.replay(samples, precision="bf16"), expected, samples, strict=True):
        same(ours, theirs)
        assert ours.precisions == ["bf16"] * 3
        assert torch.equal(ours.latent(0), sample.latent(0))
        assert not torch.equal(ours.latent(3), sample.latent(3))


def test_a_replay_after_a_swap_is_of_the_new_weights(open_engine, transformer_folder, make_embeds):
    engine = open_engine("flux", quant="fp8")
    samples = engine.generate(make_embeds("flux"), params_of("flux"))
    engine.update_weights(transformer_folder("flux", seed=1), version="1")
    (again,) = engine.replay(samples)
    (expected,) = open_engine(transformer_folder("flux", seed=1), quant="fp8").replay(samples)
    same(again, expected)
    assert (samples[0].weight_version, again.weight_version) == ("initial", "1")
    assert not torch.equal(again.latent(3), samples[0].latent(3))
