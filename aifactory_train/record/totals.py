"""Sums over the attempts of a run."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe


def totals(attempts: dict[str, Any], recipe: Recipe, before: dict[str, Any]) -> dict[str, Any]:
    """Sums over all attempts, what was computed twice, and the cross-check of the FLOPs against 6 P D."""
    ordered = [attempts[k] for k in sorted(attempts)]

    def add(key: str) -> float:
        return sum(a.get(key) or 0 for a in ordered)

    repeated_steps, wasted_h = 0, 0.0
    for old, new in itertools.pairwise(ordered):
        again = max(0, old["last_step"] - new["first_step"])
        if again and old["steps"]:
            repeated_steps += again
            wasted_h += old["device_hours"] * min(1.0, again / old["steps"])
        elif not old["steps"]:
            wasted_h += old["device_hours"]  # an attempt that never made a step
    base, method = before.get("base", {}), before.get("method", {})
    result: dict[str, Any] = {
        "wall_s": round(add("wall_s"), 3),
        "wall_days": add("wall_s") / 86400,
        "device_hours": add("device_hours"),
        "device_days": add("device_hours") / 24,
        "steps": int(add("steps")),
        "tokens_processed": {"real": int(add("tokens")), "with_padding": int(add("positions"))},
        "supervised_tokens": int(add("supervised_tokens")),
        "flop_model": add("flop_model"),
        "flop_model_full_attention": add("flop_model_full_attention"),
        "flop_executed": add("flop_executed"),
        "flop_method": "counted per step from the tokens of each document: matrix products, attention causal inside "
        "documents; "
        "executed adds padding and recomputation; evaluation and export are not counted",
        "restarts": max(0, len(ordered) - 1),
        "repeated_steps": repeated_steps,
        "wasted_device_hours": wasted_h,
        "peak_flops_used": None,
        "mfu": None,
    }
    parameters = base.get("params_total")
    if isinstance(parameters, (int, float)) and result["flop_model"]:
        factor = 6 if method.get("kind") == "full" else 4
        plain_count = factor * parameters * result["tokens_processed"]["real"]
        off = 100 * (result["flop_model"] / plain_count - 1) if plain_count else 0.0
        result["cross_check"] = {
            "formula": f"{factor} x parameters x tokens",
            "flop": plain_count,
            "difference_pct": round(off, 1),
            "more_than_30_pct": abs(off) > 30,
            "why_it_may_differ": "the output layer runs at supervised positions only; attention and adapters are "
            "counted; the "
            "formula counts embeddings as if they were multiplied",
        }
    _add_utilisation(result, before, add("train_s"), ordered)
    return result


def _add_utilisation(
    result: dict[str, Any], before: dict[str, Any], train_s: float, ordered: list[dict[str, Any]]
) -> None:
    """MFU against the dense peak of a GPU that the catalogue knows; none is printed for any other device."""
    device = before.get("compute", {}).get("device", {})
    if device.get("kind") != "gpu" or not train_s:
        return
    import re

    from aifactory_train.sites.profiles import gpu_catalogue

    precision = "bf16" if "compute bf16" in str(before.get("hparams", {}).get("precision", "")) else "fp32"
    for facts in gpu_catalogue().values():
        if any(re.search(pattern, str(device.get("model"))) for pattern in facts.get("device_names") or ()):
            peak = (facts.get("peak_tflops") or {}).get(precision)
            if peak:
                ranks = ordered[-1]["ranks"]
                result["peak_flops_used"] = {"flop_per_s": peak * 1e12, "precision": precision, "sparsity": "dense"}
                result["mfu"] = result["flop_model"] / (peak * 1e12 * train_s * ranks)
            return
