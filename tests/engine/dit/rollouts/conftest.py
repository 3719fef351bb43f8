"""Tiny seeded models of the five families in folders, as diffusers saves them, and engines over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from msgspec import Struct

from rollmill.engine import DiffusionEngine, Embeds, Engine, EngineConfig

WIDTH, POOLED = 48, 32  # of the text embeddings
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
JOINT = {**HEADS, "joint_attention_dim": WIDTH, "num_layers": 2}
FLUX = {**JOINT, "in_channels": 16, "num_single_layers": 1, "pooled_projection_dim": POOLED}
FLUX |= {"axes_dims_rope": (4, 6, 6)}
FLUX2 = {**JOINT, "in_channels": 32, "num_single_layers": 1, "timestep_guidance_channels": 32}
FLUX2 |= {"axes_dims_rope": (4, 4, 4, 4)}
QWEN = {**JOINT, "in_channels": 16, "out_channels": 4, "axes_dims_rope": (4, 6, 6)}
SD3 = {**JOINT, "sample_size": 16, "in_channels": 4, "out_channels": 4, "caption_projection_dim": 32}
SD3 |= {"pooled_projection_dim": POOLED, "pos_embed_max_size": 16, "dual_attention_layers": (0,)}
SD3 |= {"qk_norm": "rms_norm"}
WAN = {**HEADS, "in_channels": 16, "out_channels": 16, "text_dim": WIDTH, "freq_dim": 32, "ffn_dim": 64}
WAN |= {"num_layers": 2}


class Tiny(Struct, frozen=True):
    """One model: diffusers' classes, the transformer's config, the scheduler's, and what pipelines call things."""

    transformer: str
    pipeline: str
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    parts: tuple[str, ...]  # the pipeline's other components
    pooled: bool = False
    cfg: str | None = "true_cfg_scale"  # the pipeline's word for true classifier-free guidance


CLIP_T5 = ("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
ONE_ENCODER = ("vae", "text_encoder", "tokenizer")
DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True}
QWEN_GRID = {"use_dynamic_shifting": True, "max_shift": 0.9, "max_image_seq_len": 8192, "shift_terminal": 0.02}
MODELS = {
    "flux": Tiny("FluxTransformer2DModel", "FluxPipeline", {**FLUX, "guidance_embeds": True}, DYNAMIC, CLIP_T5, True),
    "schnell": Tiny("FluxTransformer2DModel", "FluxPipeline", FLUX, {"shift": 1.0}, CLIP_T5, True),
    "flux2": Tiny("Flux2Transformer2DModel", "Flux2Pipeline", FLUX2, DYNAMIC, ONE_ENCODER, cfg=None),
    "klein": Tiny(
        "Flux2Transformer2DModel",
        "Flux2KleinPipeline",
        {**FLUX2, "guidance_embeds": False},
        DYNAMIC,
        ONE_ENCODER,
        cfg="guidance_scale",
    ),
    "qwen": Tiny("QwenImageTransformer2DModel", "QwenImagePipeline", QWEN, QWEN_GRID, ONE_ENCODER),
    "sd3": Tiny(
        "SD3Transformer2DModel",
        "StableDiffusion3Pipeline",
        SD3,
        {"shift": 3.0},
        (*CLIP_T5, "text_encoder_3", "tokenizer_3"),
        True,
        "guidance_scale",
    ),
    "wan": Tiny("WanTransformer3DModel", "WanPipeline", WAN, {"shift": 3.0}, ONE_ENCODER, cfg="guidance_scale"),
}


