"""Roofline and configurations of one device as a picture: what the model expects, marked apart from what was measured."""

from __future__ import annotations

import html
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aifactory_train.kernels import hardware, registry


def points(arch: str, sku: str | None, operators: Iterable[str]) -> list[dict[str, Any]]:
    """One point a kernel: intensity in FLOP/byte, the fraction of bandwidth that was measured (or None), and its configuration."""
    out = []
    for name in operators:
        operator = registry.operator(name)
        if operator.flops is None:
            continue
        chosen = registry.select(name, arch, sku, "bf16", operator.checks[min(1, len(operator.checks) - 1)])
        for kernel, source in chosen.provenance.items():
            if kernel.endswith("_sum"):
                continue
            direction = "backward" if kernel.endswith("_bwd") else "forward"
            shape = operator.checks[min(1, len(operator.checks) - 1)]
            elements = operator.floor(direction, "bf16", shape) / 2
            out.append({
                "kernel": kernel, "intensity": operator.flops * elements / 2 / operator.floor(direction, "bf16", shape),
                "status": source.status, "level": source.level, "config": chosen.config[kernel],
            })  # fmt: skip
    return out


def write(path: Path, arch: str, sku: str | None, operators: Iterable[str]) -> None:
    """Write the picture. PNG needs matplotlib; HTML (an inline SVG) needs nothing."""
    device = hardware.sku(sku, arch) or next(iter(hardware.skus_of(arch)), None)
    if device is None:
        raise ValueError(f"{arch}: bandwidth and peak of its devices are not public, so there is no roofline to draw")
    data = points(arch, device.name, operators)
    if path.suffix == ".png":
        _png(path, device, data)
    else:
        path.write_text(_html(device, data), encoding="utf-8")


def _title(device: hardware.Sku) -> str:
    recalled = f"; not confirmed: {', '.join(device.recalled)}" if device.recalled else ""
    return f"{device.name} ({device.arch}): {device.bandwidth / 1e12:.2f} TB/s, {device.peak_bf16 / 1e12:.0f} TFLOP/s bf16 (vendor figures{recalled})"


def _png(path: Path, device: hardware.Sku, data: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 6))
    xs = [0.1, device.balance, 10 * device.balance]
    axes.loglog(xs, [min(x * device.bandwidth, device.peak_bf16) for x in xs], color="black")
    for i, p in enumerate(data):
        axes.plot(p["intensity"], p["intensity"] * device.bandwidth, "o")
        axes.annotate(
            f"{p['kernel']} ({p['status']})",
            (p["intensity"], p["intensity"] * device.bandwidth * 0.9 ** (i + 1)),
            fontsize=7,
        )
    axes.set_xlabel("FLOP per byte of floor traffic")
    axes.set_ylabel("FLOP/s at the roof (a limit, not a measurement)")
    axes.set_title(_title(device), fontsize=9)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _html(device: hardware.Sku, data: list[dict[str, Any]]) -> str:
    """A log-log roofline as SVG and the configurations as a table."""
    import math

    width, height, left, bottom = 760, 420, 70, 40
    x0, x1 = math.log10(0.1), math.log10(10 * device.balance)
    y0, y1 = math.log10(0.1 * device.bandwidth), math.log10(2 * device.peak_bf16)

    def at(x: float, y: float) -> tuple[float, float]:
        return (left + (math.log10(x) - x0) / (x1 - x0) * (width - left - 20),
                height - bottom - (math.log10(y) - y0) / (y1 - y0) * (height - bottom - 20))  # fmt: skip

    roof = " ".join(
        f"{a:.1f},{b:.1f}"
        for a, b in (
            at(x, min(x * device.bandwidth, device.peak_bf16)) for x in (0.1, device.balance, 10 * device.balance)
        )
    )
    dots = []
    for i, p in enumerate(sorted(data, key=lambda p: p["intensity"])):
        x, y = at(p["intensity"], p["intensity"] * device.bandwidth)
        dots.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/><text x="{x + 90:.1f}" y="{height - bottom - 15 - 14 * i:.1f}" font-size="11">'
                    f'{html.escape(p["kernel"])}</text><line x1="{x:.1f}" y1="{y:.1f}" x2="{x + 86:.1f}" y2="{height - bottom - 19 - 14 * i:.1f}" '
                    'stroke="#bbb"/>')  # fmt: skip
    body = "".join(
        f"<tr><td>{html.escape(p['kernel'])}</td><td>{p['intensity']:.2f}</td><td>{html.escape(p['status'])} from {html.escape(p['level'])}</td>"
        f"<td>{html.escape(' '.join(f'{k}={v}' for k, v in p['config'].items()))}</td></tr>"
        for p in data
    )
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(device.name)} kernels</title>
<style>body{{font-family:sans-serif;max-width:60em;margin:2em auto}}td,th{{padding:.2em .8em;text-align:left}}</style></head><body>
<h1>{html.escape(_title(device))}</h1>
<p>The line is the device's limit, the dots are where each kernel meets it if it reaches full bandwidth. Nothing here was timed unless the status says measured.</p>
<svg viewBox="0 0 {width} {height}" role="img" aria-label="roofline"><polyline points="{roof}" fill="none" stroke="black"/>{"".join(dots)}
<text x="{left}" y="{height - 8}" font-size="12">FLOP per byte (log)</text><text x="5" y="15" font-size="12">FLOP/s (log)</text></svg>
<table><tr><th>kernel</th><th>FLOP/byte</th><th>configuration from</th><th>launch parameters</th></tr>{body}</table></body></html>
"""
