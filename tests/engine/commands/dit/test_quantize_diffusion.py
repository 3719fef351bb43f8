"""`rollmill quantize` of diffusion transformers: ModelOpt's bytes, its layout, calibrated scales, whole pipelines."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rollmill.engine import (
    ConfigError,
    CoverageError,
    DiffusionEngine,
    EngineConfig,
    ModelError,
    NonFiniteError,
    UnsupportedError,
    quantize_checkpoint,
    quantize_diffusion,
)
from rollmill.engine.cli import main
from rollmill.engine.export.layout import summarize_modules

FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(params=["flux1", "wan"])
def model(request):
    return request.param


@pytest.fixture(params=["fp8", "nvfp4"])
def quant(request):
    return request.param


@pytest.fixture
def quantize(capsys):
    """Run the command; its report."""

    def run(*arguments):
        assert main(["quantize", *map(str, arguments), "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return run


def raw(value):
    return (value.dtype, tuple(value.shape), value.contiguous().reshape(-1).view(torch.uint8).tolist())


def test_bytes_and_config_are_modelopts(model, quant, quantize, dit, tensors_of, tmp_path):
    report = quantize(dit(f"{model}-bf16"), "--quant", quant, "--out", tmp_path / "out")
    written, exported = tensors_of(tmp_path / "out"), tensors_of(dit(f"{model}-{quant}"))
    expected = {name: value for name, value in exported.items() if not name.endswith("input_scale")}
    assert written.keys() == expected.keys()
    assert [name for name in written if raw(written[name]) != raw(expected[name])] == []
    config, theirs = (
        json.loads((place / "config.json").read_text()) for place in (tmp_path / "out", dit(f"{model}-{quant}"))
    )
    assert config["quantization_config"]["ignore"] == theirs["quantization_config"]["ignore"]
    for part in ("weights", "input_activations"):
        group = theirs["quantization_config"]["config_groups"]["group_0"]
        dynamic = group[part] | {"dynamic": part == "input_activations"}
        assert config["quantization_config"]["config_groups"]["group_0"][part] == dynamic
    for settings in (config, theirs):
        settings["quantization_config"].pop("config_groups")
    assert config == theirs
    assert report["modules"] == {"flux1": 26, "wan": 20}[model]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["config.json", FILE]


def test_what_was_written_opens_as_what_was_meant(model, quant, quantize, dit, tmp_path):
    quantize(dit(f"{model}-bf16"), "--quant", quant, "--out", tmp_path / "out")
    with DiffusionEngine(dit(f"{model}-bf16"), EngineConfig(quant=quant)) as meant:
        digest = meant.digest()
        with DiffusionEngine(tmp_path / "out") as opened:
            assert opened.digest() == digest
            assert opened.info()["activation"] == ["per_token"]
            assert opened.update_weights(dit(f"{model}-bf16"), version="1").digest == digest


def test_patterns_to_keep(quantize, dit, tensors_of, tmp_path):
    keep = ["--keep", "*norm*", "--keep", "single_transformer_blocks.1.*", "--keep", "*embed*"]
    report = quantize(dit("flux1-bf16"), "--quant", "fp8", *keep, "--out", tmp_path / "out")
    written = tensors_of(tmp_path / "out")
    assert "proj_out.weight_scale" in written, "the family's list was replaced"
    assert not any(name.endswith("_scale") and "single_transformer_blocks.1." in name for name in written)
    assert "single_transformer_blocks.1.proj_out" in report["kept"]
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "single_transformer_blocks.1*" in ignored
    with DiffusionEngine(tmp_path / "out") as opened:
        patterns = ["*norm*", "single_transformer_blocks.1.*", "*embed*"]
        with DiffusionEngine(dit("flux1-bf16"), EngineConfig(quant="fp8", keep=patterns)) as meant:
            assert opened.digest() == meant.digest()


@pytest.mark.parametrize(
    ("kept", "quantized", "listed"),
    [
        (["proj_out", "norm_out.linear"], ["blocks.0.proj_out"], ["norm_out*", "proj_out"]),
        (["blocks.1.to_q", "blocks.1.to_k"], ["blocks.0.to_q"], ["blocks.1*"]),
        (["blocks.1.to_q"], ["blocks.10.to_q"], ["blocks.1", "blocks.1.*"]),
        (["blocks.1.to_q"], ["blocks.1.to_k"], ["blocks.1.to_q"]),
        (["a.b.c", "a.b.d", "a.e"], ["a.f"], ["a.b*", "a.e"]),
    ],
)
def test_the_ignore_list_names_no_quantized_module(kept, quantized, listed):
    from rollmill.quant import matches_any

    assert summarize_modules(kept, quantized) == listed
    assert all(matches_any(name, listed) for name in kept)
    assert not any(matches_any(name, listed) for name in quantized)


def test_large_models_are_sharded_as_diffusers_does(dit, tensors_of, tmp_path):
    """And BF16 folders that diffusers sharded are read by their index."""
    report = quantize_diffusion(dit("flux1-bf16"), tmp_path / "out", "nvfp4", max_shard_bytes=200_000)
    index = json.loads((tmp_path / "out" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert report.files == len(set(index["weight_map"].values())) > 1
    quantize_diffusion(dit("flux1-bf16"), tmp_path / "whole", "nvfp4")
    whole = tensors_of(tmp_path / "whole")
    assert index["weight_map"].keys() == whole.keys()
    found = {name: load_file(tmp_path / "out" / file)[name] for name, file in index["weight_map"].items()}
    assert all(raw(found[name]) == raw(whole[name]) for name in whole)
    (tmp_path / "out" / "stale.safetensors").write_bytes((tmp_path / "whole" / FILE).read_bytes())
    with DiffusionEngine(tmp_path / "out") as sharded, DiffusionEngine(tmp_path / "whole") as single:
        assert sharded.digest() == single.digest()


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_pipeline_is_written_whole(name, quant, quantize, pipeline_folder, tmp_path):
    source, out = pipeline_folder(name), tmp_path / "out"
    report = quantize(source, "--quant", quant, "--out", out)
    quantized = [part for part in ("transformer", "transformer_2") if (source / part).is_dir()]
    assert {item.name for item in out.iterdir()} == {item.name for item in source.iterdir()}
    for file in source.rglob("*"):
        if file.is_file() and file.relative_to(source).parts[0] not in quantized:
            assert (out / file.relative_to(source)).read_bytes() == file.read_bytes()
    for part in quantized:
        quantize_diffusion(source / part, tmp_path / part, quant)
        assert (out / part / FILE).read_bytes() == (tmp_path / part / FILE).read_bytes()
    assert report["files"] == len(quantized)
    with DiffusionEngine(out) as opened, DiffusionEngine(source, EngineConfig(quant=quant)) as meant:
        assert opened.digest() == meant.digest()
        assert opened.generate("w5 w6", SMALL)[0].image is not None


def _small():
    from rollmill.engine import DiffusionParams

    return DiffusionParams(steps=2, height=32, width=48, want=("image",))


SMALL = _small()


def amax_of_inputs(model, embeds, steps, dit):
    """max |x| of what enters every linear of the plain diffusers model in BF16, along an Euler trajectory over the
    engine's own noise and grid."""
    import diffusers

    from rollmill.engine import DiffusionParams
    from rollmill.engine.dit.embeds_file import read_embeds

    kind = {"flux1": diffusers.FluxTransformer2DModel, "wan": diffusers.WanTransformer3DModel}[model]  # pyright: ignore[reportPrivateImportUsage]
    plain = kind.from_pretrained(dit(f"{model}-bf16"), torch_dtype=torch.bfloat16).eval()
    amax = {}

    def record(name):
        def hook(module, inputs):
            amax[name] = max(amax.get(name, 0.0), float(inputs[0].abs().max()))

        return hook

    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(record(name))
    params = DiffusionParams(steps=steps, height=64, width=64, want=("latents",))
    with DiffusionEngine(dit(f"{model}-bf16")) as engine, torch.no_grad():
        for one in read_embeds(embeds):
            sample = engine.generate(one, params)[0]
            family = engine.rollouts.family
            for step in range(steps):
                latents = sample.latents[step : step + 1].bfloat16()
                time = sample.timesteps[step : step + 1]
                inputs = family.inputs(latents, time, [one], sample.size, family.guidance(params))
                plain(**inputs, return_dict=False)
    return amax


