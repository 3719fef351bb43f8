"""A few SVG shapes on a pair of axes: all that the report's pictures need."""

import math
from collections.abc import Sequence
from html import escape

import msgspec

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 14, 46
INK, GRID = "#51606f", "#e6ebf0"


class Axes(msgspec.Struct, frozen=True):
    """Data ranges, and where they lie on the picture."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]

    def x(self, value: float) -> float:
        low, high = self.x_range
        return round(LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT), 2)

    def y(self, value: float) -> float:
        low, high = self.y_range
        return round(HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 2)


def picture(title: str, *shapes: str) -> str:
    """One SVG element; `title` is what a screen reader says."""
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}" >{"".join(shapes)}</svg>'


def grid(axes: Axes, x_ticks: Sequence[float], x_label: str, y_label: str) -> str:
    """Horizontal lines at round values, tick labels and axis labels."""
    parts = []
    for value in round_ticks(*axes.y_range):
        y = axes.y(value)
        parts.append(f'<line x1="{LEFT}" y1="{y}" x2="{WIDTH - RIGHT}" y2="{y}" stroke="{GRID}"/>')
        parts.append(text(LEFT - 8, y + 4, f"{value:g}", anchor="end"))
    parts += [text(axes.x(value), HEIGHT - BOTTOM + 18, f"{value:g}") for value in x_ticks]
    parts.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(text(14, middle, y_label, extra=f' transform="rotate(-90 14 {middle})"'))
    return "".join(parts)


def text(x: float, y: float, words: str, *, anchor: str = "middle", colour: str = INK, extra: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="{colour}" font-size="12"{extra}>{escape(words)}</text>'


def line(axes: Axes, points: Points, colour: str, *, dashed: bool = False) -> str:
    """A line through the points, with a dot (and a tooltip) at each."""
    path = " ".join(f"{axes.x(x)},{axes.y(y)}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    dots = "".join(
        f'<circle cx="{axes.x(x)}" cy="{axes.y(y)}" r="3.2" fill="{colour}"><title>{x:g}: {y:.3g}</title></circle>'
        for x, y in points
    )
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>{dots}'


def dots(axes: Axes, points: Points, colour: str) -> str:
    """A dot (with a tooltip) at each point."""
    return "".join(
        f'<circle cx="{axes.x(x)}" cy="{axes.y(y)}" r="3" fill="{colour}" opacity="0.6">'
        f"<title>{x:.3g}: {y:.3g}</title></circle>"
        for x, y in points
    )


def band(axes: Axes, low: Points, high: Points, colour: str) -> str:
    """The area between two lines over the same x."""
    path = " ".join(f"{axes.x(x)},{axes.y(y)}" for x, y in [*low, *reversed(high)])
    return f'<polygon points="{path}" fill="{colour}" opacity="0.15"/>'


def bar(axes: Axes, x: float, low: float, high: float, width: float, colour: str, tooltip: str) -> str:
    """A vertical bar around `x`, `width` wide in data units."""
    left, right, top = axes.x(x - width / 2), axes.x(x + width / 2), axes.y(high)
    return (
        f'<rect x="{left}" y="{top}" width="{right - left:.2f}" height="{axes.y(low) - top:.2f}" fill="{colour}">'
        f"<title>{escape(tooltip)}</title></rect>"
    )


def legend(names: dict[str, str]) -> str:
    """Names with their colours, as HTML above a picture: text in an SVG cannot wrap."""
    items = (f'<span><i style="background:{colour}"></i>{escape(name)}</span>' for name, colour in names.items())
    return f'<div class="legend">{"".join(items)}</div>'


def round_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten in [low, high]."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]
