"""Small grey images inside a page: PNG files (ISO/IEC 15948) as data URIs, and the tables they stand in."""

from __future__ import annotations

import base64
import statistics
import struct
import zlib
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import groupby

from .history import Comparison, FormatResult, Picture, Pixels, Strip

SIDE = 8
DIFFERENCE_GAIN = 8  # differences are small: a map shows them so many times as dark
STYLE = """
  .digit { width: 44px; height: 44px; image-rendering: pixelated; border: 1px solid var(--line); display: block; }
  .sheet { display: flex; gap: 4px; align-items: flex-start; margin-bottom: 6px; }
  .sheet .digit { width: 36px; height: 36px; }
  .sheet b { width: 1.2em; line-height: 36px; }
  .sheet span, .strip small { display: block; font-size: 11px; color: var(--soft); text-align: center; }
  .sheets { display: flex; flex-wrap: wrap; gap: 12px 40px; }
  .strip, .trio { width: auto; margin-top: 10px; }
  .strip td, .trio td { border-bottom: 0; padding: 2px 8px 2px 0; font-size: 13px; }
  .strip td { padding: 4px; }
  .strip .drawn { background: #fbe3c8; }
"""


def png(rows: Sequence[bytes]) -> bytes:
    """An 8-bit grey PNG of equally long rows."""
    raw = b"".join(b"\0" + row for row in rows)  # 0: the row is not filtered
    header = struct.pack(">IIBBBBB", len(rows[0]), len(rows), 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(raw, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in chunks)


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def digit(pixels: Pixels, words: str) -> str:
    """One image, dark ink on white; `words` are what a screen reader says and a mouse shows."""
    paper = [bytes(255 - ink for ink in pixels[start : start + SIDE]) for start in range(0, SIDE * SIDE, SIDE)]
    data = base64.b64encode(png(paper)).decode()
    said = escape(words, quote=True)
    return f'<img class="digit" src="data:image/png;base64,{data}" alt="{said}" title="{said}">'


def reward_sheet(pictures: Iterable[Picture]) -> str:
    """A row a digit, its images from the best reward to the worst, the reward below."""
    rows = []
    for asked, group in groupby(pictures, key=lambda picture: picture.digit):
        ranked = sorted(group, key=lambda picture: -picture.reward)
        cells = "".join(_ranked_cell(one, rank) for rank, one in enumerate(ranked, 1))
        rows.append(f'<div class="sheet"><b>{asked}</b>{cells}</div>')
    return "".join(rows)


def _ranked_cell(one: Picture, rank: int) -> str:
    shown = digit(one.pixels, f"{one.digit}: rank {rank}, reward {one.reward:.3f}")
    return f"<div>{shown}<span>{one.reward:.2f}</span></div>"


def strip_table(strips: Sequence[Strip]) -> str:
    """A row a sample: predictions of the clean image at every step, and the image; drawn steps on orange."""
    return f'<div class="wide"><table class="strip">{"".join(map(_strip_row, strips))}</table></div>'


def _strip_row(strip: Strip) -> str:
    cells = []
    for step, pixels in enumerate(strip.pictures[:-1]):
        drawn = ' class="drawn"' if step in range(*strip.window) else ""
        words = f"step {step}, sigma {strip.sigmas[step]:.3f}, {strip.precisions[step]}"
        below = f"<small>{step}: {strip.sigmas[step]:.2f}</small><small>{escape(strip.precisions[step])}</small>"
        cells.append(f"<td{drawn}>{digit(pixels, words)}{below}</td>")
    last = f"<td>{digit(strip.pictures[-1], f'the sample, a {strip.digit}')}<small>sample</small></td>"
    return f"<tr><td>{escape(strip.name)}</td>{''.join(cells)}{last}</tr>"


def triptych(comparison: Comparison, rows: int = 6) -> str:
    """BF16 beside every format and its difference map: `rows` samples from the worst PSNR to the best."""
    heads = ["asked", "BF16", *(head for one in comparison.formats for head in (one.name, "difference", "PSNR"))]
    head = "".join(f"<th>{escape(word)}</th>" for word in heads)
    body = "".join(_triptych_row(comparison, place) for place in spread(hardest(comparison).psnr, rows))
    return f'<div class="wide"><table class="trio"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def hardest(comparison: Comparison) -> FormatResult:
    """The format that is farthest from BF16."""
    return min(comparison.formats, key=lambda one: statistics.median(one.psnr))


def _triptych_row(comparison: Comparison, place: int) -> str:
    base = comparison.bf16[place]
    cells = [str(base.digit), digit(base.pixels, f"BF16, reward {base.reward:.3f}")]
    for one in comparison.formats:
        cells += _against(base, one, place)
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _against(base: Picture, one: FormatResult, place: int) -> list[str]:
    picture = one.pictures[place]
    gaps = [abs(mine - theirs) for mine, theirs in zip(picture.pixels, base.pixels, strict=True)]
    shown = digit(bytes(min(255, DIFFERENCE_GAIN * gap) for gap in gaps), f"largest difference {max(gaps)} of 255")
    return [digit(picture.pixels, f"{one.name}, reward {picture.reward:.3f}"), shown, f"{one.psnr[place]:.1f} dB"]


def spread(values: Sequence[float], count: int) -> list[int]:
    """Places of `count` values, evenly from the least to the greatest."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    if count >= len(order):
        return order
    return [order[round(i * (len(order) - 1) / max(1, count - 1))] for i in range(count)]


def side_by_side(parts: Mapping[str, str]) -> str:
    """HTML under a heading each, next to each other where the page is wide enough."""
    listed = (f"<div><h3>{escape(name)}</h3>{html}</div>" for name, html in parts.items())
    return f'<div class="sheets">{"".join(listed)}</div>'
