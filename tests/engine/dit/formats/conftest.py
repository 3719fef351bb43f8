"""Files of diffusion transformers: the recorded folders, and writers of every other layout."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollmill.engine import Engine, EngineConfig
from rollmill.quant import NVFP4, WeightShape

ROOT = Path(__file__).parents[4]
DIT = ROOT / "tests" / "data" / "dit"
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def reader():
    """The benchmark's second reader, which shares no code with the engine's."""
    spec = importlib.util.spec_from_file_location("dit_reader", ROOT / "benchmarks" / "dit_reader.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recorded:
    """`recorded("flux1-fp8")`: the transformer's folder; its tensors, config, and the inputs and output beside it."""

    comfy = DIT / "flux2-bfl-nvfp4-comfy" / "flux2-nvfp4.safetensors"

    def __call__(self, name):
        return DIT / name / "transformer"

    def tensors(self, name):
        return load_file(self(name) / WEIGHTS)

    def config(self, name):
        return json.loads((self(name) / "config.json").read_text())

    def io(self, name):
        return load_file(DIT / name / "io.safetensors")

    def comfy_truth(self):
        return load_file(DIT / "flux2-bfl-nvfp4-comfy" / "truth_rows.safetensors")


@pytest.fixture(scope="session")
def recorded():
    return Recorded()


@pytest.fixture
def open_float32():
    """`open_float32(path, **config)`: an engine in float32 arithmetic, closed after the test."""
    opened = []

    def make(path, **config):
        opened.append(Engine(path, EngineConfig(dtype="float32", device="cpu", **config)))
        return opened[-1]

    yield make
    for engine in opened:
        engine.close()


@pytest.fixture
def write_folder(tmp_path):
    """`write_folder(tensors, config, metadata)`: a transformer folder in diffusers' layout."""

    def write(tensors, config=None, metadata=None, name="written"):
        folder = tmp_path / name
        folder.mkdir()
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / WEIGHTS, metadata)
        if config is not None:
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    return write


@pytest.fixture
def write_file(tmp_path):
    """`write_file(tensors, metadata)`: a file with nothing beside it."""

    def write(tensors, metadata=None, name="alone"):
        folder = tmp_path / name
        folder.mkdir()
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / "weights.safetensors", metadata)
        return folder / "weights.safetensors"

    return write


@pytest.fixture
def copied(recorded, tmp_path):
    """`copied(name, edit)`: a recorded folder with its tensors and config changed by `edit(tensors, config)`."""

    def make(name, edit, metadata=None):
        folder = tmp_path / f"{name}-copy"
        shutil.copytree(recorded(name), folder)
        tensors, config = recorded.tensors(name), recorded.config(name)
        edit(tensors, config)
        save_file({key: value.contiguous() for key, value in tensors.items()}, folder / WEIGHTS, metadata)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


# a tiny FLUX.2 and a tiny FLUX.1 with heads of 128

FLUX2 = {
    "_class_name": "Flux2Transformer2DModel",
    "patch_size": 1,
    "in_channels": 32,
    "out_channels": None,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 3,
    "joint_attention_dim": 48,
    "timestep_guidance_channels": 32,
    "mlp_ratio": 3.0,
    "axes_dims_rope": [8, 8, 8, 8],
    "rope_theta": 2000,
    "eps": 1e-6,
    "guidance_embeds": True,
}
FLUX1 = {
    "_class_name": "FluxTransformer2DModel",
    "patch_size": 1,
    "in_channels": 32,
    "out_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 128,
    "num_attention_heads": 1,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 32,
    "guidance_embeds": False,
    "axes_dims_rope": [16, 56, 56],
}
CONFIGS = {"flux1": FLUX1, "flux2": FLUX2}


@pytest.fixture(scope="session")
def tiny():
    """`tiny("flux2")`: (config, BF16 tensors) of a small seeded model in diffusers' names."""
    import diffusers

    made = {}

    def make(family):
        if family not in made:
            config = CONFIGS[family]
            torch.manual_seed(len(made))
            model = getattr(diffusers, config["_class_name"]).from_config(config)
            made[family] = config, {name: value.bfloat16() for name, value in model.state_dict().items()}
        return made[family]

    return make


