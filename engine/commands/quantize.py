"""`rollmill quantize`: a BF16 checkpoint -> FP8 or NVFP4 in ModelOpt's layout."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..export import ExportReport, QuantFormat, quantize_checkpoint

PER_TOKEN = "no input_scale was written (no --calibrate): engines quantize activations per token, online"


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Declare the command's arguments."""
    parser = commands.add_parser(
        "quantize",
        help="write a BF16 checkpoint as FP8 or NVFP4, in ModelOpt's layout",
        description="Writes a BF16 checkpoint as FP8 or NVFP4 in ModelOpt's layout. With --calibrate, static "
        "activation scales are measured over your texts; without, no input_scale is written, and engines that open "
        "the checkpoint quantize activations per token.",
    )
    parser.add_argument("model", help="BF16 model folder or hub id")
    parser.add_argument("--quant", choices=get_args(QuantFormat), required=True)
    parser.add_argument(
        "--keep",
        action="append",
        metavar="PATTERN",
        help="modules that stay in BF16: whole dotted names, * matches anything; may be repeated; replaces the "
        "default, lm_head (embeddings, norms and routers always stay)",
    )
    parser.add_argument(
        "--calibrate", type=Path, metavar="FILE", help='texts: a text file, or .jsonl with "text" or "messages"'
    )
    parser.add_argument("--tokens-per-sequence", type=int, default=512)
    parser.add_argument("--sequences", type=int, default=64, help="at most so many")
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

        report = quantize_checkpoint(
            arguments.model,
            arguments.out,
            arguments.quant,
            keep=arguments.keep,
            texts=arguments.calibrate,
            tokens_per_sequence=arguments.tokens_per_sequence,
            sequences=arguments.sequences,
            device=arguments.device,
            progress=show,
        )
    if arguments.json:
        print(msgspec.json.format(msgspec.json.encode(report), indent=2).decode())
    else:
        _print(report)


def _print(report: ExportReport) -> None:
    table = Table(show_header=False, box=None)
    static = f"static, calibrated on {report.calibration_sequences} sequences, {report.calibration_tokens} tokens"
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