def test_calibrated_scales(model, quant, quantize, dit, embeds_file, tensors_of, tmp_path):
    embeds = embeds_file(pooled=64 if model == "flux1" else None)
    size = ["--steps", 3, "--height", 64, "--width", 64]
    report = quantize(dit(f"{model}-bf16"), "--quant", quant, "--calibrate", embeds, *size, "--out", tmp_path / "out")
    assert (report["activation"], report["calibration_sequences"], report["calibration_tokens"]) == ("static", 2, 10)
    written, exported = tensors_of(tmp_path / "out"), tensors_of(dit(f"{model}-{quant}"))
    assert {name: (v.dtype, v.shape) for name, v in written.items()} == {
        name: (v.dtype, v.shape) for name, v in exported.items()
    }
    amax = amax_of_inputs(model, embeds, 3, dit)
    code_max = {"fp8": 448, "nvfp4": 2688}[quant]
    for name, value in written.items():
        if name.endswith("input_scale"):
            assert float(value) == pytest.approx(amax[name.removesuffix(".input_scale")] / code_max, rel=0.05), name
    scales = {
        name.removesuffix(".input_scale"): float(v) for name, v in written.items() if name.endswith("input_scale")
    }
    attention = {"flux1": "transformer_blocks.0.attn", "wan": "blocks.0.attn1"}[model]
    assert len({scales[f"{attention}.to_{letter}"] for letter in "qkv"}) == 1
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    theirs = json.loads((dit(f"{model}-{quant}") / "config.json").read_text())
    assert config == theirs
    with DiffusionEngine(tmp_path / "out") as opened:
        assert opened.info()["activation"] == ["static"]


