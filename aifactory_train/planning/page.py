"""The plan as one HTML page: a memory stack, a scaling curve, the reasons. No script, no outside resource, every text
escaped.
"""

from __future__ import annotations

import math
from html import escape
from pathlib import Path
from typing import Any

from aifactory_train.core.files import write_atomic

_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5", "#9c6b4e")

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#1b1e23;background:#fff}
h1{font-size:1.35rem}h2{font-size:1.05rem;margin-top:2rem}table{border-collapse:collapse}
td,th{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
code{background:#f2f3f5;padding:.1rem .3rem;border-radius:3px}svg{max-width:100%}li{margin:.2rem 0}small{color:#5b616b}
@media(prefers-color-scheme:dark){body{color:#e6e8eb;background:#15171a}code{background:#24282e}small{color:#9aa1ab}}
"""


def write_page(plan: dict[str, Any], path: Path) -> None:
    """Write the page; raises :class:`~aifactory_train.core.errors.UserError` where the file cannot be written."""
    write_atomic(path, render(plan), where=f"--html {path}")


def render(plan: dict[str, Any]) -> str:
    """The page as text."""
    title = f"{plan['recipe']} on {plan['nodes']} node(s) of {plan['site']}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(plan['base'])}, {escape(plan['method'])}, {plan['gpus']} GPU(s) {escape(plan['gpu'])}. "
        f"<small>{escape(plan['basis'])}</small></p>",
        "<table>"
        + "".join(f"<tr><th>{escape(k)}</th><td>{escape(str(v))}</td></tr>" for k, v in facts(plan))
        + "</table>",
        "<h2>Memory per GPU at the peak</h2>",
        memory_stack(plan),
        "<h2>Scaling</h2>",
        scaling_curve(plan),
        "<h2>Why</h2><ul>" + "".join(f"<li>{escape(r)}</li>" for r in plan["reasons"]) + "</ul>",
        "<h2>Settings</h2><p>"
        + " ".join(f"<code>{escape(k)}={escape(str(v))}</code>" for k, v in plan["overrides"].items())
        + "</p>",
    ]
    head = (
        f"<!doctype html><html lang='en'><head><meta "
        f"charset='utf-8'><title>{escape(title)}</title><style>{_STYLE}</style></head>"
    )
    return head + "<body>" + "\n".join(body) + "</body></html>\n"


def facts(plan: dict[str, Any]) -> list[tuple[str, str]]:
    """The configuration, its speed, time and cost, in words."""
    speed = plan["tokens_per_s_per_gpu"]
    return [
        ("engine", f"{plan['engine']}, {plan['mesh']['replicate']} x {plan['mesh']['shard']} (replicate x shard)"),
        ("micro-batch", f"{plan['micro_batch']} x {plan['sequence_length']} tokens, {plan['grad_accum']} a step"),
        ("activation checkpointing", plan["activation_checkpointing"]),
        ("tokens/s per GPU", f"{speed['mid']:.0f} ({speed['low']:.0f} to {speed['high']:.0f})"),
        ("model FLOPs utilisation", f"{100 * plan['mfu']:.0f} % (executed {100 * plan['hfu']:.0f} %)"),
        ("time", "unknown" if plan["hours"] is None else f"{plan['hours']:.4g} h"),
        ("GPU-hours", "unknown" if plan["gpu_hours"] is None else f"{plan['gpu_hours']:.4g}"),
        (
            "billed there",
            f"{plan['billed']['amount']:.4g} {plan['billed']['unit']}" if plan.get("billed") else "unknown",
        ),
        ("GPU energy", "unknown" if plan["kwh"] is None else f"{plan['kwh']:.4g} kWh"),
    ]


def memory_stack(plan: dict[str, Any]) -> str:
    """One horizontal bar of the components, the GPU's capacity as a line, and the same as a table."""
    parts = [(k, v) for k, v in plan["memory_gib"].items() if k != "total" and v > 0]
    capacity = plan["capacity_gib"]
    scale = 760 / max(capacity, plan["memory_gib"]["total"])
    x, bars = 0.0, []
    for (name, value), colour in zip(parts, _COLOURS, strict=False):
        bars.append(
            f"<rect x='{x:.1f}' y='6' width='{value * scale:.1f}' height='36' fill='{colour}'><title>{escape(name)} "
            f"{value:.2f} GiB</title></rect>"
        )
        x += value * scale
    edge = capacity * scale
    svg = (
        f"<svg viewBox='0 0 800 64' role='img' aria-label='memory by component'>{''.join(bars)}"
        f"<line x1='{edge:.1f}' x2='{edge:.1f}' y1='0' y2='48' stroke='currentColor' stroke-width='2'/>"
        f"<text x='{edge:.1f}' y='61' text-anchor='end' font-size='12' fill='currentColor'>{capacity:.1f} "
        f"GiB</text></svg>"
    )
    rows = "".join(
        f"<tr><td><svg width='11' height='11' aria-hidden='true'><rect width='11' height='11' fill='{c}'/></svg> {escape(n)}</td><td class='n'>{v:.2f} GiB</td></tr>"
        for (n, v), c in zip(parts, _COLOURS, strict=False)
    )
    return svg + f"<table>{rows}<tr><th>total</th><th class='n'>{plan['memory_gib']['total']:.2f} GiB</th></tr></table>"


def scaling_curve(plan: dict[str, Any]) -> str:
    """Tokens/s over nodes, both axes logarithmic, with the line of perfect scaling; and the same as a table."""
    points = plan["scaling"]
    rows = "".join(
        f"<tr><td class='n'>{p['nodes']}</td><td class='n'>{p['gpus']}</td><td>{escape(p['engine'])}</td><td "
        f"class='n'>{p['tokens_per_s']:.0f}</td>"
        f"<td class='n'>{'–' if p['hours'] is None else format(p['hours'], '.4g')}</td>"
        f"<td class='n'>{'–' if p['gpu_hours'] is None else format(p['gpu_hours'], '.4g')}</td></tr>"
        for p in points
    )
    head = (
        "<tr><th class='n'>nodes</th><th class='n'>GPUs</th><th>engine</th><th class='n'>tokens/s</th><th "
        "class='n'>hours</th><th class='n'>GPU-hours</th></tr>"
    )
    grid = f"<table>{head}{rows}</table>"
    if len(points) < 2:
        return grid
    first, last = points[0], points[-1]
    ideal = first["tokens_per_s"] * last["nodes"] / first["nodes"]
    low, high = math.log(first["tokens_per_s"] * 0.8), math.log(max(ideal, *(p["tokens_per_s"] for p in points)))
    left, right = math.log(first["nodes"]), math.log(last["nodes"])

    def place(nodes: float, speed: float) -> tuple[float, float]:
        x = 60 + 700 * (math.log(nodes) - left) / (right - left)
        return x, 250 - 230 * (math.log(speed) - low) / (high - low)

    line = " ".join("{:.1f},{:.1f}".format(*place(p["nodes"], p["tokens_per_s"])) for p in points)
    (x1, y1), (x2, y2) = place(first["nodes"], first["tokens_per_s"]), place(last["nodes"], ideal)
    dots = ""
    for p in points:
        x, y = place(p["nodes"], p["tokens_per_s"])
        dots += (
            f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{6 if p['nodes'] == plan['nodes'] else 3.5}' "
            f"fill='{_COLOURS[0]}'><title>{p['nodes']} nodes, {p['tokens_per_s']:.0f} tokens/s</title></circle>"
        )
        dots += f"<text x='{x:.1f}' y='272' text-anchor='middle' font-size='12' fill='currentColor'>{p['nodes']}</text>"
    return (
        "<svg viewBox='0 0 800 280' role='img' aria-label='tokens per second over nodes'>"
        f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='currentColor' stroke-dasharray='4 4' "
        f"opacity='.4'/>"
        f"<polyline points='{line}' fill='none' stroke='{_COLOURS[0]}' stroke-width='2'/>{dots}</svg>"
        "<p><small>Tokens/s over nodes, both logarithmic; dashed: perfect scaling; large dot: this plan.</small></p>"
        + grid
    )