# diffusers' names -> Black Forest Labs', written out line by line

EMBEDDERS = {"timestep_embedder": "time_in", "guidance_embedder": "guidance_in", "text_embedder": "vector_in"}
STREAMS = (
    ("img", "to_", "", "to_out.0", "ff", "norm1"),
    ("txt", "add_", "_proj", "to_add_out", "ff_context", "norm1_context"),
)


def native_parts(family, num_layers, num_single):
    """(module of the file, modules of diffusers that it stacks) for every linear and norm."""
    yield "img_in", ["x_embedder"]
    yield "txt_in", ["context_embedder"]
    yield "final_layer.linear", ["proj_out"]
    yield "final_layer.adaLN_modulation.1", ["norm_out.linear"]
    top = "time_text_embed" if family == "flux1" else "time_guidance_embed"
    for embedder, name in EMBEDDERS.items():
        yield f"{name}.in_layer", [f"{top}.{embedder}.linear_1"]
        yield f"{name}.out_layer", [f"{top}.{embedder}.linear_2"]
    if family == "flux2":
        for name in ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation"):
            yield f"{name}.lin", [f"{name}.linear"]
    ff = ("net.0.proj", "net.2") if family == "flux1" else ("linear_in", "linear_out")
    for i in range(num_layers):
        theirs, ours = f"double_blocks.{i}", f"transformer_blocks.{i}"
        for stream, before, after, out, feed, mod in STREAMS:
            yield f"{theirs}.{stream}_attn.qkv", [f"{ours}.attn.{before}{x}{after}" for x in "qkv"]
            yield f"{theirs}.{stream}_attn.proj", [f"{ours}.attn.{out}"]
            added = "added_" if stream == "txt" else ""
            yield f"{theirs}.{stream}_attn.norm.query_norm", [f"{ours}.attn.norm_{added}q"]
            yield f"{theirs}.{stream}_attn.norm.key_norm", [f"{ours}.attn.norm_{added}k"]
            yield f"{theirs}.{stream}_mlp.0", [f"{ours}.{feed}.{ff[0]}"]
            yield f"{theirs}.{stream}_mlp.2", [f"{ours}.{feed}.{ff[1]}"]
            yield f"{theirs}.{stream}_mod.lin", [f"{ours}.{mod}.linear"]
    for i in range(num_single):
        theirs, ours = f"single_blocks.{i}", f"single_transformer_blocks.{i}"
        yield f"{theirs}.norm.query_norm", [f"{ours}.attn.norm_q"]
        yield f"{theirs}.norm.key_norm", [f"{ours}.attn.norm_k"]
        if family == "flux1":
            yield f"{theirs}.linear1", [f"{ours}.attn.to_{x}" for x in "qkv"] + [f"{ours}.proj_mlp"]
            yield f"{theirs}.linear2", [f"{ours}.proj_out"]
            yield f"{theirs}.modulation.lin", [f"{ours}.norm.linear"]
        else:
            yield f"{theirs}.linear1", [f"{ours}.attn.to_qkv_mlp_proj"]
            yield f"{theirs}.linear2", [f"{ours}.attn.to_out"]


