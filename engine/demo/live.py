"""What a person at the terminal sees while the demo runs."""

from collections.abc import Sequence
from types import TracebackType
from typing import Self

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table

from ..report.history import StepRecord

COLUMNS = ("step", "version", "reward", "correct", "tok/s", "train s", "swap ms", "KL", "KL static")
TITLE = "GRPO on small sums: rollouts from quantized weights"
CAPTION = "tok/s: of the rollouts. KL: (trainer || rollout), nats a token; static: with static activation scales"


class TableWords(msgspec.Struct, frozen=True):
    """What a table says around its rows."""

    columns: Sequence[str]
    title: str
    caption: str


WORDS = TableWords(COLUMNS, TITLE, CAPTION)


class LiveTable:
    """A table that grows by a row a step, with the present phase below it; plain lines where there is no terminal."""

    def __init__(self, console: Console, words: TableWords = WORDS) -> None:
        self.console, self.columns = console, words.columns
        self.table = Table(
            *words.columns,
            box=SIMPLE_HEAD,
            pad_edge=False,
            collapse_padding=True,
            title=words.title,
            caption=words.caption,
            caption_justify="left",
        )
        for column in self.table.columns:
            column.justify, column.no_wrap = "right", True
        self.spinner = Spinner("dots", "starting")
        self.live = Live(self._view(), console=console, refresh_per_second=8, transient=not console.is_terminal)

    def say(self, phase: str) -> None:
        """Name what is going on now."""
        self.spinner.update(text=phase)

    def add(self, row: Sequence[str]) -> None:
        """Show a finished step, a cell a column."""
        self.table.add_row(*row)
        if not self.console.is_terminal:
            self.console.print(
                "  ".join(f"{name} {cell}" for name, cell in zip(self.columns, row, strict=True)), soft_wrap=True
            )

    def _view(self) -> RenderableType:
        return Group(self.table, self.spinner) if self.console.is_terminal else ""

    def __enter__(self) -> Self:
        self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.live.update(self.table if self.console.is_terminal else "")
        self.live.stop()


def cells(record: StepRecord) -> list[str]:
    """One row of `COLUMNS`."""
    return [
        str(record.step),
        record.version,
        f"{record.reward:.3f}±{record.reward_error:.3f}",
        f"{record.correct:.0%}",
        f"{record.tokens_per_second:.0f}",
        f"{record.train_seconds:.1f}",
        f"{record.swap_seconds * 1000:.0f}",
        f"{record.kl:.3f}",
        "-" if record.kl_static is None else f"{record.kl_static:.3f}",
    ]
