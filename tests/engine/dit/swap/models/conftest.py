"""Tiny seeded diffusers transformers of many classes, as `save_pretrained` writes them, and inputs of one forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

HEADS = {"num_attention_heads": 2, "attention_head_dim": 32}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


MODELS = {
    "flux1": (
        "FluxTransformer2DModel",
        dict(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=48,
            pooled_projection_dim=32,
            guidance_embeds=True,
            axes_dims_rope=[8, 12, 12],
            **HEADS,
        ),
        lambda: {
            "hidden_states": normal(2, 16, 16),
            "encoder_hidden_states": normal(2, 5, 48),
            "pooled_projections": normal(2, 32),
            "timestep": torch.tensor([0.5, 0.25]),
            "guidance": torch.tensor([4.0, 4.0]),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(5, 3),
        },
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        dict(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=48,
            timestep_guidance_channels=32,
            axes_dims_rope=[8, 8, 8, 8],
            guidance_embeds=True,
            **HEADS,
        ),
        lambda: {
            "hidden_states": normal(2, 16, 16),
            "encoder_hidden_states": normal(2, 5, 48),
            "timestep": torch.tensor([0.5, 0.25]),
            "guidance": torch.tensor([4.0, 4.0]),
            "img_ids": torch.zeros(2, 16, 4),
            "txt_ids": torch.zeros(2, 5, 4),
        },
    ),
    "wan": (
        "WanTransformer3DModel",
        dict(
            patch_size=[1, 2, 2],
            in_channels=4,
            out_channels=4,
            text_dim=48,
            freq_dim=32,
            ffn_dim=96,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
            **HEADS,
        ),
        lambda: {
            "hidden_states": normal(2, 4, 2, 4, 4),
            "encoder_hidden_states": normal(2, 5, 48),
            "timestep": torch.tensor([500.0, 250.0]),
        },
    ),
    "wan-i2v": (
        "WanTransformer3DModel",
        dict(
            patch_size=[1, 2, 2],
            in_channels=4,
            out_channels=4,
            text_dim=48,
            freq_dim=32,
            ffn_dim=96,
            num_layers=1,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
            image_dim=32,
            added_kv_proj_dim=64,
            **HEADS,
        ),
        lambda: {
            "hidden_states": normal(2, 4, 2, 4, 4),
            "encoder_hidden_states": normal(2, 512, 48),
            "encoder_hidden_states_image": normal(2, 3, 32),
            "timestep": torch.tensor([500.0, 250.0]),
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        dict(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            joint_attention_dim=48,
            caption_projection_dim=64,
            pooled_projection_dim=32,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
            dual_attention_layers=[0],
            **HEADS,
        ),
        lambda: {
            "hidden_states": normal(2, 4, 8, 8),
            "encoder_hidden_states": normal(2, 5, 48),
            "pooled_projections": normal(2, 32),
            "timestep": torch.tensor([500.0, 250.0]),
        },
    ),
    "qwen": (
        "QwenImageTransformer2DModel",
        dict(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=1,
            joint_attention_dim=48,
            axes_dims_rope=[8, 12, 12],
            **HEADS,
        ),
        lambda: {
            "hidden_states": normal(2, 16, 16),
            "encoder_hidden_states": normal(2, 5, 48),
            "encoder_hidden_states_mask": torch.ones(2, 5, dtype=torch.bool),
            "timestep": torch.tensor([0.5, 0.25]),
            "img_shapes": [[(1, 4, 4)]] * 2,
        },
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        dict(
            in_channels=4,
            out_channels=8,
            num_layers=1,
            cross_attention_dim=64,
            caption_channels=48,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=1000,
            **HEADS,
        ),
        lambda: {
            "hidden_states": normal(2, 4, 8, 8),
            "encoder_hidden_states": normal(2, 5, 48),
            "timestep": torch.tensor([500.0, 250.0]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "sana": (
        "SanaTransformer2DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_cross_attention_heads=2,
            cross_attention_head_dim=32,
            cross_attention_dim=64,
            caption_channels=48,
            sample_size=8,
            patch_size=1,
            mlp_ratio=2.0,
            **HEADS,
        ),
        lambda: {
            "hidden_states": normal(2, 4, 8, 8),
            "encoder_hidden_states": normal(2, 5, 48),
            "timestep": torch.tensor([500.0, 250.0]),
        },
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        dict(in_channels=16, out_channels=16, num_layers=1, cross_attention_dim=64, caption_channels=48, **HEADS),
        lambda: {
            "hidden_states": normal(2, 16, 16),
            "encoder_hidden_states": normal(2, 5, 48),
            "timestep": torch.tensor([500.0, 250.0]),
            "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
            "num_frames": 1,
            "height": 4,
            "width": 4,
        },
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            text_embed_dim=48,
            time_embed_dim=16,
            sample_width=8,
            sample_height=8,
            sample_frames=1,
            max_text_seq_length=5,
            temporal_compression_ratio=4,
            **HEADS,
        ),
        lambda: {
            "hidden_states": normal(2, 1, 4, 8, 8),
            "encoder_hidden_states": normal(2, 5, 48),
            "timestep": torch.tensor([500.0, 250.0]),
        },
    ),
    "auraflow": (
        "AuraFlowTransformer2DModel",
        dict(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            num_mmdit_layers=1,
            num_single_dit_layers=1,
            joint_attention_dim=48,
            caption_projection_dim=64,
            out_channels=4,
            pos_embed_max_size=64,
            **HEADS,
        ),
        lambda: {
            "hidden_states": normal(2, 4, 8, 8),
            "encoder_hidden_states": normal(2, 5, 48),
            "timestep": torch.tensor([0.5, 0.25]),
        },
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 64,
            "num_layers": 1,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": [8, 12, 12],
            "axes_lens": [32, 32, 32],
            "cap_feat_dim": 48,
        },
        lambda: {
            "hidden_states": normal(2, 4, 8, 8),
            "encoder_hidden_states": normal(2, 5, 48),
            "timestep": torch.tensor([0.5, 0.25]),
            "encoder_attention_mask": torch.ones(2, 5, dtype=torch.bool),
        },
    ),
    "hunyuan-video": (
        "HunyuanVideoTransformer3DModel",
        dict(
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            patch_size_t=1,
            text_embed_dim=48,
            pooled_projection_dim=32,
            rope_axes_dim=[8, 12, 12],
            guidance_embeds=True,
            qk_norm="rms_norm",
            **HEADS,
        ),
        lambda: {
            "hidden_states": normal(2, 4, 1, 4, 4),
            "encoder_hidden_states": normal(2, 5, 48),
            "encoder_attention_mask": torch.ones(2, 5),
            "pooled_projections": normal(2, 32),
            "timestep": torch.tensor([500.0, 250.0]),
            "guidance": torch.tensor([4.0, 4.0]),
        },
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        dict(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=48,
            axes_dims_rope=[8, 12, 12],
            approximator_num_channels=64,
            approximator_hidden_dim=64,
            approximator_layers=1,
            **HEADS,
        ),
        lambda: {
            "hidden_states": normal(2, 16, 16),
            "encoder_hidden_states": normal(2, 5, 48),
            "timestep": torch.tensor([0.5, 0.25]),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(5, 3),
        },
    ),
    "z-image": (
        "ZImageTransformer2DModel",
        {
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 4,
            "dim": 64,
            "n_layers": 1,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 48,
            "axes_dims": [8, 12, 12],
            "axes_lens": [64, 64, 64],
        },
        lambda: {"x": [normal(4, 1, 8, 8)], "t": torch.tensor([0.5]), "cap_feats": [normal(5, 48)]},
    ),
    "hunyuan-dit": (
        "HunyuanDiT2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 32,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 64,
            "num_layers": 2,
            "mlp_ratio": 2.0,
            "cross_attention_dim": 48,
            "cross_attention_dim_t5": 32,
            "pooled_projection_dim": 32,
            "text_len": 5,
            "text_len_t5": 5,
        },
        lambda: {
            "hidden_states": normal(2, 4, 8, 8),
            "encoder_hidden_states": normal(2, 5, 48),
            "text_embedding_mask": torch.ones(2, 5),
            "encoder_hidden_states_t5": normal(2, 5, 32),
            "text_embedding_mask_t5": torch.ones(2, 5),
            "timestep": torch.tensor([500.0, 250.0]),
            "image_meta_size": torch.ones(2, 6),
            "style": torch.zeros(2, dtype=torch.int64),
            "image_rotary_emb": (torch.ones(16, 32), torch.zeros(16, 32)),
        },
    ),
}


FAMILIES = ("flux1", "flux2", "wan", "wan-i2v", "sd3", "qwen")
OTHERS = ("pixart", "sana", "ltx", "cogvideox", "auraflow", "lumina2", "hunyuan-video", "chroma")


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`make_model("sana")`: a folder of BF16 weights."""
    root = tmp_path_factory.mktemp("models")

    def make(name: str) -> Path:
        if not (root / name).exists():
            torch.manual_seed(0)
            kind, config, _ = MODELS[name]
            model = getattr(diffusers, kind)(**config)
            with torch.no_grad():
                for parameter in model.parameters():  # tables begin as zeros
                    parameter.normal_(std=float(parameter.float().std().nan_to_num(1.0).clamp(min=0.05)))
            model.to(torch.bfloat16).save_pretrained(root / name)
        return root / name

    return make


