"""The report's curves, each an SVG (with its legend) drawn from a `DitHistory`."""

from collections.abc import Mapping

from .. import svg
from ..pictures import BLUE, GREEN, GREY, ORANGE, PHASES, ROSE, stacked_bars, step_axes, step_ticks
from .history import DitHistory

PARTS = {"rollouts": BLUE, "optimizer step": GREEN, "swap": ORANGE}
FORMATS = {"NVFP4": BLUE, "FP8": GREEN}


def reward_picture(history: DitHistory) -> str:
    """Mean reward with its standard error, and the share of right digits."""
    steps = history.steps
    reward = [(s.step, s.reward) for s in steps]
    low = [(s.step, max(0.0, s.reward - s.reward_error)) for s in steps]
    high = [(s.step, min(1.0, s.reward + s.reward_error)) for s in steps]
    axes = step_axes(steps, 1.0)
    drawn = svg.picture(
        "Reward by step",
        svg.grid(axes, step_ticks(history.steps), "step", "reward"),
        svg.band(axes, low, high, BLUE),
        svg.line(axes, [(s.step, s.right) for s in steps], ORANGE, dashed=True),
        svg.line(axes, [(s.step, s.second_right) for s in steps], GREY, dashed=True),
        svg.line(axes, reward, BLUE),
    )
    names = {
        "mean reward, ± one standard error": BLUE,
        "right, says the judge": ORANGE,
        "right, says a judge that gives no rewards": GREY,
    }
    return svg.legend(names) + drawn


def logprob_picture(history: DitHistory) -> str:
    """Mean |difference of log-probs| by denoising step, each format against BF16, and the clip range."""
    assert history.comparison is not None
    lines = {one.name: list(enumerate(one.logprob_gap)) for one in history.comparison.formats}
    top = 1.15 * max(history.clip, *(gap for points in lines.values() for _, gap in points))
    last = max(len(points) for points in lines.values()) - 1
    axes = svg.Axes((-0.3, last + 0.3), (0, top))
    clip = [(-0.3, history.clip), (last + 0.3, history.clip)]
    drawn = svg.picture(
        "Differences of log-probs by denoising step",
        svg.grid(axes, range(last + 1), "denoising step", "mean |difference|"),
        svg.line(axes, clip, ROSE, dashed=True),
        *(svg.line(axes, points, FORMATS[name]) for name, points in lines.items()),
    )
    colours = {name: FORMATS[name] for name in lines}
    return svg.legend({**colours, f"clip range, {history.clip:g}": ROSE}) + drawn


def gap_picture(history: DitHistory) -> str:
    """Mean |difference of log-probs| by training step, all denoising steps together, and of the last one."""
    means = [(s.step, sum(s.logprob_gap) / len(s.logprob_gap)) for s in history.steps]
    lasts = [(s.step, s.logprob_gap[-1]) for s in history.steps]
    top = 1.15 * max(history.clip, *(gap for _, gap in [*means, *lasts]))
    axes = step_axes(history.steps, top)
    first, last = axes.x_range
    drawn = svg.picture(
        "Differences of log-probs by training step",
        svg.grid(axes, step_ticks(history.steps), "step", "mean |difference|"),
        svg.line(axes, [(first, history.clip), (last, history.clip)], ROSE, dashed=True),
        svg.line(axes, lasts, ORANGE),
        svg.line(axes, means, BLUE),
    )
    names = {"all denoising steps": BLUE, "the last one": ORANGE, f"clip range, {history.clip:g}": ROSE}
    return svg.legend(names) + drawn


def scatter_picture(history: DitHistory) -> str:
    """Reward of every sample in a quantized format over its reward in BF16."""
    assert history.comparison is not None
    base, formats = history.comparison.bf16, history.comparison.formats
    dots: Mapping[str, list[tuple[float, float]]] = {
        one.name: [(mine.reward, other.reward) for mine, other in zip(base, one.pictures, strict=True)]
        for one in formats
    }
    top = 1.08 * max(0.1, *(value for points in dots.values() for point in points for value in point))
    axes = svg.Axes((0, top), (0, top))
    drawn = svg.picture(
        "Rewards from the same noise",
        svg.grid(axes, svg.round_ticks(0, top), "reward in BF16", "reward, quantized"),
        *(svg.dots(axes, points, FORMATS[name]) for name, points in dots.items()),
    )
    names = {f"{one.name}: Spearman {one.rank_correlation:.4f}": FORMATS[one.name] for one in formats}
    return svg.legend(names) + drawn


def swap_picture(history: DitHistory) -> str:
    """What the engine did during each swap, in seconds."""
    return stacked_bars(history.steps, [s.swap for s in history.steps], PHASES, "Swap phases by step")


def time_picture(history: DitHistory) -> str:
    """Where each step's wall-clock time went."""
    spent = [dict(zip(PARTS, (s.rollout_seconds, s.train_seconds, s.swap_seconds), strict=True)) for s in history.steps]
    return stacked_bars(history.steps, spent, PARTS, "Time by step")
