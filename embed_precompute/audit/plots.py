"""Plots as inline SVG for a page without scripts: histograms, bands, lanes of ranks, heat maps.

Guarantees: the same numbers give the same text. A plot is as wide as its place, and its text keeps
its size: lines and areas are drawn in a box that is stretched, texts beside it are placed in per
cent. Colours are variables of the page (`--c1` and so on), so dark screens and paper have their
own. Every text that a caller gives is escaped.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

BOX = 1000
"""Width of the stretched box, in its own units."""
TOP, BOTTOM = 18, 20
"""Pixels above a plot, for the name of a line, and below it, for the ticks."""
LANE, MAX_LANES, MAX_HEAT_ROWS = 44, 16, 64
LEVELS = 6
"""Shades of a heat map."""
CLOCK_STEPS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 10800, 21600, 43200)


@dataclass(frozen=True)
class Axis:
    """A range and the places on it that have a name."""

    low: float
    high: float
    ticks: Sequence[tuple[float, str]]

    def share(self, value: float) -> float:
        """Where `value` is between the two ends: 0 to 1."""
        return (value - self.low) / ((self.high - self.low) or 1.0)


def compact(value: float) -> str:
    """Such as 0.25, 340, 12.5 k, 3 M: at most three digits."""
    for size, name in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{name}"
    return f"{value:.3g}"


def number_axis(low: float, high: float, count: int = 4, *, whole: bool = False) -> Axis:
    """From the round number below `low` to the one above `high`, in about `count` round steps.

    `whole`: no step is less than 1.
    """
    if not high > low:
        low, high = (low - 0.5, low + 0.5) if low else (0.0, 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= rough * 0.999)
    step = max(step, 1.0) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    places = [round(i * step, 12) for i in range(first, last + 1)]
    return Axis(places[0], places[-1], [(each, compact(each)) for each in places])


def time_axis(seconds: float) -> Axis:
    """From 0 to `seconds`, with round times."""
    days = [86400 * each for each in (1, 2, 5, 10, 20, 50)]
    step = next((each for each in (*CLOCK_STEPS, *days) if seconds / each <= 4.5), seconds or 1)
    unit, name = next(
        (u, n) for u, n in ((86400, "d"), (3600, "h"), (60, "min"), (1, "s")) if step >= u or u == 1
    )
    ticks = [
        (each * step, f"{each * step / unit:g} {name}") for each in range(int(seconds / step) + 1)
    ]
    return Axis(0.0, seconds or 1.0, ticks)


def histogram(
    counts: Sequence[int],
    x: Axis,
    *,
    label: str,
    mark: tuple[float, str] | None = None,
    last: int = 0,
) -> str:
    """Bars of equal width over the whole of `x`. `mark`: a place on `x` and what the line there
    says; `last`: how much of the last bar has another colour."""
    y, height = number_axis(0, max([1, *counts]), 3, whole=True), 150
    width = BOX / max(1, len(counts))
    bars = "".join(
        f'<path d="M{i * width:.4g} {height}v{-height * y.share(count):.4g}h{width:.4g}V{height}"/>'
        for i, count in enumerate(counts)
        if count
    )
    bars = f'<g class="bar">{bars}</g>'
    if last:
        tall = height * y.share(last)
        bars += f'<path class="cut" d="M{BOX} {height}v{-tall:.4g}h{-width:.4g}V{height}"/>'
    texts = ""
    if mark is not None:
        at = 100 * x.share(mark[0])
        anchor = "end" if at > 50 else "start"
        texts = (
            f'<line class="mark" x1="{at:.4g}%" x2="{at:.4g}%" y1="2" y2="{TOP + height}"/>'
            f'<text x="{at:.4g}%" dx="{-5 if at > 50 else 5}" y="12" text-anchor="{anchor}">'
            f"{html.escape(mark[1])}</text>"
        )
    return _plot(bars, x, y, height, label, texts)


def band(
    points: Sequence[tuple[float, float, float, float]],
    x: Axis,
    *,
    label: str,
    marked: Sequence[tuple[float, float]] = (),
) -> str:
    """A line within a band. `points`: (x, low, middle, high) from left to right; `marked`: ranges
    of x that are shaded."""
    y = number_axis(min(p[1] for p in points), max(p[3] for p in points), 3)
    height = 130

    def path(values: Sequence[tuple[float, float]]) -> str:
        places = (f"{BOX * x.share(at):.4g} {height * (1 - y.share(v)):.4g}" for at, v in values)
        return "M" + "L".join(places)

    edge = [(p[0], p[3]) for p in points] + [(p[0], p[1]) for p in reversed(points)]
    shaded = "".join(
        f'<path class="other" d="M{BOX * x.share(a):.4g} 0H{BOX * x.share(b):.4g}V{height}'
        f'H{BOX * x.share(a):.4g}z"/>'
        for a, b in marked
    )
    shapes = (
        f'{shaded}<path class="band" d="{path(edge)}z"/>'
        f'<path class="line" d="{path([(p[0], p[2]) for p in points])}"/>'
    )
    return _plot(shapes, x, y, height, label, top=6)


def lanes(
    names: Sequence[str],
    rows: Sequence[Sequence[float | None]],
    x: Axis,
    *,
    most: float,
    label: str,
) -> str:
    """A small area plot for each name, one below the other; `most` is the full height of each.
    None: at rest, which is shaded."""
    height, shapes, texts = LANE * len(rows), "", ""
    for lane, (name, row) in enumerate(zip(names, rows, strict=True)):
        base, width = LANE * (lane + 1) - 2, BOX / max(1, len(row))
        rest = ""
        area = f"M0 {base}"
        for i, value in enumerate(row):
            tall = 0 if value is None else (LANE - 18) * min(1.0, value / (most or 1))
            area += f"V{base - tall:.4g}H{(i + 1) * width:.4g}"
        for i, end in _runs([value is None for value in row]):
            rest += f"M{i * width:.4g} {base}V{base - LANE + 18}H{end * width:.4g}V{base}z"
        shapes += f'<path class="rest" d="{rest}"/><path class="bar" d="{area}V{base}z"/>'
        texts += (
            f'<line class="grid" x1="0" x2="100%" y1="{base}" y2="{base}"/>'
            f'<text x="0" y="{base - LANE + 14}">{html.escape(name)}</text>'
        )
    return _plot(shapes, x, None, height, label, texts, top=0)


def heat(
    names: Sequence[str],
    rows: Sequence[Sequence[float | None]],
    x: Axis,
    *,
    most: float,
    label: str,
) -> str:
    """A row of shades for each name; `most` is the darkest. None: at rest, which is grey."""
    tall = max(6, min(16, 256 // max(1, len(rows))))
    paths = [""] * LEVELS
    for number, row in enumerate(rows):
        width = BOX / max(1, len(row))
        shade = [
            -1 if value is None else min(LEVELS - 1, int(LEVELS * value / (most or 1)))
            for value in row
        ]
        begin = 0
        for i in range(1, len(shade) + 1):
            if i == len(shade) or shade[i] != shade[begin]:
                if shade[begin] >= 0:
                    a, b = f"{begin * width:.4g}", f"{i * width:.4g}"
                    paths[shade[begin]] += f"M{a} {number * tall}H{b}v{tall}H{a}z"
                begin = i
    shapes = "".join(
        f'<path fill-opacity="{(level + 1) / LEVELS:.2f}" d="{path}"/>'
        for level, path in enumerate(paths)
        if path
    )
    every = max(1, math.ceil(len(rows) * tall / 16 / 8))  # a name needs 16 pixels
    every = max(every, math.ceil(16 / tall))
    ticks = [(-(i + 0.5) * tall, names[i]) for i in range(0, len(rows), every)]
    y = Axis(-len(rows) * tall, 0.0, ticks)
    height = len(rows) * tall
    rest = f'<path class="rest" d="M0 0H{BOX}V{height}H0z"/>'
    shapes = f'<g shape-rendering="crispEdges">{rest}<g class="heat">{shapes}</g></g>'
    return _plot(shapes, x, y, height, label, top=6)


def share_bar(share: float) -> str:
    """A bar within a table's cell, 0 to 1 of its width."""
    width = max(0.0, min(1.0, share)) * 100
    return (
        '<svg class="share" width="100%" height="12" aria-hidden="true">'
        f'<rect class="bar" width="{width:.4g}%" height="12"/></svg>'
    )


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """(first, end) of each run of True."""
    runs, begin = [], None
    for i, flag in enumerate([*flags, False]):
        if flag and begin is None:
            begin = i
        elif not flag and begin is not None:
            runs.append((begin, i))
            begin = None
    return runs


