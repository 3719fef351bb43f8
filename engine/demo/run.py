"""`rollmill demo`: a few GRPO steps whose rollouts come from quantized weights, swapped after every optimizer step."""

from pathlib import Path

from rich.console import Console
from transformers.utils import logging as transformers_logging

from ..env import cache_home
from ..report.history import History
from ..report.html import write_report
from .config import DemoConfig
from .live import LiveTable
from .loop import DemoLoop
from .model import build_model
from .stopwatch import Stopwatch


def run_demo(
    model: Path | None = None,
    config: DemoConfig | None = None,
    *,
    out: Path = Path("demo-output"),
    cache: Path | None = None,
    console: Console | None = None,
) -> History:
    """Train for a few steps, write `report.html` and `history.json` into `out`, and return the history.

    `model`: a Mixtral folder in BF16 with a chat template; None makes one out of SmolLM2-135M-Instruct, in `cache`.
    """
    config, console = config or DemoConfig(), console or Console()
    transformers_logging.disable_progress_bar()
    with Stopwatch() as total:
        with Stopwatch() as building:
            folder = model or build_model(
                cache or Path(cache_home()) / "rollmill", lambda line: console.print(line, style="dim", soft_wrap=True)
            )
        with LiveTable(console) as live, DemoLoop(folder, config, live) as loop:
            history = loop.run()
    history.setup = {"model": building.seconds, **history.setup}
    history.total_seconds = total.seconds
    out.mkdir(parents=True, exist_ok=True)
    history.write_json(out / "history.json")
    report = write_report(history, out / "report.html")
    spent = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in history.setup.items())
    console.print(f"Set-up: {spent}; {total.seconds:.0f} s in all. Report: {report}", soft_wrap=True)
    return history
