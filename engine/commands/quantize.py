"""`rollmill quantize`: a BF16 checkpoint, of a language model or a diffusion transformer -> FP8 or NVFP4 in ModelOpt's
layout."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, get_args

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ...quant import ConfigError
from ..checkpoint import is_diffusers
from ..dit.params import DiffusionParams
from ..export import ExportReport, QuantFormat, quantize_checkpoint, quantize_diffusion
from ..export.diffusion import CALIBRATION_STEPS
from ..export.report import Progress as ShowProgress
from .kinds import refuse_options, without_none

LANGUAGE = ("tokens_per_sequence", "sequences")
DIFFUSION = ("steps", "height", "width", "num_frames", "guidance_scale", "true_cfg_scale")

PER_TOKEN = "no input_scale was written (no --calibrate): engines quantize activations per token, online"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser(
        "quantize",
        help="write a BF16 checkpoint as FP8 or NVFP4, in ModelOpt's layout",
        description="Writes a BF16 checkpoint as FP8 or NVFP4 in ModelOpt's layout. With --calibrate, static "
        "activation scales are measured over your texts, or over rollouts from your prompt embeds; without, no "
        "input_scale is written, and engines that open the checkpoint quantize activations per token.",
    )
    parser.add_argument("model", help="BF16 folder or hub id: a language model, a transformer or a diffusers pipeline")
    parser.add_argument("--quant", choices=get_args(QuantFormat), required=True)
    parser.add_argument(
        "--keep",
        action="append",
        metavar="PATTERN",
        help="modules that stay in BF16: whole dotted names, * matches anything; may be repeated; replaces the "
        "default: lm_head (embeddings, norms and routers always stay), or what ModelOpt keeps of a diffusion model",
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help='texts: a text file, or .jsonl with "text" or "messages"; of a diffusion model a safetensors file with '
        "prompt_embeds [n, tokens, dim] and, as the model reads them, pooled_prompt_embeds [n, dim]",
    )
    parser.add_argument("--base", metavar="MODEL", help="diffusion models: brings what a file of weights lacks")
    language = parser.add_argument_group("calibration of language models")
    language.add_argument("--tokens-per-sequence", type=int, help="default: 512")
    language.add_argument("--sequences", type=int, help="at most so many; default: 64")
    diffusion = parser.add_argument_group("calibration of diffusion models: one sample a prompt")
    diffusion.add_argument("--steps", type=int, help=f"default: {CALIBRATION_STEPS}")
    diffusion.add_argument("--height", type=int, help="pixels")
    diffusion.add_argument("--width", type=int, help="pixels")
    diffusion.add_argument("--num-frames", type=int, help="of a video")
    diffusion.add_argument("--guidance-scale", type=float)
    diffusion.add_argument("--true-cfg-scale", type=float)
    parser.add_argument("--device", default="auto", help="where calibration runs: auto, cpu, cuda, cuda:N")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="new or empty folder")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Quantize with a progress bar on stderr, then print what was written."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks = {}

        def show(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done)

        report = _quantize(arguments, show)
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        _print(report)


def _quantize(arguments: argparse.Namespace, show: ShowProgress) -> ExportReport:
    to: dict[str, Any] = {"out": arguments.out, "quant": arguments.quant, "keep": arguments.keep}
    to |= {"device": arguments.device, "progress": show}
    if not is_diffusers(arguments.model):
        refuse_options(arguments, (*DIFFUSION, "base"), "language model")
        chosen = without_none(**{name: getattr(arguments, name) for name in LANGUAGE})
        return quantize_checkpoint(arguments.model, texts=arguments.calibrate, **to, **chosen)
    refuse_options(arguments, LANGUAGE, "diffusion model")
    chosen = without_none(**{name: getattr(arguments, name) for name in DIFFUSION})
    if chosen and arguments.calibrate is None:
        raise ConfigError(f"{', '.join(chosen)} say how to calibrate: give --calibrate")
    params = DiffusionParams(**{"steps": CALIBRATION_STEPS, **chosen})
    to |= {"embeds": arguments.calibrate, "params": params, "base": arguments.base}
    return quantize_diffusion(arguments.model, **to)


def _print(report: ExportReport) -> None:
    table = Table(show_header=False, box=None)
    over = "samples" if report.is_diffusion else "sequences"
    tokens = f"{report.calibration_tokens} tokens" + (" of prompts" if report.is_diffusion else "")
    static = f"static, calibrated on {report.calibration_sequences} {over}, {tokens}"
    rows = {
        "written": f"{report.folder} ({report.files} safetensors, {report.tensors} tensors)",
        "weights": f"{report.quant}, {report.modules} modules; {len(report.kept)} kept in BF16",
        "activations": PER_TOKEN if report.calibration_tokens is None else static,
        "size": f"{report.bytes_in / 1e6:.1f} MB -> {report.bytes_out / 1e6:.1f} MB",
        "seconds": f"{report.seconds:.1f}",
        **{f"warning {i}": warning for i, warning in enumerate(report.warnings, 1)},
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console(highlight=False).print(table, markup=False)
