"""Prediction against measurement of one run: what ``train`` stores beside the plan, and one more row for the
calibration.
"""

from __future__ import annotations

from typing import Any


def compare(plan: dict[str, Any], tokens_per_s_per_gpu: float | None, peak_gib: float | None) -> dict[str, Any]:
    """Measured over predicted, as plain values.

    ``tokens_per_s_per_gpu``: token positions per second and GPU after warm-up; ``peak_gib``: the largest reserved
    memory of a rank as torch reports it (``max_memory_reserved``), which leaves out the context that the plan counts as
    ``framework``.
    """
    speed, stored = plan["tokens_per_s_per_gpu"], plan["memory_gib"]
    expected = stored["total"] - stored.get("framework", 0.0)
    found: dict[str, Any] = {
        "tokens_per_s_per_gpu": {"predicted": speed["mid"], "measured": tokens_per_s_per_gpu},
        "peak_gib": {"predicted": round(expected, 3), "measured": peak_gib},
    }
    if tokens_per_s_per_gpu:
        found["tokens_per_s_per_gpu"]["ratio"] = round(tokens_per_s_per_gpu / speed["mid"], 4)
        found["tokens_per_s_per_gpu"]["inside_interval"] = speed["low"] <= tokens_per_s_per_gpu <= speed["high"]
    if peak_gib and expected:
        found["peak_gib"]["ratio"] = round(peak_gib / expected, 4)
    return found