def test_two_transformers_are_calibrated_by_the_steps_that_reach_them(
    quant, quantize, pipeline_folder, embeds_file, tmp_path
):
    embeds = embeds_file(dim=48, pooled=None)
    few = {"embeds": embeds, "params": _one_step()}
    with pytest.raises(ModelError, match=r"not transformer_2\..*more steps"):
        quantize_diffusion(pipeline_folder("wan"), tmp_path / "out", quant, **few)
    assert not (tmp_path / "out").exists()
    command = ["--calibrate", embeds, "--steps", 4, "--height", 32, "--width", 48, "--num-frames", 5]
    quantize(pipeline_folder("wan"), "--quant", quant, *command, "--out", tmp_path / "out")
    for part in ("transformer", "transformer_2"):
        assert any(name.endswith("input_scale") for name in load_file(tmp_path / "out" / part / FILE))


def _one_step():
    from rollmill.engine import DiffusionParams

    return DiffusionParams(steps=1, height=32, width=48)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (lambda w: w.pop("x_embedder.weight"), CoverageError, r"missing: .*x_embedder\.weight"),
        (lambda w: w.update(ghost=torch.zeros(2)), CoverageError, "unexpected: ghost"),
        (
            lambda w: w.update({"proj_out.bias": torch.full_like(w["proj_out.bias"], torch.nan)}),
            NonFiniteError,
            "proj_out.bias",
        ),
        (lambda w: w.update({"proj_out.weight": w["proj_out.weight"][:-1]}), Exception, "proj_out.weight"),
    ],
    ids=["missing", "unknown", "non-finite", "misshaped"],
)
def test_a_broken_checkpoint_leaves_nothing(change, error, says, dit, tmp_path):
    shutil.copytree(dit("flux1-bf16"), tmp_path / "in")
    weights = load_file(tmp_path / "in" / FILE)
    change(weights)
    save_file(weights, tmp_path / "in" / FILE)
    with pytest.raises(error, match=says):
        quantize_diffusion(tmp_path / "in", tmp_path / "out", "nvfp4")
    assert [item.name for item in tmp_path.iterdir()] == ["in"]


