"""A progress bar for long batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .llm.request import Request


@contextmanager
def show_progress(requests: Sequence[Request], *, shown: bool) -> Iterator[Callable[[], None] | None]:
    """A function to call after each step, or None where nothing is to be shown."""
    if not shown:
        yield None
        return
    columns = (
        TextColumn("completions"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[tokens]} tokens"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("completions", total=len(requests), tokens=0)

        def on_step() -> None:
            ended = sum(request.finished for request in requests)
            bar.update(task, completed=ended, tokens=sum(request.num_new for request in requests))

        yield on_step