@pytest.fixture(scope="session")
def plain_model(make_model: Callable[[str], Path]) -> Callable[[str], nn.Module]:
    """The same in float32, by diffusers alone."""

    def load(name: str) -> nn.Module:
        kind: Any = getattr(diffusers, MODELS[name][0])
        return kind.from_pretrained(make_model(name), torch_dtype=torch.float32).eval()

    return load


def run(name: str, module: Any) -> Tensor:
    with torch.no_grad():
        out = module(**MODELS[name][2](), return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


@pytest.fixture
def output() -> Callable[[str, Any], Tensor]:
    """`output("sana", module)`: one forward in float32."""
    return run


QKV = {"to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "add_q_proj": "added", "add_k_proj": "added", "add_v_proj": "added"}


@pytest.fixture
def groups_seen() -> Callable[[str, nn.Module], set[tuple[str, ...]]]:
    """Query, key and value linears of one attention that were called with the very same tensor: what ModelOpt unifies,
    found as it finds them, from a forward."""

    def watch(name: str, model: nn.Module) -> set[tuple[str, ...]]:
        seen: dict[tuple[str, str, int], list[str]] = {}
        alive: list[Tensor] = []  # a freed tensor's id would be given out again

        def hook(path: str) -> Any:
            parent, _, leaf = path.rpartition(".")

            def record(module: nn.Module, inputs: Any) -> None:
                alive.append(inputs[0])
                seen.setdefault((parent, QKV[leaf], id(inputs[0])), []).append(path)

            return record

        linears = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear)]
        handles = [m.register_forward_pre_hook(hook(path)) for path, m in linears if path.rpartition(".")[2] in QKV]
        run(name, model)
        for handle in handles:
            handle.remove()
        return {tuple(sorted(set(paths))) for paths in seen.values() if len(set(paths)) > 1}

    return watch


