"""Headers of the published sizes over files without content: configs, shapes, and no tensor in memory."""

from __future__ import annotations

import json
import resource
from math import prod

import pytest
import torch

from rollmill.engine.dit.formats import open_transformer
from rollmill.engine.dit.transformer import transformer_class

FLUX1_DEV = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": [16, 56, 56],
}
FLUX2_DEV = {
    "_class_name": "Flux2Transformer2DModel",
    "patch_size": 1,
    "in_channels": 128,
    "out_channels": None,
    "num_layers": 8,
    "num_single_layers": 48,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "axes_dims_rope": [32, 32, 32, 32],
    "rope_theta": 2000,
    "eps": 1e-6,
    "guidance_embeds": True,
}
DTYPES = {torch.bfloat16: "BF16", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}


def write_hollow(path, tensors):
    """A safetensors file with the header of `tensors` (on the meta device) and a hole for content."""
    header, end = {}, 0
    for name, value in tensors.items():
        size = prod(value.shape) * value.element_size()
        header[name] = {"dtype": DTYPES[value.dtype], "shape": list(value.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return end


def published(config):
    with torch.device("meta"):
        model = transformer_class(config["_class_name"]).from_config(config)
    return {name: value.bfloat16() for name, value in model.state_dict().items()}


def nvfp4(tensors):
    """Every linear of the blocks but the text qkv, in NVFP4 on the meta device."""
    out = dict(tensors)
    for name, value in tensors.items():
        if "transformer_blocks." not in name or value.ndim < 2 or ".add_" in name:
            continue
        module, (rows, cols) = name.removesuffix(".weight"), value.shape
        out[name] = torch.empty(rows, cols // 2, dtype=torch.uint8, device="meta")
        out[f"{module}.weight_scale"] = torch.empty(rows, cols // 16, dtype=torch.float8_e4m3fn, device="meta")
        for scalar in ("weight_scale_2", "input_scale"):
            out[f"{module}.{scalar}"] = torch.empty((), device="meta")
    return out


@pytest.mark.parametrize(
    ("config", "quantized"), [(FLUX1_DEV, False), (FLUX2_DEV, True)], ids=["FLUX.1 BF16", "FLUX.2 NVFP4"]
)
def test_configs_and_names_of_published_sizes(config, quantized, native_header, tmp_path):
    stored = nvfp4(published(config)) if quantized else published(config)
    path = tmp_path / "flux.safetensors"
    size = write_hollow(path, native_header("flux2" if quantized else "flux1", stored))
    assert size > 18e9
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB
    opened = open_transformer(path)
    assert opened.config == config
    assert opened.tensor_names == stored.keys()
    assert opened.plan is None if not quantized else opened.plan.quant == "nvfp4" and not opened.plan.layers
    name = "transformer_blocks.3.attn.to_k.weight"
    value = opened.source.get(name)
    assert (value.shape, value.dtype) == (stored[name].shape, stored[name].dtype)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20
