"""A written checkpoint is ModelOpt's, key by key and byte by byte, and opens to what quantizing on load gives."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rollmill.engine import (
    ConfigError,
    CoverageError,
    Engine,
    EngineConfig,
    NonFiniteError,
    RequestError,
    ShapeError,
    UnsupportedError,
    quantize_checkpoint,
)

MODELS, QUANTS = ["qwen3", "qwen3_moe"], ["fp8", "nvfp4"]
DTYPES = {"BF16": np.uint16, "F32": np.float32, "U8": np.uint8, "F8_E4M3": np.uint8}


# a reader of checkpoints that shares no code with ours


def read_raw(folder: Path) -> dict[str, tuple[str, np.ndarray]]:
    """name -> (dtype, raw values): the safetensors format by hand, over all files of a folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        raw = file.read_bytes()
        start = 8 + int.from_bytes(raw[:8], "little")
        for name, entry in json.loads(raw[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                data = np.frombuffer(raw[start + begin : start + end], DTYPES[entry["dtype"]])
                found[name] = entry["dtype"], data.reshape(entry["shape"])
    return found


def e4m3(codes: np.ndarray) -> np.ndarray:
    """sign, 4 bits of exponent (bias 7), 3 of mantissa."""
    codes = codes.astype(np.int64)
    exponent, mantissa = codes >> 3 & 15, codes & 7
    value = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    return np.where(codes >> 7, -value, value)


def e2m1(codes: np.ndarray) -> np.ndarray:
    """Two codes a byte, the low nibble first: sign, 2 bits of exponent, 1 of mantissa."""
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
    return np.stack([grid[codes & 15], grid[codes >> 4]], axis=-1).reshape(*codes.shape[:-1], -1)


def decode(tensors: dict[str, tuple[str, np.ndarray]], module: str) -> tuple[np.ndarray, np.ndarray]:
    """A module's weight as its scales and codes say, and the step that one code unit makes there."""
    dtype, weight = tensors[f"{module}.weight"]
    scale = tensors[f"{module}.weight_scale"][1]
    if dtype == "F8_E4M3":
        return e4m3(weight) * scale, np.full(weight.shape, scale)
    step = np.repeat(e4m3(scale) * tensors[f"{module}.weight_scale_2"][1], 16, axis=-1)
    return e2m1(weight) * step, step


def bf16(raw: np.ndarray) -> np.ndarray:
    return (raw.astype(np.uint32) << 16).view(np.float32)


# what it finds, and what an engine does


def served(path, **config):
    """Digest and packed tensors of an engine over `path`."""
    with Engine(path, EngineConfig(**config)) as engine:
        packed = {(s.name, key): t.clone() for s in engine.model.slots for key, t in s.tensors.items()}
        return engine.digest(), packed


def assert_same(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for key, value in one[1].items():
        assert torch.equal(value, other[1][key]), key


@pytest.mark.parametrize("quant", QUANTS)
def test_opens_to_the_bytes_of_quantizing_on_load(quant, family, hf_model, save, tmp_path):
    """Every family: biases, tied embeddings, expert names; many small files in, many out."""
    source = save(hf_model(family), max_shard_size="100KB")
    report = quantize_checkpoint(source, tmp_path / "out", quant, max_shard_bytes=50_000)
    assert report.files > 1
    assert report.activation == "per_token"
    assert_same(served(tmp_path / "out"), served(source, quant=quant))


@pytest.mark.parametrize("quant", QUANTS)
def test_kept_modules_stay_in_bf16(quant, bf16_folder, tmp_path):
    keep = ["lm_head", "*.o_proj", "model.layers.1.mlp.experts.*"]
    report = quantize_checkpoint(bf16_folder("qwen3_moe"), tmp_path / "out", quant, keep=keep)
    assert {"lm_head", "model.layers.0.self_attn.o_proj", "model.layers.1.mlp.experts.7.up_proj"} <= {*report.kept}
    assert report.modules == 6 + 24
    assert_same(served(tmp_path / "out"), served(bf16_folder("qwen3_moe"), quant=quant, keep=keep))


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("model", MODELS)
def test_an_independent_reader_finds_modelopts_export(model, quant, bf16_folder, modelopt_folder, texts, tmp_path):
    """Names, dtypes, shapes, weight bytes and configs are those of ModelOpt 0.47; decoded they are the weights."""
    out, theirs = tmp_path / "out", modelopt_folder(model, quant)
    report = quantize_checkpoint(bf16_folder(model), out, quant, texts=texts, tokens_per_sequence=64)
    assert (report.calibration_sequences, report.calibration_tokens) == (7, 400)
    for name in ("config.json", "hf_quant_config.json", "generation_config.json"):
        assert json.loads((out / name).read_text()) == json.loads((theirs / name).read_text()), name
    ours, expected = read_raw(out), read_raw(theirs)
    assert ours.keys() == expected.keys()
    for name, (dtype, value) in expected.items():
        assert (ours[name][0], ours[name][1].shape) == (dtype, value.shape), name
        if not name.endswith("input_scale"):  # those depend on the texts
            assert np.array_equal(ours[name][1], value), name
    source = read_raw(bf16_folder(model))
    for module in (name.removesuffix(".weight_scale") for name in ours if name.endswith(".weight_scale")):
        weight = bf16(source[f"{module}.weight"][1])
        decoded, step = decode(ours, module)
        # half a gap of the grid: E2M1's widest is 2 steps; E4M3 keeps 4 significant bits, after rounding to BF16
        bound = step if quant == "nvfp4" else np.maximum(abs(weight) * (2**-4 + 2**-8), step * 2**-10)
        assert (abs(decoded - weight) <= bound * (1 + 1e-5)).all(), module


@pytest.mark.parametrize("quant", QUANTS)
def test_without_texts_no_scale_is_written(quant, bf16_folder, modelopt_folder, tmp_path):
    quantize_checkpoint(bf16_folder("qwen3_moe"), tmp_path / "out", quant)
    ours, theirs = read_raw(tmp_path / "out"), read_raw(modelopt_folder("qwen3_moe", quant))
    assert ours.keys() == {name for name in theirs if not name.endswith("input_scale")}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"]
    with Engine(tmp_path / "out") as engine:
        assert engine.info()["activation"] == ["per_token"]


def test_stacked_experts_give_the_same_folder(bf16_folder, tmp_path):
    """As a transformers 5 trainer holds them: gate_up_proj and down_proj in 3-D."""
    folder = tmp_path / "stacked"
    shutil.copytree(bf16_folder("qwen3_moe"), folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp.experts"
        one = [{p: tensors.pop(f"{prefix}.{e}.{p}_proj.weight") for p in ("gate", "up", "down")} for e in range(8)]
        tensors[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat([e["gate"], e["up"]]) for e in one])
        tensors[f"{prefix}.down_proj"] = torch.stack([e["down"] for e in one])
    save_file(tensors, folder / "model.safetensors")
    for source, out in ((folder, "a"), (bf16_folder("qwen3_moe"), "b")):
        quantize_checkpoint(source, tmp_path / out, "nvfp4")
    a, b = (read_raw(tmp_path / out) for out in "ab")
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name][1], b[name][1]) for name in a)


