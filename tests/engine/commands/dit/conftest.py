"""Tiny pipelines as diffusers saves them: an image model and a video model, with text encoders and VAEs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
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

DIT = Path(__file__).parents[3] / "data" / "dit"
WORDS = 64


@pytest.fixture
def dit() -> Callable[[str], Path]:
    """`dit("flux1-fp8")`: a transformer alone."""
    return lambda name: DIT / name / "transformer"


def class_of(name: str) -> Any:
    return getattr(diffusers, name)


def tokenizer(length: int) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w0", pad_token="w1", eos_token="w2", model_max_length=length
    )


T5 = {"vocab_size": WORDS, "d_model": 48, "d_kv": 16, "d_ff": 32, "num_layers": 1, "num_heads": 2}


def flux_pipeline() -> Any:
    clip = CLIPTextConfig(
        vocab_size=WORDS,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=32,
        eos_token_id=2,
        pad_token_id=1,
    )
    transformer = class_of("FluxTransformer2DModel")(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=48,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=[8, 12, 12],
        num_attention_heads=2,
        attention_head_dim=32,
    )
    vae = class_of("AutoencoderKL")(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.3,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    return class_of("FluxPipeline")(
        scheduler=class_of("FlowMatchEulerDiscreteScheduler")(use_dynamic_shifting=True),
        vae=vae,
        text_encoder=CLIPTextModel(clip),
        tokenizer=tokenizer(16),
        text_encoder_2=T5EncoderModel(T5Config(**T5)),
        tokenizer_2=tokenizer(16),
        transformer=transformer,
    )


def wan_pipeline() -> Any:
    def transformer() -> Any:
        return class_of("WanTransformer3DModel")(
            patch_size=(1, 2, 2),
            in_channels=4,
            out_channels=4,
            text_dim=48,
            freq_dim=32,
            ffn_dim=96,
            num_layers=1,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
            num_attention_heads=2,
            attention_head_dim=32,
        )

    vae = class_of("AutoencoderKLWan")(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return class_of("WanPipeline")(
        tokenizer=tokenizer(16),
        text_encoder=UMT5EncoderModel(UMT5Config(**T5)),
        vae=vae,
        scheduler=class_of("FlowMatchEulerDiscreteScheduler")(shift=3.0),
        transformer=transformer(),
        transformer_2=transformer(),
        boundary_ratio=0.8,
    )


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`pipeline_folder("flux")` or "wan" (with two transformers), in BF16."""
    root = tmp_path_factory.mktemp("pipelines")

    def make(name: str) -> Path:
        if not (root / name).exists():
            torch.manual_seed(0)
            {"flux": flux_pipeline, "wan": wan_pipeline}[name]().to(torch.bfloat16).save_pretrained(root / name)
        return root / name

    return make


@pytest.fixture
def embeds_file(tmp_path: Path) -> Callable[..., Path]:
    """Two prompts' embeds for the fixtures in tests/data: [2, 5, 128], pooled [2, 64]; `negative` adds one negative."""

    def write(
        name: str = "embeds.safetensors", dim: int = 128, pooled: int | None = 64, negative: bool = False
    ) -> Path:
        generator = torch.Generator().manual_seed(3)
        tensors = {"prompt_embeds": torch.randn(2, 5, dim, generator=generator)}
        if pooled:
            tensors["pooled_prompt_embeds"] = torch.randn(2, pooled, generator=generator)
        if negative:
            tensors["negative_prompt_embeds"] = torch.randn(1, 5, dim, generator=generator)
            if pooled:
                tensors["negative_pooled_prompt_embeds"] = torch.randn(1, pooled, generator=generator)
        save_file({key: value.bfloat16() for key, value in tensors.items()}, tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture
def tensors_of() -> Callable[[Path], dict[str, torch.Tensor]]:
    """Of a transformer's folder."""
    return lambda folder: load_file(folder / "diffusion_pytorch_model.safetensors")
