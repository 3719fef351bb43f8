"""From text to pixels through real encoders and VAEs, tiny ones, against diffusers' pipelines."""

from __future__ import annotations

import inspect

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.pipelines.wan.pipeline_wan import WanPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from rollmill.engine import DiffusionParams, FlowSDE

WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", "a", "small", "red", "blue", "cat", "house", "blurry"]
SIZE = {"height": 32, "width": 48}
T5 = {"vocab_size": 16, "d_model": 48, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}
CLIP = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VAE = {
    "latent_channels": 4,
    "block_out_channels": (16, 16, 16, 16),
    "norm_num_groups": 8,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.36,
    "shift_factor": 0.12,
}
WAN_VAE = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}


@pytest.fixture(scope="session")
def tokenizer():
    def make(length):
        words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
        return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=length, **special)

    return make


@pytest.fixture(scope="session")
def flux_folder(tokenizer, random_model, tmp_path_factory):
    torch.manual_seed(0)
    clip = CLIPTextConfig(**CLIP, max_position_embeddings=12, eos_token_id=2, bos_token_id=1, pad_token_id=0)
    return save(
        tmp_path_factory.mktemp("flux"),
        FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=AutoencoderKL(**VAE),
            text_encoder=CLIPTextModel(clip),
            tokenizer=tokenizer(12),
            text_encoder_2=T5EncoderModel(T5Config(**T5)),
            tokenizer_2=tokenizer(512),
            transformer=random_model("flux"),
        ),
    )


@pytest.fixture(scope="session")
def wan_folder(tokenizer, random_model, tmp_path_factory):
    torch.manual_seed(0)
    return save(
        tmp_path_factory.mktemp("wan"),
        WanPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=AutoencoderKLWan(**WAN_VAE),
            text_encoder=UMT5EncoderModel(UMT5Config(**T5)),
            tokenizer=tokenizer(512),
            transformer=random_model("wan"),
        ),
    )


def save(folder, pipeline):
    pipeline.save_pretrained(folder)
    return folder


def pixels_of(folder, prompts, seeds, **options):
    """uint8 of diffusers' pipeline in float32, a prompt a seed."""
    pipeline = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for prompt, seed in zip(prompts, seeds, strict=True):
        generator = torch.Generator().manual_seed(seed)
        out = pipeline(prompt, generator=generator, output_type="np", num_inference_steps=3, **SIZE, **options)
        image = out[0][0] if isinstance(out, tuple) else (out.images if hasattr(out, "images") else out.frames)[0]
        images.append(torch.from_numpy(image * 255).round().to(torch.uint8))
    return images


PROMPTS = ["a small red cat", "a blue house"]
FLUX = {"steps": 3, "want": ["image", "latents"], **SIZE}


def assert_same_pixels(ours, theirs):
    assert ours.shape == theirs.shape
    assert ours.dtype == torch.uint8
    assert (ours.int() - theirs.int()).abs().max() <= 1  # a float32 that lay on the border between two
    assert ours.float().std() > 1


def test_flux_images(flux_folder, open_engine):
    engine = open_engine(flux_folder, dtype="float32")
    samples = engine.generate(PROMPTS, DiffusionParams(init_seed=5, **FLUX))
    expected = pixels_of(flux_folder, PROMPTS, [5, 6], guidance_scale=3.5)
    for sample, theirs in zip(samples, expected, strict=True):
        assert sample.image.shape == (32, 48, 3)
        assert_same_pixels(sample.image, theirs)
    assert samples[0].embeds.prompt.shape == (512, 48)
    assert samples[0].embeds.pooled.shape == (32,)


def test_flux_images_with_a_negative_prompt(flux_folder, open_engine):
    engine = open_engine(flux_folder, dtype="float32")
    params = DiffusionParams(init_seed=5, true_cfg_scale=3.0, negative_prompt="blurry", guidance_scale=1.0, **FLUX)
    (sample,) = engine.generate("a small red cat", params)
    options = {"guidance_scale": 1.0, "true_cfg_scale": 3.0, "negative_prompt": "blurry"}
    assert_same_pixels(sample.image, pixels_of(flux_folder, PROMPTS[:1], [5], **options)[0])