def test_what_is_refused(dit, embeds_file, modelopt_folder, tmp_path, capsys):
    with pytest.raises(UnsupportedError, match="quantized already"):
        quantize_diffusion(dit("flux1-fp8"), tmp_path / "out", "fp8")
    with pytest.raises(UnsupportedError, match="quantize_diffusion"):
        quantize_checkpoint(dit("flux1-bf16"), tmp_path / "out", "fp8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="not empty"):
        quantize_diffusion(dit("flux1-bf16"), tmp_path / "full", "fp8")
    out = ["--quant", "fp8", "--out", str(tmp_path / "out")]
    for arguments, says in (
        ([dit("flux1-bf16"), "--sequences", "3"], "takes no --sequences"),
        ([dit("flux1-bf16"), "--steps", "3"], "give --calibrate"),
        ([modelopt_folder("qwen3", "bf16"), "--height", "64"], "takes no --height"),
    ):
        assert main(["quantize", *map(str, arguments), *out]) == 2
        assert says in capsys.readouterr().err


def test_as_a_table(dit, embeds_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    command = ["quantize", str(dit("flux1-bf16")), "--quant", "nvfp4", "--calibrate", str(embeds_file())]
    size = ["--steps", "2", "--height", "64", "--width", "64"]
    assert main([*command, *size, "--out", str(tmp_path / "out")]) == 0
    assert "static, calibrated on 2 samples, 10 tokens of prompts" in capsys.readouterr().out


@pytest.mark.parametrize("base", ["transformer", "pipeline"])
def test_a_file_of_weights_and_its_base(base, quantize, dit, pipeline_folder, embeds_file, tensors_of, tmp_path):
    """The file brings the weights, the base everything else."""
    pipeline = pipeline_folder("flux")
    place, model = (
        (pipeline / "transformer", pipeline) if base == "pipeline" else (dit("flux1-bf16"), dit("flux1-bf16"))
    )
    shutil.copy(place / FILE, tmp_path / "weights.safetensors")
    sizes = {"dim": 48, "pooled": 32} if base == "pipeline" else {}
    calibrate = ["--calibrate", embeds_file(**sizes), "--steps", 2, "--height", 64, "--width", 64]
    command = ["--base", model, "--quant", "fp8", *calibrate, "--out", tmp_path / "out"]
    quantize(tmp_path / "weights.safetensors", *command)
    out = tmp_path / "out" / ("transformer" if base == "pipeline" else "")
    quantize_diffusion(place, tmp_path / "expected", "fp8")
    written, expected = tensors_of(out), tensors_of(tmp_path / "expected")
    assert {name for name in written if not name.endswith("input_scale")} == expected.keys()
    assert all(raw(written[name]) == raw(expected[name]) for name in expected)
    assert (tmp_path / "out" / "vae").is_dir() == (base == "pipeline")


def test_transformers_without_an_index(quant, pipeline_folder, tmp_path):
    """A folder of both transformers of Wan 2.2, and nothing else."""
    for part in ("transformer", "transformer_2"):
        shutil.copytree(pipeline_folder("wan") / part, tmp_path / "in" / part)
    quantize_diffusion(tmp_path / "in", tmp_path / "out", quant)
    assert {item.name for item in (tmp_path / "out").iterdir()} == {"transformer", "transformer_2"}
    with (
        DiffusionEngine(tmp_path / "out") as opened,
        DiffusionEngine(tmp_path / "in", EngineConfig(quant=quant)) as meant,
    ):
        assert opened.digest() == meant.digest()
