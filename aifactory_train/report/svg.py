"""Line charts as inline SVG: drawn here, without a plotting package, so that the report is one small file that needs no
network.

A curve of any length becomes at most :data:`BUCKETS` points: the mean of each bucket as a line, its smallest and
largest value as a band behind it, so that a spike is never averaged away.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

BUCKETS = 400
WIDTH, HEIGHT = 640, 272
LEFT, RIGHT, TOP, BOTTOM = 78, 12, 14, 46


@dataclass
class Curve:
    """``x`` ascending; values that are None or not finite are left out."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    dots: bool = False  # single measurements, drawn as dots


def reduce(
    x: Sequence[float], y: Sequence[float | None], buckets: int = BUCKETS
) -> list[tuple[float, float, float, float]]:
    """``(x, mean, least, largest)`` per bucket of equal width in x."""
    points = [(float(a), float(b)) for a, b in zip(x, y, strict=True) if b is not None and math.isfinite(b)]
    if len(points) <= buckets:
        return [(a, b, b, b) for a, b in points]
    first, last = points[0][0], points[-1][0]
    width = (last - first) / buckets or 1.0
    found: list[tuple[float, float, float, float]] = []
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


def _bucket(points: list[tuple[float, float]]) -> tuple[float, float, float, float]:
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
    reduced = [(c, reduce(c.x, c.y)) for c in curves]
    reduced = [(c, r) for c, r in reduced if r]
    if not reduced:
        return ""
    xs = [p[0] for _, r in reduced for p in r]
    lows = [p[2] for _, r in reduced for p in r]
    highs = [p[3] for _, r in reduced for p in r]
    x0, x1 = min(xs), max(xs)
    y0, y1 = min([*lows, 0.0] if zero else lows), max(highs)
    if reference is not None:
        y0, y1 = min(y0, reference[1]), max(y1, reference[1])
    if x1 <= x0:
        x0, x1 = x0 - 0.5, x1 + 0.5
    pad = (y1 - y0) * 0.05 or (abs(y1) * 0.1 or 1.0)
    y0, y1 = (y0 if zero and y0 == 0 else y0 - pad), y1 + pad

    def px(x: float) -> float:
        return round(LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT), 1)

    def py(y: float) -> float:
        return round(TOP + (y1 - y) / (y1 - y0) * (HEIGHT - TOP - BOTTOM), 1)

    parts = []
    for tick in ticks(y0, y1):
        if y0 <= tick <= y1:
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py(tick)}" y2="{py(tick)}"/>')
            parts.append(f'<text class="tick" x="{LEFT - 8}" y="{py(tick) + 4}" text-anchor="end">{short(tick)}</text>')
    for tick in ticks(x0, x1, 6):
        if x0 <= tick <= x1 and tick == int(tick):
            parts.append(
                f'<text class="tick" x="{px(tick)}" y="{HEIGHT - BOTTOM + 19}" '
                f'text-anchor="middle">{short(tick)}</text>'
            )
    if reference is not None:
        y = py(reference[1])
        parts.append(f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="tick" x="{WIDTH - RIGHT}" y="{y - 5}" text-anchor="end">{html.escape(reference[0])}</text>'
        )
    spoken = []
    for number, (curve, points) in enumerate(reduced):
        if curve.dots:
            parts += [f'<circle class="dot c{number}" cx="{px(a)}" cy="{py(b)}" r="4"/>' for a, b, _, _ in points]
        else:
            if any(lo != hi for _, _, lo, hi in points):
                band = [f"{px(a)},{py(hi)}" for a, _, _, hi in points] + [
                    f"{px(a)},{py(lo)}" for a, _, lo, _ in reversed(points)
                ]
                parts.append(f'<polygon class="band c{number}" points="{" ".join(band)}"/>')
            parts.append(
                f'<polyline class="line c{number}" points="{" ".join(f"{px(a)},{py(b)}" for a, b, _, _ in points)}"/>'
            )
        first, last = points[0], points[-1]
        spoken.append(
            f"{curve.label}: {short(first[1])} at step {int(first[0]):,}, {short(last[1])} at step {int(last[0]):,}, "
            f"least {short(min(p[2] for p in points))}, largest {short(max(p[3] for p in points))}"
        )
    legend = "".join(
        f'<span class="key"><svg width="14" height="10" aria-hidden="true"><rect class="swatch c{i}" width="14" '
        f'height="10" rx="2"/></svg> {html.escape(c.label)}</span>'
        for i, (c, _) in enumerate(reduced)
    )
    main = next((r for c, r in reduced if not c.dots), reduced[0][1])
    data = ";".join(f"{int(a)},{b:.6g},{px(a)},{py(b)}" for a, b, _, _ in main)
    last_index = len(main) - 1
    return (
        f'<figure class="chart" id="chart-{name}">\n'
        f"<figcaption><h3>{html.escape(title)}</h3><span "
        f'class="unit">{html.escape(unit)}</span>{legend if len(reduced) > 1 else ""}</figcaption>\n'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="t-{name} d-{name}" data-points="{data}">'
        f'<title id="t-{name}">{html.escape(title)}</title><desc id="d-{name}">{html.escape(". ".join(spoken))}.</desc>'
        f'{"".join(parts)}<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">step</text>'
        f'<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}" x1="-9" x2="-9"/></svg>\n'
        f'<div class="reader"><label for="r-{name}">Read {html.escape(title.lower())} at a step</label>'
        f'<input type="range" id="r-{name}" min="0" max="{last_index}" value="{last_index}">'
        f'<output for="r-{name}" id="o-{name}"></output></div>\n'
        f'<p class="spoken">{html.escape(". ".join(spoken))}.</p>\n</figure>\n'
    )


def timeline(bars: Sequence[tuple[str, float, float, str, str]]) -> str:
    """Attempts over time: ``(label, start s, end s, state, text)``."""
    if not bars:
        return ""
    end = max(b[2] for b in bars) or 1.0
    height = 26 * len(bars) + 26
    parts = []
    for i, (label, start, stop, state, text) in enumerate(bars):
        x = 90 + start / end * (WIDTH - 102)
        width = max(3.0, (stop - start) / end * (WIDTH - 102))
        parts.append(f'<text class="tick" x="0" y="{26 * i + 17}">{html.escape(label)}</text>')
        parts.append(
            f'<rect class="bar {html.escape(state)}" x="{x:.1f}" y="{26 * i + 4}" width="{width:.1f}" height="18" '
            f'rx="3">'
            f"<title>{html.escape(f'{label}: {state}. {text}')}</title></rect>"
        )
    for tick in ticks(0, end, 5):
        x = 90 + tick / end * (WIDTH - 102)
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 6}" text-anchor="middle">{duration(tick)}</text>')
    said = ". ".join(f"{b[0]}: {b[3]}, {duration(b[2] - b[1])}. {b[4]}" for b in bars)
    return (
        f'<svg class="timeline" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="t-attempts d-attempts">'
        f'<title id="t-attempts">Attempts over time</title><desc '
        f'id="d-attempts">{html.escape(said)}</desc>{"".join(parts)}</svg>'
    )


def duration(seconds: float) -> str:
    """``45 s``, ``12 min``, ``3.5 h``, ``2.1 d``"""
    if seconds < 90:
        return f"{seconds:.3g} s"
    if seconds < 5400:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:.3g} h" if seconds < 172_800 else f"{seconds / 86400:.3g} d"
