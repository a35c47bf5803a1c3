"""The curves of a run, and its memory against the plan."""

from __future__ import annotations

import html
from typing import Any

from aifactory_train.report.svg import Curve, chart


def curves(metrics: list[dict[str, Any]], record: dict[str, Any], plan: dict[str, Any]) -> str:
    train = [m for m in metrics if m.get("kind", "train") == "train" and "step" in m]
    held = [m for m in metrics if m.get("kind") == "eval" and "step" in m]
    if not train:
        return "<p>No step is finished yet.</p>"

    def curve(key: str, label: str) -> Curve:
        return Curve(
            label,
            [m["step"] for m in train],
            [m.get(key) if isinstance(m.get(key), (int, float)) else None for m in train],
        )

    # Under a preference method the training loss is one of pairs (or answers); beside replayed rows its own part is
    # logged apart.
    preference = any("preference_loss" in m or "reward_margin" in m for m in [*train, *held])
    shown = "preference_loss" if any("preference_loss" in m for m in train) else "loss"
    loss = [curve(shown, "training")]
    if held:
        key = "preference_loss" if preference else "loss"
        loss.append(Curve("held-out", [m["step"] for m in held], [m.get(key) for m in held], dots=True))
    unit = "preference loss of a pair or answer" if preference else "nats per supervised token"
    charts = [
        chart("loss", "Loss", unit, loss),
        chart("rate", "Learning rate", "", [curve("learning_rate", "learning rate")], zero=True),
        chart("norm", "Gradient norm", "L2, before clipping", [curve("grad_norm", "gradient norm")], zero=True),
        chart("speed", "Throughput", "tokens/s", [curve("tokens_per_s", "tokens/s")], zero=True),
    ]
    if preference:
        charts.append(chart("margin", "Reward margin", "good minus bad answers", [curve("reward_margin", "training")]))
    if any("expert_load_max" in m for m in train):
        most, even = "most on one expert, of an even share", "entropy of the loads, 1 is even"
        charts.append(chart("experts", "Expert load", most, [curve("expert_load_max", "fullest expert")], zero=True))
        charts.append(chart("entropy", "Expert entropy", even, [curve("expert_load_entropy", "mean over layers")]))
    memory = [m for m in train if isinstance(m.get("memory_bytes"), (int, float))]
    planned = _planned_bytes(plan)
    if memory:
        charts.append(
            chart(
                "memory",
                "Memory",
                "GiB at most so far",
                [Curve("rank 0", [m["step"] for m in memory], [m["memory_bytes"] / 2**30 for m in memory])],
                zero=True,
                reference=("plan", planned / 2**30) if planned else None,
            )
        )
    return f'<div class="charts">{"".join(charts)}</div>{_memory_line(record, planned)}'


def _planned_bytes(plan: dict[str, Any]) -> float | None:
    """What the plan expected on a device, where a plan was made (GiB by purpose, with their total)."""
    parts = plan.get("memory_gib")
    if isinstance(parts, dict) and isinstance(parts.get("total"), (int, float)):
        return float(parts["total"]) * 2**30
    return None


def _memory_line(record: dict[str, Any], planned: float | None) -> str:
    attempts = record.get("compute", {}).get("attempts", {})
    peaks = [a["peak_memory_bytes"] for a in attempts.values() if a.get("peak_memory_bytes")]
    if not peaks:
        return ""
    most = max(peaks, key=lambda p: p["bytes"])
    text = f"Memory at most: {most['bytes'] / 2**30:.3g} GiB ({most['kind']})"
    text += f"; the plan expected {planned / 2**30:.3g} GiB" if planned else "; no plan was made for this run"
    return f"<p>{html.escape(text)}.</p>"