@pytest.fixture
def fake_quantized(groups_seen: Any) -> Callable[[str, nn.Module, str], nn.Module]:
    """Rounds the weights of a plain model to a format in plain torch, as ModelOpt does; returns the model."""

    def change(name: str, model: nn.Module, quant: str) -> nn.Module:
        shared = {path: group for group in groups_seen(name, model) for path in group}
        weights = {path: m.weight.detach() for path, m in model.named_modules() if isinstance(m, nn.Linear)}
        amax = {path: weight.abs().max() for path, weight in weights.items()}
        for path, weight in weights.items():
            if quant == "fp8":
                scale = amax[path] / 448
                restored = (weight.bfloat16() / scale).to(torch.float8_e4m3fn).float() * scale
            else:
                restored = round_nvfp4(weight, max(amax[other] for other in shared.get(path, (path,))) / 2688)
            weight.copy_(restored)
        return model

    return change


def round_nvfp4(weight: Tensor, scale_2: Tensor) -> Tensor:
    blocks = weight.view(len(weight), -1, 16)
    block_scale = blocks.abs().amax(-1) / (6 * scale_2)
    block_scale = torch.where(block_scale == 0, 1.0, block_scale).clamp(2**-9, 448).to(torch.float8_e4m3fn).float()
    step = (block_scale * scale_2)[..., None]
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = (blocks / step).abs()
    code = (x > 0.25).int() + (x >= 0.75) + (x > 1.25) + (x >= 1.75) + (x > 2.5) + (x >= 3.5) + (x > 5)
    return (values[code.long()] * blocks.sign() * step).view(weight.shape)
