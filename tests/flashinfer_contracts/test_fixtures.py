"""ModelOpt's exports and diffusion files, linear and swizzled, through every backend's `prepare`: the same values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kernel_models.decoding import decode_e2m1, decode_e4m3, decode_nvfp4, split_gated_rows, unshuffle_rows
from safetensors.torch import load_file

from rollmill.engine.dit.formats import open_transformer
from rollmill.moe import MoeConfig
from rollmill.moe.runners.flashinfer_trtllm import FlashInferTrtllmRouted
from rollmill.quant import FP4_BACKENDS, NVFP4, WeightShape

STATIC = NVFP4("static")
DATA = Path(__file__).parents[1] / "data" / "dit"


def values_of(tensors, module):
    """code x block scale as ModelOpt stores them, without rollmill: float32 [rows, cols]."""
    scales = decode_e4m3(tensors[f"{module}.weight_scale"])
    return decode_e2m1(tensors[f"{module}.weight"]) * scales.repeat_interleave(16, dim=1)


def quantized_modules(tensors):
    return [n.removesuffix(".weight") for n, t in tensors.items() if n.endswith(".weight") and t.dtype == torch.uint8]


def packed_values(backend, capability, tensors, module):
    codes = tensors[f"{module}.weight"]
    rows, cols = len(codes), codes.shape[1] * 2
    kernel = FP4_BACKENDS[backend](STATIC, WeightShape((rows,), cols), torch.bfloat16, capability)
    packed = kernel.prepare({"weight": codes, "weight_scale": tensors[f"{module}.weight_scale"]})
    values = decode_nvfp4(packed["weight"], packed["block_scale"], "128x4")
    return (unshuffle_rows(values) if backend == "trtllm" else values)[:rows, :cols]


@pytest.mark.parametrize("model", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("backend", FP4_BACKENDS)
def test_language_models(backend, model, blackwell, modelopt_folder):
    tensors = load_file(modelopt_folder(model, "nvfp4") / "model.safetensors")
    modules = [name for name in quantized_modules(tensors) if "experts" not in name]
    assert len(modules) >= 8
    for module in modules:
        assert torch.equal(packed_values(backend, blackwell, tensors, module), values_of(tensors, module)), module


def test_experts(blackwell, modelopt_folder):
    tensors = load_file(modelopt_folder("qwen3_moe", "nvfp4") / "model.safetensors")
    prefix = "model.layers.0.mlp.experts"
    config = MoeConfig(num_experts=8, top_k=2, hidden_size=128, intermediate_size=96)
    runner = FlashInferTrtllmRouted(config, STATIC, blackwell, torch.bfloat16)

    def stacked(*projections):
        parts = [[f"{prefix}.{e}.{p}" for p in projections] for e in range(8)]
        return {
            key: torch.stack([torch.cat([tensors[f"{m}.{key}"].view(torch.uint8) for m in unit]) for unit in parts])
            for key in ("weight", "weight_scale")
        }

    w13, w2 = stacked("gate_proj", "up_proj"), stacked("down_proj")
    for packer, values in ((runner.w13, w13), (runner.w2, w2)):
        values["weight_scale"] = values["weight_scale"].view(torch.float8_e4m3fn)
        packed = packer.prepare(values)
        for expert in range(8):
            read = decode_nvfp4(packed["weight"][expert], packed["block_scale"][expert], "128x4")
            if packer is runner.w2:
                down = values_of(tensors, f"{prefix}.{expert}.down_proj")
                assert torch.equal(unshuffle_rows(read)[: len(down), : down.shape[1]], down)
                continue
            for found, name in zip(split_gated_rows(read), ("up_proj", "gate_proj"), strict=True):
                expected = values_of(tensors, f"{prefix}.{expert}.{name}")
                assert torch.equal(found[: len(expected), : expected.shape[1]], expected)


@pytest.mark.parametrize("folders", [["flux1-nvfp4"], ["wan-nvfp4", "wan-nvfp4-swizzled"]], ids=["flux1", "wan"])
@pytest.mark.parametrize("backend", FP4_BACKENDS)
def test_diffusion_transformers(backend, folders, blackwell):
    """The swizzled file, made linear at the border, packs to the values of the linear one."""
    linear = load_file(next((DATA / folders[0] / "transformer").glob("*.safetensors")))
    modules = quantized_modules(linear)
    assert len(modules) >= 10
    for folder in folders:
        tensors = dict(open_transformer(DATA / folder / "transformer").source)
        for module in modules:
            expected = values_of(linear, module)
            assert torch.equal(packed_values(backend, blackwell, tensors, module), expected), (folder, module)
