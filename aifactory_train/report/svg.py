"""Line charts as inline SVG: drawn here, without a plotting package, so that the report is one small file that needs no
network.

A curve of any length becomes at most :data:`BUCKETS` points: the mean of each bucket as a line, its smallest and
largest value as a band behind it, so that a spike is never averaged away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from aifactory_train.core.templates import render

BUCKETS = 400
WIDTH, HEIGHT = 640, 272
LEFT, RIGHT, TOP, BOTTOM = 78, 12, 14, 46

#: ``(x, mean, least, largest)``
Bucket = tuple[float, float, float, float]


@dataclass
class Curve:
    """``x`` ascending; values that are None or not finite are left out. ``buckets``: the curve reduced already, in
    place of ``x`` and ``y``."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    dots: bool = False  # single measurements, drawn as dots
    buckets: Sequence[Bucket] | None = None


def reduce(x: Sequence[float], y: Sequence[float | None], buckets: int = BUCKETS) -> list[Bucket]:
    """``(x, mean, least, largest)`` per bucket of equal width in x."""
    points = [(float(a), float(b)) for a, b in zip(x, y, strict=True) if b is not None and math.isfinite(b)]
    if len(points) <= buckets:
        return [(a, b, b, b) for a, b in points]
    first, last = points[0][0], points[-1][0]
    width = (last - first) / buckets or 1.0
    found: list[Bucket] = []
    current: list[tuple[float, float]] = []
    edge = first + width
    for point in points:
        if point[0] > edge and current:
            found.append(_bucket(current))
            current = []
            edge = first + width * (math.floor((point[0] - first) / width) + 1)
        current.append(point)
    if current:
        found.append(_bucket(current))
    return found


def _bucket(points: list[tuple[float, float]]) -> Bucket:
    ys = [b for _, b in points]
    return points[-1][0], sum(ys) / len(ys), min(ys), max(ys)


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers that cover ``[low, high]``."""
    if high - low <= 1e-12 * max(abs(low), abs(high)):  # nothing, or less than steps of floating point resolve
        high = low + (abs(low) or 1.0)
    raw = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    start = math.ceil(low / step - 1e-9) * step
    found = []
    while start <= high + 1e-9 * step:
        found.append(0.0 if abs(start) < step * 1e-9 else start)
        start += step
    return found


def short(value: float) -> str:
    """A number as an axis shows it."""
    size = abs(value)
    if size >= 1e15 or 0 < size < 0.01:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    for limit, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.4g}"


def chart(
    name: str,
    title: str,
    unit: str,
    curves: Sequence[Curve],
    *,
    zero: bool = False,
    reference: tuple[str, float] | None = None,
) -> str:
    """A figure: SVG with title and description, a slider that reads values out, and a caption. Empty text without any
    point.

    ``reference``: a labelled horizontal line (what was planned).
    """
    reduced = [(c, reduce(c.x, c.y) if c.buckets is None else list(c.buckets)) for c in curves]
    reduced = [(c, r) for c, r in reduced if r]
    if not reduced:
        return ""
    x0, x1, y0, y1 = _ranges([p for _, r in reduced for p in r], zero, reference)

    def px(x: float) -> float:
        return round(LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), 1)

    def py(y: float) -> float:
        return round(TOP + (y1 - y) / (y1 - y0) * (HEIGHT - TOP - BOTTOM), 1)

    # Joined here: a template escapes every number by itself, which takes most of the time of a long curve.
    def line(points: list[Bucket]) -> Markup:
        return Markup(" ".join(f"{px(x)},{py(y)}" for x, y, _, _ in points))

    def band(points: list[Bucket]) -> Markup:
        above = [f"{px(x)},{py(most)}" for x, _, _, most in points]
        return Markup(" ".join([*above, *(f"{px(x)},{py(least)}" for x, _, least, _ in reversed(points))]))

    def read_out(points: list[Bucket]) -> Markup:
        return Markup(";".join(f"{int(x)},{y:.6g},{px(x)},{py(y)}" for x, y, _, _ in points))

    values = {
        "name": name,
        "title": title,
        "unit": unit,
        "curves": reduced,
        "main": next((r for c, r in reduced if not c.dots), reduced[0][1]),
        "spoken": ". ".join(_spoken(curve, points) for curve, points in reduced),
        "reference": reference,
        "x_ticks": [tick for tick in ticks(x0, x1, 6) if x0 <= tick <= x1 and tick == int(tick)],
        "y_ticks": [tick for tick in ticks(y0, y1) if y0 <= tick <= y1],
    }
    box = {
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "top": TOP,
        "bottom": HEIGHT - BOTTOM,
    }
    drawn = {"line": line, "band": band, "read_out": read_out, "wide": _is_wide}
    return _drawn("chart", px=px, py=py, short=short, **drawn, **box, **values)


def _ranges(points: list[Bucket], zero: bool, reference: tuple[str, float] | None) -> tuple[float, float, float, float]:
    """The left, right, lower and upper ends of the axes around all points; from 0 where ``zero``."""
    xs, lows = [p[0] for p in points], [p[2] for p in points]
    x0, x1 = min(xs), max(xs)
    y0, y1 = min([*lows, 0.0] if zero else lows), max(p[3] for p in points)
    if reference is not None:
        y0, y1 = min(y0, reference[1]), max(y1, reference[1])
    if x1 <= x0:
        x0, x1 = x0 - 0.5, x1 + 0.5
    pad = (y1 - y0) * 0.05 or (abs(y1) * 0.1 or 1.0)
    return x0, x1, (y0 if zero and y0 == 0 else y0 - pad), y1 + pad


def _drawn(template: str, **values: Any) -> str:
    return render(Path(__file__).resolve().parent / "templates" / f"{template}.html.j2", autoescape=True, **values)


def _is_wide(points: list[Bucket]) -> bool:
    """Some bucket holds different values: the curve has a band."""
    return any(least != most for _, _, least, most in points)


def _spoken(curve: Curve, points: list[Bucket]) -> str:
    first, last = points[0], points[-1]
    return (
        f"{curve.label}: {short(first[1])} at step {int(first[0]):,}, {short(last[1])} at step {int(last[0]):,}, "
        f"least {short(min(p[2] for p in points))}, largest {short(max(p[3] for p in points))}"
    )


def timeline(bars: Sequence[tuple[str, float, float, str, str]]) -> str:
    """Attempts over time: ``(label, start s, end s, state, text)``."""
    if not bars:
        return ""
    end = max(b[2] for b in bars) or 1.0
    box = {"width": WIDTH, "height": 26 * len(bars) + 26, "span": WIDTH - 102, "end": end}
    return _drawn("timeline", bars=bars, ticks=ticks(0, end, 5), duration=duration, **box)


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``, ``2.1 d``"""
    if seconds < 90:
        return f"{seconds:.3g} s"
    if seconds < 5400:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 172_800 else f"{seconds / 86400:.3g} d"