def random_model(kind: str, config: Mapping[str, Any], seed: int) -> Any:
    """A transformer in BF16 whose every parameter matters, gains around 1."""
    generator = torch.Generator().manual_seed(seed)
    model = getattr(diffusers, kind)(**config).to(torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1 and "table" not in name:
                value /= parameter[0].numel() ** 0.5
            elif parameter.ndim == 1 and name.endswith("weight"):
                value = 1 + value / 8
            else:
                value /= 8
            parameter.copy_(value)
    return model.eval()


def save_transformer(name: str, folder: Path, seed: int = 0) -> Path:
    tiny = MODELS[name]
    random_model(tiny.transformer, tiny.config, seed).save_pretrained(folder)
    return folder


def make_embeds(name: str, num_tokens: int = 6, seed: int = 0, *, negative: bool = False) -> Embeds:
    """Random embeddings of one prompt; `negative` ones of the same length beside it."""
    tiny, generator = MODELS[name], torch.Generator().manual_seed(1000 + seed)
    return Embeds(
        torch.randn(num_tokens, WIDTH, generator=generator),
        torch.randn(POOLED, generator=generator) if tiny.pooled else None,
        negative=make_embeds(name, num_tokens, seed + 500) if negative else None,
    )


FLUX2_VAE = {"latent_channels": 8, "block_out_channels": (16, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 8}
BLOCKS = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


def save_pipeline(
    name: str,
    folder: Path,
    scheduler: Mapping[str, Any] | None = None,
    scheduler_class: str = "FlowMatchEulerDiscreteScheduler",
    *,
    experts: bool = False,
    **options: Any,
) -> Path:
    """A pipeline without encoders and VAE; `experts`: with a second transformer."""
    tiny = MODELS[name]
    parts: dict[str, Any] = dict.fromkeys(tiny.parts)
    if tiny.transformer.startswith("Flux2"):  # the pipelines unnormalize by its statistics, whatever the output
        parts["vae"] = AutoencoderKLFlux2(**FLUX2_VAE, **BLOCKS)
    if experts:
        parts["transformer_2"] = random_model(tiny.transformer, tiny.config, 1)
    grid = getattr(diffusers, scheduler_class)(**(tiny.scheduler if scheduler is None else scheduler))
    model = random_model(tiny.transformer, tiny.config, 0)
    pipeline = getattr(diffusers, tiny.pipeline)(transformer=model, scheduler=grid, **parts, **options)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def transformer_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`transformer_folder("flux", seed=0)`: a BF16 transformer folder; see models.py."""
    root = tmp_path_factory.mktemp("transformers")

    def make(name: str, seed: int = 0) -> Path:
        folder = root / f"{name}-{seed}"
        return folder if folder.exists() else save_transformer(name, folder, seed)

    return make


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`pipeline_folder("wan", experts=True, boundary_ratio=0.5)`: a diffusers pipeline; see pipelines.py."""
    made: dict[str, Path] = {}

    def make(name: str, **options: Any) -> Path:
        key = repr((name, sorted(options.items())))
        if key not in made:
            made[key] = save_pipeline(name, tmp_path_factory.mktemp(name), **options)
        return made[key]

    return make


@pytest.fixture
def open_engine(transformer_folder: Callable[..., Path]) -> Iterator[Callable[..., DiffusionEngine]]:
    """`open_engine("flux", quant="fp8")`: an engine over a tiny model's folder (or any path), closed in the end."""
    opened: list[Engine] = []

    def start(model: str | Path, **config: Any) -> DiffusionEngine:
        engine = Engine(transformer_folder(model) if isinstance(model, str) else model, EngineConfig(**config))
        opened.append(engine)
        assert isinstance(engine, DiffusionEngine)
        return engine

    yield start
    for engine in opened:
        engine.close()


@pytest.fixture(name="make_embeds")
def embeds_maker() -> Callable[..., Embeds]:
    """`make_embeds("flux", num_tokens=6, seed=0, negative=True)`: random embeddings of one prompt."""
    return make_embeds


@pytest.fixture(scope="session", name="random_model")
def model_maker() -> Callable[[str], Any]:
    """`random_model("flux")`: the tiny transformer itself."""
    return lambda name: random_model(MODELS[name].transformer, MODELS[name].config, 0)
