"""The report's pictures, each an SVG (with its legend) drawn from a `History`."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from . import svg
from .history import History

BLUE, ORANGE, GREEN, ROSE, GREY = "#2f6fb7", "#e08a2e", "#3f9d75", "#c9567a", "#9aa7b4"
PHASES = {"receive": GREY, "quantize": BLUE, "prepare": GREEN, "commit": ROSE}
PARTS = {"rollouts": BLUE, "optimizer step": GREEN, "swap": ORANGE, "measuring (KL, second engine)": GREY}
KINDS = {"qkv": BLUE, "o": GREEN, "w13": ORANGE, "w2": ROSE}
KIND_NAMES = {
    "qkv": "attention q/k/v",
    "o": "attention output",
    "w13": "experts' gate and up",
    "w2": "experts' down",
}


class Step(Protocol):
    """One step of a run, as far as an axis of steps goes."""

    @property
    def step(self) -> int: ...


def reward_picture(history: History) -> str:
    """Mean reward with its standard error, and the share of right answers."""
    steps = history.steps
    reward = [(s.step, s.reward) for s in steps]
    correct = [(s.step, s.correct) for s in steps]
    low = [(s.step, max(0.0, s.reward - s.reward_error)) for s in steps]
    high = [(s.step, min(1.0, s.reward + s.reward_error)) for s in steps]
    axes = step_axes(steps, 1.0)
    drawn = svg.picture(
        "Reward by step",
        svg.grid(axes, [s.step for s in steps], "step", "reward"),
        svg.band(axes, low, high, BLUE),
        svg.line(axes, correct, ORANGE, dashed=True),
        svg.line(axes, reward, BLUE),
    )
    return svg.legend({"mean reward, ± one standard error": BLUE, "share of right numbers": ORANGE}) + drawn


def kl_picture(history: History) -> str:
    """KL(trainer || rollout) by step, per-token activation scales against static ones."""
    steps = history.steps
    lines = {"per-token activation scales": (BLUE, [(s.step, s.kl) for s in steps])}
    static = [(s.step, s.kl_static) for s in steps if s.kl_static is not None]
    if static:
        lines["static scales, calibrated at step 0"] = (ORANGE, static)
    top = 1.15 * max(y for _, points in lines.values() for _, y in points)
    axes = step_axes(steps, top)
    drawn = svg.picture(
        "KL by step",
        svg.grid(axes, [s.step for s in steps], "step", "KL, nats per token"),
        *(svg.line(axes, points, colour) for colour, points in lines.values()),
    )
    return svg.legend({name: colour for name, (colour, _) in lines.items()}) + drawn


def error_picture(history: History) -> str:
    """Relative RMS error of every quantized weight by layer."""
    errors = history.weight_errors
    layers = max(e.layer for e in errors)
    low, high = 100 * min(e.error for e in errors), 100 * max(e.error for e in errors)
    margin = 0.2 * (high - low) or 1.0
    axes = svg.Axes((0, max(layers, 1)), (max(0.0, low - margin), high + margin))
    drawn = svg.picture(
        "Quantization error by layer",
        svg.grid(axes, range(0, layers + 1, max(1, layers // 10)), "layer", "relative RMS error, %"),
        *(
            svg.line(axes, [(e.layer, 100 * e.error) for e in errors if e.kind == kind], colour)
            for kind, colour in KINDS.items()
        ),
    )
    return svg.legend({KIND_NAMES[kind]: colour for kind, colour in KINDS.items()}) + drawn


def swap_picture(history: History) -> str:
    """What the engine did during each swap, in seconds."""
    return stacked_bars(history.steps, [s.swap for s in history.steps], PHASES, "Swap phases by step")


def time_picture(history: History) -> str:
    """Where each step's wall-clock time went."""
    spent = [
        dict(zip(PARTS, (s.rollout_seconds, s.train_seconds, s.swap_seconds, s.measure_seconds), strict=True))
        for s in history.steps
    ]
    return stacked_bars(history.steps, spent, PARTS, "Time by step")


def stacked_bars(
    steps: Sequence[Step], seconds: Sequence[Mapping[str, float]], colours: Mapping[str, str], title: str
) -> str:
    """A bar a step, its parts stacked in the order of `colours`."""
    top = 1.1 * max(sum(parts.get(name, 0.0) for name in colours) for parts in seconds)
    first, last = steps[0].step, steps[-1].step
    axes = svg.Axes((first - 0.6, last + 0.6), (0, top or 1.0))
    bars = []
    for record, parts in zip(steps, seconds, strict=True):
        low = 0.0
        for name, colour in colours.items():
            high = low + parts.get(name, 0.0)
            bars.append(svg.bar(axes, record.step, low, high, 0.62, colour, f"{name}: {high - low:.2f} s"))
            low = high
    drawn = svg.picture(title, svg.grid(axes, step_ticks(steps), "step", "seconds"), *bars)
    return svg.legend(dict(colours)) + drawn


def step_axes(steps: Sequence[Step], top: float) -> svg.Axes:
    """Steps along x, 0 to `top` along y."""
    first, last = steps[0].step, steps[-1].step
    return svg.Axes((first - 0.3, last + 0.3), (0, top or 1.0))


def step_ticks(steps: Sequence[Step]) -> list[int]:
    """Labels that fit beside each other."""
    return [s.step for s in steps[:: max(1, len(steps) // 10)]]