def test_wan_videos(wan_folder, open_engine):
    engine = open_engine(wan_folder, dtype="float32")
    params = DiffusionParams(init_seed=5, num_frames=5, true_cfg_scale=4.0, negative_prompt="blurry", **FLUX)
    (sample,) = engine.generate("a blue house", params)
    assert sample.image.shape == (5, 32, 48, 3)
    options = {"num_frames": 5, "guidance_scale": 4.0, "negative_prompt": "blurry"}
    assert_same_pixels(sample.image, pixels_of(wan_folder, PROMPTS[1:], [5], **options)[0])


class StopAsking(Exception):
    """What was asked is known."""


PIPELINES = {
    "flux": "FluxPipeline",
    "flux2": "Flux2Pipeline",
    "klein": "Flux2KleinPipeline",
    "qwen": "QwenImagePipeline",
    "sd3": "StableDiffusion3Pipeline",
    "wan": "WanPipeline",
}


@pytest.mark.parametrize("name", PIPELINES)
def test_text_is_as_long_as_in_the_pipelines_call(name, open_engine):
    """Some `encode_prompt` have another default than the call that every user knows."""
    kind = getattr(diffusers, PIPELINES[name])
    asked = {}

    class Encoders:
        def encode_prompt(self, **options):
            asked.update(options)
            raise StopAsking

    family = open_engine(name).rollouts.family
    with pytest.raises(StopAsking):
        family.encode(Encoders(), "a cat")
    default = inspect.signature(kind.encode_prompt).parameters["max_sequence_length"].default
    length = asked.get("max_sequence_length", default)
    assert length == inspect.signature(kind.__call__).parameters["max_sequence_length"].default
    assert asked["prompt"] == ["a cat"]


def test_the_empty_prompt_is_the_default_negative(flux_folder, open_engine):
    engine = open_engine(flux_folder, dtype="float32")
    params = {"init_seed": 5, "true_cfg_scale": 3.0, **FLUX}
    left, right = (
        engine.generate("a cat", DiffusionParams(**params, **more))[0] for more in ({}, {"negative_prompt": ""})
    )
    assert torch.equal(left.latents, right.latents)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_images_and_embeds_depend_on_no_company(dtype, flux_folder, open_engine):
    engine = open_engine(flux_folder, dtype=dtype, quant="fp8")
    together = engine.generate([*PROMPTS, "a"], DiffusionParams(n=2, init_seed=1, **FLUX))
    for place in (0, 3):
        (alone,) = engine.generate(PROMPTS[place // 2], DiffusionParams(init_seed=1 + place, **FLUX))
        assert torch.equal(alone.embeds.prompt, together[place].embeds.prompt)
        assert torch.equal(alone.latents, together[place].latents)
        assert torch.equal(alone.image, together[place].image)


@pytest.mark.parametrize(
    ("want", "points"), [(["image"], (3,)), (["image", "latents:window", "logprobs"], (0, 1))], ids=["alone", "window"]
)
def test_the_image_is_that_of_the_last_latent_whatever_else_is_wanted(want, points, flux_folder, open_engine):
    engine = open_engine(flux_folder)
    params = {"init_seed": 1, "step_seed": 1, "solver": FlowSDE(window=(0, 1))}
    (whole,) = engine.generate("a cat", DiffusionParams(**params, **FLUX))
    (some,) = engine.generate("a cat", DiffusionParams(**{**params, **FLUX, "want": want}))
    assert torch.equal(some.image, whole.image)
    assert some.points == points
    assert list(some.params.want) == want
    (again,) = engine.replay([some])
    assert torch.equal(again.image, whole.image)
    assert again.points == points


def test_embeds_of_a_sample_sample_again_without_encoders(flux_folder, open_engine):
    """What a trainer without text encoders keeps."""
    engine = open_engine(flux_folder)
    (sample,) = engine.generate("a cat", DiffusionParams(init_seed=1, **FLUX))
    (again,) = engine.generate(sample.embeds, DiffusionParams(init_seed=1, **FLUX))
    assert torch.equal(again.latents, sample.latents)


def test_encoders_and_vae_are_where_the_engine_computes(flux_folder, open_engine, monkeypatch):
    """The meta device stands for a GPU: the transformer is there, the rest is to follow."""
    engine = open_engine(flux_folder)
    monkeypatch.setattr(engine, "device", torch.device("meta"))
    devices = {
        name: {tensor.device.type for tensor in part.parameters()}
        for name, part in engine.pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }
    assert devices == {"transformer": {"cpu"}} | dict.fromkeys(("vae", "text_encoder", "text_encoder_2"), {"meta"})
