"""`rollmill generate` of diffusion transformers: images, frames, or latents with their log-probs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from ..config import EngineConfig
from ..dit.embeds_file import read_embeds
from ..dit.engine import DiffusionEngine
from ..dit.families import Embeds
from ..dit.params import ODE, DanceSDE, DiffusionParams, FlowCPS, FlowSDE, Solver
from ..dit.sample import DiffusionSample
from ..errors import RequestError
from .kinds import without_none

SOLVERS: dict[str, type[Solver]] = {"ode": ODE, "sde": FlowSDE, "cps": FlowCPS, "dance": DanceSDE}
LATENTS = ".safetensors"


def generate_samples(arguments: argparse.Namespace) -> None:
    """Draw the samples, write their files, print what was written."""
    _check_request(arguments)
    config = EngineConfig(
        quant=arguments.quant,
        activation=arguments.activation,
        base=arguments.base,
        dual="bf16" if arguments.precision == "bf16" else None,
    )
    prompts = arguments.prompt if arguments.embeds is None else read_embeds(arguments.embeds)
    with DiffusionEngine(arguments.model, config) as engine:
        out = _output(engine, arguments.out)
        samples = engine.generate(prompts, _params(arguments, prompts, latents=out.suffix == LATENTS))
        if out.suffix == LATENTS:
            files = [[_write_latents(out, engine, samples)]] * len(samples)
        else:
            files = [_write_images(out, i, len(samples), sample) for i, sample in enumerate(samples)]
        _print(arguments, samples, files)


def _check_request(arguments: argparse.Namespace) -> None:
    if (arguments.prompt is None) == (arguments.embeds is None):
        raise RequestError("give either --prompt or --embeds")
    if arguments.negative_prompt is not None and arguments.embeds is not None:
        raise RequestError("--negative-prompt goes with --prompt; a file of embeds holds negative_prompt_embeds")
    from PIL import Image

    out = arguments.out
    if out is not None and out.suffix.lower() not in (LATENTS, *Image.registered_extensions()):
        raise RequestError(f"{out}: images are .png, .jpg, .webp ..., latents {LATENTS}")


def _params(
    arguments: argparse.Namespace, prompts: Sequence[str] | Sequence[Embeds], *, latents: bool
) -> DiffusionParams:
    names = (
        "steps",
        "height",
        "width",
        "num_frames",
        "guidance_scale",
        "true_cfg_scale",
        "negative_prompt",
        "precision",
    )
    chosen: dict[str, Any] = without_none(**{name: getattr(arguments, name) for name in names})
    seeds = {} if arguments.seed is None else {"init_seed": arguments.seed, "step_seed": arguments.seed}
    return DiffusionParams(
        n=arguments.n,
        solver=SOLVERS[arguments.solver or "ode"](),
        want=("latents", "logprobs") if latents else ("image", "logprobs"),
        **chosen,
        **seeds,
    )


def _output(engine: DiffusionEngine, out: Path | None) -> Path:
    """Where to write; `RequestError` for images without a VAE."""
    draws = engine.pipeline is not None and getattr(engine.pipeline, "vae", None) is not None
    out = out or Path("image.png" if draws else f"latents{LATENTS}")
    if out.suffix == LATENTS:
        return out
    if not draws:
        raise RequestError(f"{out}: a transformer alone has no VAE to make images; write latents, -o latents{LATENTS}")
    return out


def _write_images(out: Path, index: int, count: int, sample: DiffusionSample) -> list[str]:
    """`image.png`; of several samples `image-3.png`; of a video `image-3-frame-0012.png`."""
    from PIL import Image

    assert sample.image is not None
    stem = out.stem if count == 1 else f"{out.stem}-{index:0{len(str(count - 1))}}"
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    pictures = {f"{stem}{out.suffix}": sample.image}
    if sample.image.ndim == 4:
        pictures = {f"{stem}-frame-{i:04}{out.suffix}": frame for i, frame in enumerate(sample.image)}
    for name, picture in pictures.items():
        Image.fromarray(picture.numpy()).save(out.with_name(name))
    return [str(out.with_name(name)) for name in pictures]


def _write_latents(out: Path, engine: DiffusionEngine, samples: Sequence[DiffusionSample]) -> str:
    """One file for all samples: latents [samples, steps + 1, ...] as the transformer takes them, sigmas, timesteps, and
    of drawn steps logprobs and stds [samples, window]; the rest is JSON in the header's metadata."""
    first = samples[0]
    tensors: dict[str, Tensor] = {
        "latents": torch.stack([sample.latents for sample in samples]),
        "sigmas": first.sigmas,
        "timesteps": first.timesteps,
    }
    if first.logprobs is not None:
        tensors["logprobs"] = torch.stack([sample.logprobs for sample in samples if sample.logprobs is not None])
        tensors["stds"] = first.stds
    about = {
        "model": engine.info()["transformers"],
        "quant": engine.info()["quant"],
        "weight_version": first.weight_version,
        "params": msgspec.to_builtins(first.params),
        "window": [first.window.start, first.window.stop],
        "precisions": list(first.precisions),
        "size": msgspec.to_builtins(first.size),
        "prompts": [sample.prompt_index for sample in samples],
        "seeds": [msgspec.to_builtins(sample.seeds) for sample in samples],
    }
    out.absolute().parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: value.cpu().contiguous() for name, value in tensors.items()}
    save_file(contiguous, out, {key: json.dumps(value) for key, value in about.items()})
    return str(out)


def _print(arguments: argparse.Namespace, samples: Sequence[DiffusionSample], files: Sequence[Sequence[str]]) -> None:
    rows = [
        {
            "prompt": arguments.prompt[sample.prompt_index] if arguments.prompt else sample.prompt_index,
            "files": list(names),
            "seeds": msgspec.to_builtins(sample.seeds),
            "logprobs": None if sample.logprobs is None else sample.logprobs.tolist(),
            "weight_version": sample.weight_version,
        }
        for sample, names in zip(samples, files, strict=True)
    ]
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("prompt", "file", "seeds", "mean log-prob", box=None)
    for sample, row in zip(samples, rows, strict=True):
        names = row["files"]
        shown = names[0] if len(names) == 1 else f"{names[0]} ... {names[-1]}"
        logprob = "-" if sample.logprobs is None else f"{float(sample.logprobs.mean()):.4f}"
        table.add_row(str(row["prompt"])[:60], shown, f"{sample.seeds.init}, {sample.seeds.step}", logprob)
    Console(highlight=False).print(table, markup=False)