def swizzle(scales):
    """Linear E4M3 [m, k] -> 128x4 tiles, zero-padded, byte by byte."""
    rows, cols = scales.shape
    padded = (-(-rows // 128) * 128, -(-cols // 4) * 4)
    m, k = torch.arange(rows)[:, None], torch.arange(cols)[None]
    place = ((m // 128) * (padded[1] // 4) + k // 4) * 512 + (m % 32) * 16 + (m % 128 // 32) * 4 + k % 4
    out = torch.zeros(padded, dtype=torch.uint8)
    out.view(-1)[place] = scales.view(torch.uint8)
    return out.view(torch.float8_e4m3fn)


@pytest.fixture(scope="session", name="swizzle")
def swizzle_fixture():
    return swizzle


@pytest.fixture(scope="session")
def to_native():
    """Stored tensors in diffusers' names -> a file's in Black Forest Labs' names, high nibble first, 128x4 scales."""

    def convert(family, tensors, prefix=""):
        numbers = [
            len({n.split(".")[1] for n in tensors if n.startswith(f"{kind}transformer_blocks.")})
            for kind in ("", "single_")
        ]
        out, left = {}, dict(tensors)
        for native, modules in native_parts(family, *numbers):
            for leaf in ("weight", "bias", "weight_scale", "weight_scale_2", "input_scale"):
                parts = [left.pop(f"{module}.{leaf}") for module in modules if f"{module}.{leaf}" in left]
                if parts:
                    called = "scale" if "_norm" in native.rpartition(".")[2] else leaf
                    out[f"{prefix}{native}.{called}"] = packed(native, leaf, parts)
        assert not left, sorted(left)
        return out

    def packed(native, leaf, parts):
        if parts[0].ndim == 0:
            assert all(torch.equal(part, parts[0]) for part in parts)
            return parts[0]
        bits = [part.view(torch.uint8) if part.element_size() == 1 else part for part in parts]
        stacked = torch.cat(bits)
        if native == "final_layer.adaLN_modulation.1":
            half = len(stacked) // 2
            stacked = torch.cat([stacked[half:], stacked[:half]])
        stacked = stacked.view(parts[0].dtype)
        if leaf == "weight" and stacked.dtype == torch.uint8:
            return (stacked % 16) * 16 + stacked // 16
        if leaf == "weight_scale" and stacked.dtype == torch.float8_e4m3fn:
            return swizzle(stacked)
        return stacked

    return convert


@pytest.fixture(scope="session")
def quantize_nvfp4():
    """`quantize_nvfp4(tensors, groups)`: every group of linears to NVFP4 with one global scale, as ModelOpt stores."""

    def quantize(tensors, groups, input_scale=0.01):
        out = dict(tensors)
        for modules in groups:
            weights = [out.pop(f"{module}.weight") for module in modules]
            shape = WeightShape(tuple(len(weight) for weight in weights), weights[0].shape[1])
            stored = NVFP4().quantize(torch.cat(weights), shape)
            for i, module in enumerate(modules):
                out[f"{module}.weight"] = stored["weight"][shape.shard_slice(i)]
                out[f"{module}.weight_scale"] = stored["weight_scale"][shape.shard_slice(i)]
                out[f"{module}.weight_scale_2"] = stored["weight_scale_2"][i]
                out[f"{module}.input_scale"] = torch.tensor(input_scale)
        return out

    return quantize


@pytest.fixture(scope="session")
def modelopt_config():
    """`modelopt_config("NVFP4", ["proj_out"])`: what ModelOpt writes into config.json."""
    return lambda algorithm, ignore=(): {
        "quantization_config": {"quant_method": "modelopt", "quant_algo": algorithm, "ignore": list(ignore)}
    }


@pytest.fixture(scope="session")
def layers_metadata():
    """`layers_metadata(tensors)`: the header entry that lists quantized layers, as ModelOpt and Comfy write it."""

    def make(tensors, format_="nvfp4"):
        layers = {n.removesuffix(".weight_scale"): {"format": format_} for n in tensors if n.endswith(".weight_scale")}
        return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}

    return make


@pytest.fixture(scope="session")
def native_header():
    """`native_header(family, tensors)`: the same on the meta device, where scales in tiles keep their shape."""

    def convert(family, tensors):
        count = [
            len({n.split(".")[1] for n in tensors if n.startswith(f"{kind}transformer_blocks.")})
            for kind in ("", "single_")
        ]
        out = {}
        for native, modules in native_parts(family, *count):
            for leaf in ("weight", "bias", "weight_scale", "weight_scale_2", "input_scale"):
                parts = [tensors[f"{module}.{leaf}"] for module in modules if f"{module}.{leaf}" in tensors]
                if parts:
                    called = "scale" if "_norm" in native.rpartition(".")[2] else leaf
                    rows = sum(part.shape[0] for part in parts if part.ndim)
                    shape = (rows, *parts[0].shape[1:]) if parts[0].ndim else ()
                    out[f"{native}.{called}"] = torch.empty(shape, dtype=parts[0].dtype, device="meta")
        return out

    return convert
