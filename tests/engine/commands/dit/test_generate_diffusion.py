"""`rollmill generate` of diffusion transformers: what it writes, and how it fails."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from rollmill.engine import DiffusionEngine, DiffusionParams, EngineConfig, FlowSDE
from rollmill.engine.cli import main
from rollmill.engine.dit.embeds_file import read_embeds

SMALL = ["--steps", "2", "--height", "32", "--width", "48"]


@pytest.fixture
def generate(capsys):
    """Run the command; what `--json` printed."""

    def run(*arguments):
        assert main(["generate", *map(str, arguments), "--json"]) == 0, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def error(capsys):
    """Run the command; its one paragraph on stderr."""

    def run(*arguments):
        assert main(["generate", *map(str, arguments)]) == 2
        said = capsys.readouterr().err
        assert said.startswith("rollmill: ")
        assert "Traceback" not in said
        return said

    return run


def pixels(file):
    return torch.tensor(list(Image.open(file).convert("RGB").tobytes()), dtype=torch.uint8)


def test_an_image_is_what_the_engine_makes(generate, pipeline_folder, tmp_path):
    folder, out = pipeline_folder("flux"), tmp_path / "new" / "image.png"
    rows = generate(folder, "--prompt", "w5 w6", *SMALL, "--seed", 7, "--quant", "nvfp4", "-o", out)
    assert [row["files"] for row in rows] == [[str(out)]]
    params = DiffusionParams(steps=2, height=32, width=48, init_seed=7, step_seed=7, want=("image",))
    with DiffusionEngine(folder, EngineConfig(quant="nvfp4")) as engine:
        sample = engine.generate("w5 w6", params)[0]
    assert Image.open(out).size == (48, 32)
    assert torch.equal(pixels(out), sample.image.flatten())
    assert rows[0]["seeds"] == {"init": sample.seeds.init, "step": sample.seeds.step}


def test_several_samples_are_numbered(generate, pipeline_folder, tmp_path):
    prompts = ["--prompt", "w5", "--prompt", "w9 w8"]
    rows = generate(pipeline_folder("flux"), *prompts, *SMALL, "--n", 2, "--seed", 1, "-o", tmp_path / "a.png")
    assert [row["prompt"] for row in rows] == ["w5", "w5", "w9 w8", "w9 w8"]
    assert [row["files"] for row in rows] == [[str(tmp_path / f"a-{i}.png")] for i in range(4)]
    assert len({pixels(row["files"][0]).numpy().tobytes() for row in rows}) == 4


def test_a_video_is_numbered_frames(generate, pipeline_folder, tmp_path):
    video = ["--num-frames", 5, "--true-cfg-scale", 3, "--negative-prompt", "w3"]
    rows = generate(pipeline_folder("wan"), "--prompt", "w5", *SMALL, *video, "-o", tmp_path / "v.png")
    assert rows[0]["files"] == [str(tmp_path / f"v-frame-{i:04}.png") for i in range(5)]
    assert all(Image.open(file).size == (48, 32) for file in rows[0]["files"])


@pytest.mark.parametrize("part", ["folder", "transformer"])
@pytest.mark.parametrize("name", ["flux1-bf16", "flux1-fp8", "flux1-nvfp4", "wan-bf16", "wan-fp8", "wan-nvfp4"])
def test_every_fixture_without_a_flag(name, part, generate, dit, embeds_file, tmp_path):
    model = dit(name) if part == "transformer" else dit(name).parent
    out = tmp_path / "latents.safetensors"
    embeds = embeds_file(pooled=64 if "flux" in name else None)
    size = ["--height", 64, "--width", 64, "--steps", 2]
    rows = generate(model, "--embeds", embeds, *size, "--solver", "sde", "--n", 2, "--seed", 3, "-o", out)
    assert [row["prompt"] for row in rows] == [0, 0, 1, 1]
    with safe_open(out, "pt") as file:
        about = {key: json.loads(value) for key, value in file.metadata().items()}
    assert about["quant"] == sorted({"bf16", name.partition("-")[2]})
    assert (about["window"], about["prompts"]) == ([0, 2], [0, 0, 1, 1])
    params = DiffusionParams(
        steps=2, height=64, width=64, n=2, solver=FlowSDE(), init_seed=3, step_seed=3, want=("latents", "logprobs")
    )
    with DiffusionEngine(dit(name)) as engine:
        samples = engine.generate(read_embeds(embeds), params)
    found = load_file(out)
    assert torch.equal(found["latents"], torch.stack([sample.latents for sample in samples]))
    assert torch.equal(found["logprobs"], torch.stack([sample.logprobs for sample in samples]))
    assert torch.equal(found["sigmas"], samples[0].sigmas)
    assert torch.equal(found["timesteps"], samples[0].timesteps)
    assert torch.equal(found["stds"], samples[0].stds)
    assert about["seeds"] == [{"init": sample.seeds.init, "step": sample.seeds.step} for sample in samples]
    assert found["latents"].isfinite().all()


def test_latents_of_a_pipeline(generate, pipeline_folder, tmp_path):
    out = tmp_path / "l.safetensors"
    generate(pipeline_folder("flux"), "--prompt", "w5", *SMALL, "-o", out)
    found = load_file(out)
    assert found["latents"].shape == (1, 3, 16 * 24 // 4, 16)
    assert found.keys() == {"latents", "sigmas", "timesteps"}, "the ODE draws nothing"


@pytest.mark.parametrize("precision", ["bf16", "weight_only", "quantized"])
def test_precision(precision, generate, dit, embeds_file, tmp_path):
    size = ["--height", 64, "--width", 64, "--steps", 2, "--seed", 1]
    out = tmp_path / "l.safetensors"
    generate(dit("flux1-bf16"), "--embeds", embeds_file(), *size, "--quant", "fp8", "--precision", precision, "-o", out)
    plain = tmp_path / "plain.safetensors"
    generate(dit("flux1-bf16"), "--embeds", embeds_file(), *size, "-o", plain)
    assert torch.equal(load_file(out)["latents"], load_file(plain)["latents"]) == (precision == "bf16")


@pytest.mark.parametrize("solver", ["ode", "sde", "cps", "dance"])
def test_solvers_and_negative_embeds(solver, generate, dit, embeds_file, tmp_path):
    out = tmp_path / f"{solver}.safetensors"
    size = ["--height", 64, "--width", 64, "--steps", 3, "--true-cfg-scale", 2]
    embeds = embeds_file(pooled=None, negative=True)
    generate(dit("wan-nvfp4"), "--embeds", embeds, *size, "--solver", solver, "-o", out)
    drawn = {"ode": 0, "sde": 3, "cps": 2, "dance": 3}[solver]
    found = load_file(out)
    assert ("logprobs" in found) == bool(drawn)
    if drawn:
        assert found["logprobs"].shape == (2, drawn)


def test_as_a_table(pipeline_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert (
        main(["generate", str(pipeline_folder("flux")), "--prompt", "w5", *SMALL, "-o", str(tmp_path / "i.png")]) == 0
    )
    printed = capsys.readouterr().out
    assert str(tmp_path / "i.png") in printed
    assert "mean log-prob" in printed


def test_what_a_transformer_alone_cannot_do(error, dit, embeds_file, tmp_path):
    assert "no VAE" in error(dit("flux1-fp8"), "--embeds", embeds_file(), "-o", tmp_path / "i.png")
    assert "no text encoder" in error(dit("flux1-fp8"), "--prompt", "x")
    assert not list(tmp_path.glob("*.png"))


def test_requests_that_make_no_sense(error, dit, pipeline_folder, embeds_file, tmp_path):
    model, embeds = dit("flux1-fp8"), embeds_file()
    assert "either --prompt or --embeds" in error(model)
    assert "either --prompt or --embeds" in error(model, "--prompt", "x", "--embeds", embeds)
    assert "negative_prompt_embeds" in error(model, "--embeds", embeds, "--negative-prompt", "x")
    assert "takes no --temperature, --max-new-tokens" in error(
        model, "--embeds", embeds, "--temperature", 0, "--max-new-tokens", 3
    )
    assert "images are .png" in error(pipeline_folder("flux"), "--prompt", "w5", "-o", tmp_path / "image.gguf")
    assert "multiples of" in error(model, "--embeds", embeds, "--height", 13, "-o", tmp_path / "l.safetensors")
    assert "pooled" in error(model, "--embeds", embeds_file("p", pooled=None), "-o", tmp_path / "l.safetensors")


def test_a_language_model_takes_no_diffusion_options(error, modelopt_folder):
    said = error(modelopt_folder("qwen3", "bf16"), "--prompt", "x", "--steps", 3, "--out", "i.png")
    assert "takes no --out, --steps" in said
    assert "at least one --prompt" in error(modelopt_folder("qwen3", "bf16"))
