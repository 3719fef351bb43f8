"""`rollmill demo dit`: Flow-GRPO whose rollouts come from quantized weights, swapped after every optimizer step."""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console

from ...env import cache_home
from ...report.dit import DitHistory, write_dit_report
from ..live import LiveTable
from ..stopwatch import Stopwatch
from .config import DitDemoConfig
from .live import WORDS
from .loop import DitDemoLoop
from .model import build_model


def run_dit_demo(
    config: DitDemoConfig | None = None,
    *,
    out: Path = Path("demo-output"),
    cache: Path | None = None,
    console: Console | None = None,
) -> DitHistory:
    """Train for a few steps, write `report.html` and `history.json` into `out`, and return the history.

    The model is trained at the first call (about two minutes of one core) and kept in `cache`.
    """
    config, console = config or DitDemoConfig(), console or Console()
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with Stopwatch() as total:
            history = _train(config, cache or Path(cache_home()) / "rollmill", console)
    finally:
        torch.set_num_threads(threads)
    history.total_seconds = total.seconds
    out.mkdir(parents=True, exist_ok=True)
    history.write_json(out / "history.json")
    report = write_dit_report(history, out / "report.html")
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in history.setup.items())
    console.print(f"Set-up: {spent}; {total.seconds:.0f} s in all. Report: {report}", soft_wrap=True)
    return history


def _train(config: DitDemoConfig, cache: Path, console: Console) -> DitHistory:
    with Stopwatch() as building:
        folder = build_model(cache, lambda line: console.print(line, style="dim", soft_wrap=True), config.recipe)
    with LiveTable(console, WORDS) as live, DitDemoLoop(folder, config, live) as loop:
        history = loop.run()
    history.setup = {"model": building.seconds, **history.setup}
    return history