def test_float32_weights_are_rounded_to_bf16_first(bf16_folder, tmp_path):
    folder = tmp_path / "float32"
    shutil.copytree(bf16_folder("qwen3"), folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t.float() * (1 + 1e-4) for name, t in tensors.items()}, folder / "model.safetensors")
    quantize_checkpoint(folder, tmp_path / "out", "fp8")
    assert_same(served(tmp_path / "out"), served(folder, quant="fp8"))


def test_the_tokenizer_goes_along_and_weights_do_not(bf16_folder, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(bf16_folder("qwen3"), source)
    (source / "notes.bin").write_bytes(b"x")
    quantize_checkpoint(source, tmp_path / "out", "fp8")
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert names - {file.name for file in source.iterdir()} == {"hf_quant_config.json"}
    assert "notes.bin" not in names


def broken(bf16_folder, tmp_path, edit):
    folder = tmp_path / "broken"
    shutil.copytree(bf16_folder("qwen3_moe"), folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


UP, NORM = "model.layers.1.mlp.experts.3.up_proj.weight", "model.norm.weight"
EDITS = {
    "missing": (lambda t: t.pop(UP), CoverageError),
    "unknown": (lambda t: t.update({"model.extra.weight": torch.zeros(2)}), CoverageError),
    "misshaped": (lambda t: t.update({UP: t[UP][:-1].clone()}), ShapeError),
    "not finite": (lambda t: t[UP].fill_(float("nan")), NonFiniteError),
    "kept misshaped": (lambda t: t.update({NORM: t[NORM][:-1].clone()}), ShapeError),
    "kept not finite": (lambda t: t[NORM].fill_(float("inf")), NonFiniteError),
}


@pytest.mark.parametrize("edit", EDITS)
def test_a_failure_leaves_nothing_behind(edit, bf16_folder, tmp_path):
    change, error = EDITS[edit]
    folder = broken(bf16_folder, tmp_path, change)
    with pytest.raises(
        error, match={"unknown": "model.extra"}.get(edit, "model.norm" if "kept" in edit else "experts.3.up_proj")
    ):
        quantize_checkpoint(folder, tmp_path / "out", "nvfp4")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_requests_that_cannot_be_honoured(bf16_folder, modelopt_folder, texts, tmp_path):
    with pytest.raises(UnsupportedError, match="quantized already"):
        quantize_checkpoint(modelopt_folder("qwen3", "fp8"), tmp_path / "out", "nvfp4")
    with pytest.raises(ConfigError, match="not empty"):
        quantize_checkpoint(bf16_folder("qwen3"), texts.parent, "fp8")
    with pytest.raises(ConfigError, match="at least 1"):
        quantize_checkpoint(bf16_folder("qwen3"), tmp_path / "out", "fp8", texts=texts, sequences=0)
    with pytest.raises(ConfigError, match="quantized alike"):
        quantize_checkpoint(bf16_folder("qwen3"), tmp_path / "out", "fp8", keep=["*.q_proj"])
    with pytest.raises(RequestError, match="no tokenizer"):
        quantize_checkpoint(modelopt_folder("qwen3", "bf16"), tmp_path / "out", "fp8", texts=texts)
    assert not (tmp_path / "out").exists()
