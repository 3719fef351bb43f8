"""`rollmill generate`: sample from a language model or a diffusion transformer."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from rich.console import Console
from rich.table import Table

from ...quant import Activation, QuantName
from ..checkpoint import is_diffusers
from ..config import EngineConfig, SamplingParams
from ..errors import RequestError
from ..llm.engine import LanguageEngine
from ..types import Completion
from .generate_diffusion import SOLVERS, generate_samples
from .kinds import refuse_options, without_none

LANGUAGE = ("chat", "temperature", "max_new_tokens")
DIFFUSION = (
    "out",
    "embeds",
    "negative_prompt",
    "steps",
    "height",
    "width",
    "num_frames",
    "guidance_scale",
    "true_cfg_scale",
    "solver",
    "precision",
    "base",
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser(
        "generate",
        help="sample from a model folder: text and log-probs, or images",
        description="Samples from a language model and prints text and log-probs; or from a diffusion transformer, and "
        "writes images (of a pipeline with a VAE) or latents with their log-probs (of a transformer alone).",
    )
    parser.add_argument("model", help="folder or hub id; of a diffusion model also a transformer's folder or file")
    parser.add_argument("--prompt", action="append", help="may be repeated")
    parser.add_argument("--quant", choices=get_args(QuantName))
    parser.add_argument("--activation", choices=get_args(Activation))
    parser.add_argument("--n", type=int, default=1, help="samples of every prompt")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--json", action="store_true")
    _add_language(parser.add_argument_group("language models"))
    _add_diffusion(parser.add_argument_group("diffusion transformers"))
    parser.set_defaults(run=run)


def _add_language(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--chat", action="store_true", help="put every prompt through the chat template")
    group.add_argument("--temperature", type=float, help="default: 1.0")
    group.add_argument("--max-new-tokens", type=int, help="default: 64")


def _add_diffusion(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "-o",
        "--out",
        type=Path,
        metavar="FILE",
        help="image (.png, ...; numbered where there are several) or .safetensors with latents and log-probs; "
        "default: image.png, latents.safetensors without a VAE",
    )
    group.add_argument(
        "--embeds",
        type=Path,
        metavar="FILE",
        help="in place of --prompt: safetensors with prompt_embeds [n, tokens, dim], pooled_prompt_embeds [n, dim], "
        "negative_prompt_embeds, ...",
    )
    group.add_argument("--negative-prompt", metavar="TEXT")
    group.add_argument("--steps", type=int, help="default: 28")
    group.add_argument("--height", type=int, help="pixels")
    group.add_argument("--width", type=int, help="pixels")
    group.add_argument("--num-frames", type=int, help="of a video")
    group.add_argument("--guidance-scale", type=float, help="of models that were distilled with one")
    group.add_argument("--true-cfg-scale", type=float, help="classifier-free guidance: two forwards a step")
    group.add_argument("--solver", choices=SOLVERS, help="default: ode")
    group.add_argument("--precision", choices=("quantized", "weight_only", "bf16"), help="bf16 keeps a BF16 copy")
    group.add_argument("--base", metavar="MODEL", help="pipeline that brings what a file of weights lacks")


def run(arguments: argparse.Namespace) -> None:
    """Generate with whichever half of the engine the model needs."""
    if is_diffusers(arguments.model):
        refuse_options(arguments, LANGUAGE, "diffusion model")
        generate_samples(arguments)
    else:
        refuse_options(arguments, DIFFUSION, "language model")
        _generate_text(arguments)


def _generate_text(arguments: argparse.Namespace) -> None:
    if not arguments.prompt:
        raise RequestError("give at least one --prompt")
    prompts = arguments.prompt
    if arguments.chat:
        prompts = [[{"role": "user", "content": prompt}] for prompt in prompts]
    chosen = without_none(temperature=arguments.temperature, seed=arguments.seed)
    params = SamplingParams(
        n=arguments.n, max_new_tokens=64 if arguments.max_new_tokens is None else arguments.max_new_tokens, **chosen
    )
    config = EngineConfig(quant=arguments.quant, activation=arguments.activation)
    with LanguageEngine(arguments.model, config) as engine:
        outs = engine.generate(prompts, params)
        shown = [prompt for prompt in arguments.prompt for _ in range(arguments.n)]
        if arguments.json:
            print(json.dumps([_as_json(prompt, out) for prompt, out in zip(shown, outs, strict=True)], indent=2))
        else:
            _print_completions(engine, shown, outs)


def _as_json(prompt: str, out: Completion) -> dict[str, object]:
    assert out.logprobs is not None
    return {
        "prompt": prompt,
        "text": out.text,
        "token_ids": out.token_ids,
        "logprobs": out.logprobs.tolist(),
        "finish_reason": out.finish_reason,
        "seed": out.seed,
        "weight_version": out.weight_versions[0].version,
    }


def _print_completions(engine: LanguageEngine, prompts: Sequence[str], outs: Sequence[Completion]) -> None:
    console = Console(highlight=False)
    for prompt, out in zip(prompts, outs, strict=True):
        assert engine.tokenizer is not None
        assert out.logprobs is not None
        console.rule(f"{prompt[:60]!r}  seed {out.seed}", align="left")
        console.print(out.text, markup=False)
        table = Table("token", "id", "log-prob", box=None)
        for token, logprob in zip(out.token_ids, out.logprobs.tolist(), strict=True):
            table.add_row(repr(engine.tokenizer.decode([token])), str(token), f"{logprob:.4f}")
        console.print(table, markup=False)
        console.print(f"{out.finish_reason}, mean log-prob {out.logprobs.mean():.4f}")