def _plot(
    shapes: str, x: Axis, y: Axis | None, height: int, label: str, texts: str = "", top: int = TOP
) -> str:
    """The box with its axes. `shapes` are in units of the box, `height` pixels tall; `texts` are in
    per cent and pixels, with the box beginning at `top`."""
    full = top + height + BOTTOM
    left, grid = "", ""
    for value, name in y.ticks if y is not None else ():
        at = top + height * (1 - y.share(value)) if y is not None else 0
        left += f'<text x="46" y="{at + 4:.4g}" text-anchor="end">{html.escape(name)}</text>'
        grid += f'<line class="grid" x1="0" x2="100%" y1="{at:.4g}" y2="{at:.4g}"/>'
    below = ""
    for value, name in x.ticks:
        at = 100 * x.share(value)
        anchor = "start" if at < 3 else "end" if at > 94 else "middle"
        below += (
            f'<line class="tick" x1="{at:.4g}%" x2="{at:.4g}%" y1="{top + height}" '
            f'y2="{top + height + 4}"/><text x="{at:.4g}%" y="{full - 2}" text-anchor="{anchor}">'
            f"{html.escape(name)}</text>"
        )
    side = (
        f'<svg class="y" width="50" height="{full}" aria-hidden="true">{left}</svg>' if left else ""
    )
    return (
        f'<div class="plot">{side}<svg class="x" width="100%" height="{full}" role="img" '
        f'aria-label="{html.escape(label)}">{grid}<svg y="{top}" width="100%" height="{height}" '
        f'viewBox="0 0 {BOX} {height}" preserveAspectRatio="none">{shapes}</svg>{texts}{below}'
        "</svg></div>"
    )
