"""One self-contained HTML page from a `History`."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from . import pictures
from .history import History

# picture, heading, what one sees
FIGURES: tuple[tuple[Callable[[History], str], str, str], ...] = (
    (
        pictures.reward_picture,
        "Reward",
        "Every step draws fresh prompts and samples them from the quantized policy of that version. A rising line "
        "says that the trainer's BF16 updates arrive in the quantized rollouts. The first thing learned is to answer "
        "briefly with a number; the dashed line shows whether the number is right.",
    ),
    (
        pictures.kl_picture,
        "Distance between trainer and rollouts",
        "Exact KL(trainer || rollout) over full distributions, on completion tokens of a few of the step's own "
        "sequences. It is what quantization costs, and what truncated importance sampling corrects for. Static scales "
        "were calibrated on step 0 and receive the same swaps: the two lines stay together as long as no activation "
        "outgrows its static scale; per-token scales have nothing to outgrow. So few tokens make a rough "
        "estimate: small differences are noise.",
    ),
    (
        pictures.swap_picture,
        "Swaps",
        "Every optimizer step sends every parameter in BF16; the engine quantizes, packs and flips to the new version. "
        "Generation pauses for the commit only.",
    ),
    (
        pictures.time_picture,
        "Time by step",
        "Wall-clock time of a step. Measuring is the demo's own: a training run would not compute exact KL or keep a "
        "second engine.",
    ),
    (
        pictures.error_picture,
        "Quantization error of the weights",
        "RMS of (BF16 weight - dequantized weight), relative to the weight's RMS, after the last step. "
        "Mind the axis: it does not start at zero.",
    ),
)

COLUMNS = (
    "step",
    "version",
    "reward",
    "correct",
    "ended",
    "tokens",
    "tok/s",
    "KL",
    "KL, static",
    "ratio",
    "cut",
    "rollout s",
    "train s",
    "swap s",
)


def write_report(history: History, path: Path) -> Path:
    """Write the page to `path` and return it. The history must hold a step at least."""
    completions = table(("prompt", "before training", "reward", "after training", "reward"), pairs(history))
    return write_page(
        path,
        title=f"{history.model}, {history.quant}",
        summary=summary(history),
        figures="".join(figure(draw(history), *words) for draw, *words in FIGURES) + set_up(history),
        steps=table(COLUMNS, step_rows(history)),
        more=f'<section class="completions"><h2>Completions</h2>{completions}</section>',
    )


def write_page(
    path: Path, *, title: str, summary: str, figures: str, steps: str, more: str = "", style: str = ""
) -> Path:
    """Fill the page with parts in HTML (`title` in plain text, `style` in CSS) and write it."""
    page = Template(resources.files(__name__.rpartition(".")[0]).joinpath("page.html").read_text())
    parts = {"summary": summary, "figures": figures, "steps": steps, "more": more, "style": style}
    path.write_text(page.substitute(title=escape(title), **parts))
    return path


def summary(history: History) -> str:
    """The headline numbers, as cards."""
    steps = history.steps
    ends = min(3, len(steps))
    first, last = (statistics.fmean(s.reward for s in part) for part in (steps[:ends], steps[-ends:]))
    cards = {
        f"mean reward, first and last {ends} steps": f"{first:.2f} → {last:.2f}",
        "right numbers, first and last step": f"{steps[0].correct:.0%} → {steps[-1].correct:.0%}",
        "rollout tokens per second, median": f"{statistics.median(s.tokens_per_second for s in steps):.0f}",
        "swap seconds, median": f"{statistics.median(s.swap_seconds for s in steps):.1f}",
        "KL(trainer || rollout), mean": f"{statistics.fmean(s.kl for s in steps):.3f}",
        "seconds in all, set-up included": f"{history.total_seconds:.0f}",
    }
    return headline(f"seed {history.seed}; trained: {history.trained}", cards)


def headline(facts: str, cards: Mapping[str, str]) -> str:
    """A line of facts, and a card for every number: what it is -> its value."""
    shown = "".join(f"<div><b>{value}</b><span>{escape(name)}</span></div>" for name, value in cards.items())
    return f'<p class="facts">{escape(facts)}</p><div class="cards">{shown}</div>'


def figure(drawn: str, heading: str, caption: str) -> str:
    return f"<figure><h2>{heading}</h2>{drawn}<figcaption>{escape(caption)}</figcaption></figure>"


def set_up(history: History) -> str:
    """What ran before the first step, in seconds."""
    rows = [(name, f"{seconds:.1f}") for name, seconds in history.setup.items()]
    caption = (
        "The model is downloaded and upcycled once, then cached. Opening an engine is its first swap: a cold load "
        "takes the same path. The second engine's time includes calibration, which per-token scales do without."
    )
    return figure(table(("opened", "seconds"), rows), "Set-up", caption)


def step_rows(history: History) -> list[tuple[str, ...]]:
    """The step table's cells, in the order of `COLUMNS`."""
    return [
        (
            str(s.step),
            s.version,
            f"{s.reward:.3f} ± {s.reward_error:.3f}",
            f"{s.correct:.0%}",
            f"{s.ended:.0%}",
            f"{s.mean_tokens:.1f}",
            f"{s.tokens_per_second:.0f}",
            f"{s.kl:.3f}",
            "" if s.kl_static is None else f"{s.kl_static:.3f}",
            f"{s.mean_ratio:.2f}",
            f"{s.truncated:.1%}",
            f"{s.rollout_seconds:.1f}",
            f"{s.train_seconds:.1f}",
            f"{s.swap_seconds:.1f}",
        )
        for s in history.steps
    ]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def pairs(history: History) -> list[tuple[str, ...]]:
    """Prompt, completion and reward before training, the same after it."""
    return [
        (old.prompt, old.text, f"{old.reward:.2f}", new.text, f"{new.reward:.2f}")
        for old, new in zip(history.before, history.after, strict=True)
    ]
