"""A progress bar for long rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def show_samples(total: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """A function to call with the number of samples that are done, after each batch."""
    if not shown:
        yield lambda _: None
        return
    columns = TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("samples", total=total)
        yield lambda count: bar.advance(task, count)
