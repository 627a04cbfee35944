"""Inline SVG charts of a metrics.jsonl: lines with gaps where a value is missing, and stacked areas."""

from __future__ import annotations

import math
from html import escape

WIDTH, HEIGHT = 460, 200
LEFT, RIGHT, TOP, BOTTOM = 60, 10, 10, 24  # margins of the plot
MAX_POINTS = 1000  # longer series are drawn as means of equal runs of lines
COLOURS = ("#3b82f6", "#f08330", "#2fa866", "#d6517d", "#9a6ddb", "#b8901a", "#17a2b8", "#8b8f97")


def number(value) -> float | None:
    """The value if it is a number (no bool) within +-1e300, where sums and differences stay finite, else None."""
    usable = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if usable and -1e300 <= value <= 1e300 else None


def short(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def line_chart(title: str, lines: list[dict], keys: list[str]) -> str:
    """A <figure> with one line per key over "step", or "" without any number.

    lines: metric objects. A null interrupts its line; objects without the key are passed over: evaluations are joined.
    """
    series = [thin([(line["step"], number(line.get(key))) for line in lines if key in line]) for key in keys]
    values = [value for points in series for _, value in points if value is not None]
    if not values:
        return ""
    axes = _Axes([line["step"] for line in lines], values)
    drawn = [_polylines(points, COLOURS[i % len(COLOURS)], axes, keys[i]) for i, points in enumerate(series)]
    return _figure(title, axes, "".join(drawn), keys if len(keys) > 1 else [], len(lines) > MAX_POINTS)


def stacked_chart(title: str, lines: list[dict], keys: list[str], total: str) -> str:
    """A <figure> with the keys stacked over "step", and above them what `total` exceeds their sum by, as "other".

    Missing values count as 0. "" for fewer than two steps: there is no area to draw.
    """
    names = [*(key.rsplit("/", 1)[-1] for key in keys), "other"]
    lines = [line for line in lines if any(number(line.get(key)) is not None for key in keys)]
    if len(lines) < 2:
        return ""
    layers = [[max(0.0, number(line.get(key)) or 0.0) for line in lines] for key in keys]
    sums = [sum(column) for column in zip(*layers, strict=True)]
    layers.append([max(0.0, (number(line.get(total)) or 0.0) - s) for line, s in zip(lines, sums, strict=True)])
    steps = [line["step"] for line in lines]
    bounds = [[0.0] * len(steps)]
    for layer in layers:
        bounds.append([a + b for a, b in zip(bounds[-1], layer, strict=True)])
    axes = _Axes(steps, [0.0, *bounds[-1]])
    drawn = []
    for i, name in enumerate(names):
        below, above = (thin(list(zip(steps, bound, strict=True))) for bound in bounds[i : i + 2])
        points = " ".join(axes.at(x, y) for x, y in [*above, *reversed(below)])
        fill = COLOURS[i % len(COLOURS)]
        drawn.append(f'<polygon fill="{fill}" points="{points}"><title>{escape(name)}</title></polygon>')
    return _figure(title, axes, "".join(drawn), names, len(steps) > MAX_POINTS)


def thin(points: list[tuple]) -> list[tuple]:
    """At most MAX_POINTS points: each the mean step and the mean value of a run of equally many; None where all are."""
    run = math.ceil(len(points) / MAX_POINTS)
    if run <= 1:
        return points
    result = []
    for start in range(0, len(points), run):
        part = points[start : start + run]
        values = [value for _, value in part if value is not None]
        mean = sum(values) / len(values) if values else None
        result.append((sum(step for step, _ in part) / len(part), mean))
    return result


class _Axes:
    """Maps steps and values to the plot, and draws ticks at round numbers."""

    def __init__(self, steps: list, values: list):
        self.x0, self.x1 = min(steps), max(steps)
        if self.x0 == self.x1:
            self.x0, self.x1 = self.x0 - 1, self.x1 + 1
        low, high = min(values), max(values)
        flat = high - low <= 1e-12 * max(abs(low), abs(high))
        pad = (abs(high) if flat else high - low) * 0.05 or 1.0
        self.y0 = 0.0 if low == 0 and not flat else low - pad
        self.y1 = high + pad

    def x(self, step: float) -> float:
        return LEFT + (step - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def at(self, step: float, value: float) -> str:
        return f"{self.x(step):.2f},{self.y(value):.2f}"

    def svg(self) -> str:
        parts = []
        for value in ticks(self.y0, self.y1, 4):
            y = self.y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.2f}" y2="{y:.2f}"/>')
            parts.append(f'<text class="y" x="{LEFT - 6}" y="{y:.2f}" dy="4" text-anchor="end">{short(value)}</text>')
        for step in ticks(self.x0, self.x1, 5):
            if step == round(step):
                x = f'x="{self.x(step):.2f}" y="{HEIGHT - 7}"'
                parts.append(f'<text class="x" {x} text-anchor="middle">{round(step)}</text>')
        return "".join(parts)


def ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten within [low, high], about `count` of them."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(m for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _polylines(points: list[tuple], colour: str, axes: _Axes, name: str) -> str:
    """The unbroken stretches of a series; a lone point is a dot."""
    stretches, current = [], []
    for step, value in [*points, (None, None)]:
        if value is not None:
            current.append(axes.at(step, value))
        elif current:
            stretches.append(current)
            current = []
    title = f"<title>{escape(name)}</title>"
    drawn = []
    for stretch in stretches:
        if len(stretch) == 1:
            x, y = stretch[0].split(",")
            drawn.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}">{title}</circle>')
        else:
            drawn.append(f'<polyline stroke="{colour}" points="{" ".join(stretch)}">{title}</polyline>')
    return "".join(drawn)


def _figure(title: str, axes: _Axes, drawn: str, names: list[str], thinned: bool) -> str:
    legend = " ".join(
        f'<span style="color:{COLOURS[i % len(COLOURS)]}">■</span> {escape(name.rsplit("/", 1)[-1])}'
        for i, name in enumerate(names)
    )
    note = "each point the mean of several steps" if thinned else ""
    caption = " · ".join(part for part in (legend, note) if part)
    frame = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over steps"'
    plot = f"<svg {frame}>{axes.svg()}{drawn}</svg>"
    return f"<figure><h3>{escape(title)}</h3>{plot}<figcaption>{caption}</figcaption></figure>"
