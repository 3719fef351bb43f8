"""One self-contained HTML page from a `DitHistory`."""

import statistics
from collections.abc import Callable
from pathlib import Path

from ..html import figure, headline, table, write_page
from . import images, pictures
from .history import DitHistory

# picture, heading, what one sees
FIGURES: tuple[tuple[Callable[[DitHistory], str], str, str], ...] = (
    (
        pictures.reward_picture,
        "Reward",
        "The reward of an image is its mean ink (0 to 1) if the judge still reads the digit that was asked for, else "
        "0; every step draws fresh images from the quantized policy of that version. The grey line is a judge that "
        "learned from other images and gives no rewards: where it falls behind, the policy pleases its judge more than "
        "it draws digits.",
    ),
    (
        pictures.gap_picture,
        "Log-probs of rollouts and trainer, by training step",
        "Mean |difference| between the log-probs that came with the quantized rollouts and the trainer's own, of the "
        "same stored trajectories. It is what quantization alone does, next to the clip range of the ratio: the "
        "trainer computes the old log-probs itself, and never takes the rollouts'. The table says what share of them "
        "quantization alone would carry beyond the clip range.",
    ),
    (
        pictures.logprob_picture,
        "Log-probs by denoising step",
        "The same by denoising step, after training: the last steps have the least noise, so an equal error of the "
        "velocity weighs most there.",
    ),
    (
        pictures.scatter_picture,
        "Rewards, quantized against BF16",
        "The trained policy draws the same noise in BF16 and in each format; a dot is a pair. Group-relative "
        "advantages need the order of rewards only. Dots on an axis are digits that the judge read in one precision "
        "and not in the other.",
    ),
    (
        pictures.swap_picture,
        "Swaps",
        "Every optimizer step sends every parameter in BF16; the engine quantizes, packs and flips to the new version. "
        "Generation pauses for the commit only.",
    ),
    (pictures.time_picture, "Time by step", "Wall-clock time of a step."),
)

COLUMNS = (
    "step",
    "version",
    "reward",
    "right",
    "right, 2nd judge",
    "images/s",
    "log-prob gap",
    "beyond clip",
    "KL to start",
    "rollout s",
    "train s",
    "swap ms",
)


def write_dit_report(history: DitHistory, path: Path) -> Path:
    """Write the page to `path` and return it. The history must hold a step and a comparison."""
    return write_page(
        path,
        title=f"{history.model}, {history.quant}",
        summary=summary(history),
        figures="".join(figure(draw(history), *words) for draw, *words in FIGURES) + set_up(history),
        steps=table(COLUMNS, step_rows(history)),
        more=comparison(history) + strips(history) + sheets(history),
        style=images.STYLE,
    )


def summary(history: DitHistory) -> str:
    """The headline numbers, as cards."""
    steps = history.steps
    ends = min(3, len(steps))
    first, last = (statistics.fmean(s.reward for s in part) for part in (steps[:ends], steps[-ends:]))
    gaps = [gap for s in steps for gap in s.logprob_gap]
    cards = {
        f"mean reward, first and last {ends} steps": f"{first:.2f} → {last:.2f}",
        "right digits, first and last step": f"{steps[0].right:.0%} → {steps[-1].right:.0%}",
        "images per second, median": f"{statistics.median(s.images_per_second for s in steps):.0f}",
        "swap milliseconds, median": f"{1000 * statistics.median(s.swap_seconds for s in steps):.0f}",
        "|log-prob, rollout - trainer|, mean": f"{statistics.fmean(gaps):.1e}",
        "seconds in all, set-up included": f"{history.total_seconds:.0f}",
    }
    return headline(f"seed {history.seed}; trained: {history.trained}", cards)


def set_up(history: DitHistory) -> str:
    """What ran before the first step, in seconds."""
    rows = [(name, f"{seconds:.1f}") for name, seconds in history.setup.items()]
    caption = (
        "The model is trained on scikit-learn's digits once, then cached. Opening an engine is its first swap: a cold "
        "load takes the same path. The engine holds two precisions of the policy; the second engine holds the other "
        "format and is opened for the comparison only."
    )
    return figure(table(("opened", "seconds"), rows), "Set-up", caption)


def step_rows(history: DitHistory) -> list[tuple[str, ...]]:
    """The step table's cells, in the order of `COLUMNS`."""
    return [
        (
            str(s.step),
            s.version,
            f"{s.reward:.3f} ± {s.reward_error:.3f}",
            f"{s.right:.0%}",
            f"{s.second_right:.0%}",
            f"{s.images_per_second:.0f}",
            f"{statistics.fmean(s.logprob_gap):.1e}",
            f"{s.beyond_clip:.0%}",
            f"{s.kl:.3f}",
            f"{s.rollout_seconds:.1f}",
            f"{s.train_seconds:.1f}",
            f"{1000 * s.swap_seconds:.0f}",
        )
        for s in history.steps
    ]


def comparison(history: DitHistory) -> str:
    """Every format against BF16: a table, and images with their difference maps."""
    assert history.comparison is not None
    found = history.comparison
    rows = [
        (
            one.name,
            f"{found.bf16_right:.0%} → {one.right:.0%}",
            f"{statistics.median(one.psnr):.1f} dB",
            f"{one.rank_correlation:.4f}",
            f"{one.top_overlap:.0%}",
            f"{statistics.fmean(one.logprob_gap):.1e}, {one.largest_gap:.1e}",
        )
        for one in found.formats
    ]
    heads = ("format", "right in BF16, and in it", "PSNR, median", "Spearman of rewards", "best quarter in common")
    words = (
        f"{len(found.bf16)} images of the trained policy, each from one noise in every precision; the rows shown go "
        f"from the worst PSNR of {images.hardest(found).name} to the best. A difference map shows |difference| "
        f"{images.DIFFERENCE_GAIN} times as dark."
    )
    tables = table((*heads, "|log-prob difference|, mean and largest"), rows) + images.triptych(found)
    return _section("BF16, and quantized from the same noise", tables, words)


def strips(history: DitHistory) -> str:
    words = (
        "At every step: what the model takes the clean image to be, with step and sigma below, and the precision it "
        "computed in. Steps on orange are drawn (they have noise and a log-prob: the SDE's window), the others follow "
        "the ODE."
    )
    return _section("Denoising, step by step", images.strip_table(history.strips), words)


def sheets(history: DitHistory) -> str:
    parts = {"before training": history.before, "after training, the same noise": history.after}
    html = images.side_by_side({name: images.reward_sheet(pictures) for name, pictures in parts.items()})
    return _section("Images, sorted by reward", html, "Drawn by the quantized policy; the reward stands below.")


def _section(heading: str, html: str, caption: str) -> str:
    return f"<section><h2>{heading}</h2>{html}<figcaption>{caption}</figcaption></section>"
