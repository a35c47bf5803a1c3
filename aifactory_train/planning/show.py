"""The plan as tables for people."""

from __future__ import annotations

from typing import Any

from aifactory_train.core.output import console, table


def show(plan: dict[str, Any]) -> None:
    """Print the plan."""
    out = console()
    out.print(
        f"{plan['recipe']}: {plan['base']} ({plan['method']}) on {plan['nodes']} node(s), {plan['gpus']} GPU(s) of "
        f"{plan['site']}",
        markup=False,
    )
    out.print()
    _figures(plan)
    out.print()
    stack = [[name, f"{value:.2f}"] for name, value in plan["memory_gib"].items() if name != "total" and value]
    stack.extend((["total", f"{plan['memory_gib']['total']:.2f}"], ["GPU", f"{plan['capacity_gib']:.2f}"]))
    table("Memory per GPU at the peak, GiB", ["component", "GiB"], stack, right=(1,))
    out.print()
    out.print("Why", style="bold")
    for reason in plan["reasons"]:
        out.print(f"  {reason}", markup=False)
    _others(plan)
    _verified(plan)
    out.print()
    out.print("To train with this plan:", style="bold")
    settings = " ".join(f"--set {key}={_yaml(value)}" for key, value in plan["overrides"].items())
    out.print(f"  {settings}", markup=False, soft_wrap=True)  # one line, so that it can be copied


def _figures(plan: dict[str, Any]) -> None:
    """The configuration, its speed, time and cost."""
    speed = plan["tokens_per_s_per_gpu"]
    mesh = plan["mesh"]
    spread = f"{mesh['replicate']} x {mesh['shard']} (replicate x shard)"
    billed = plan.get("billed")
    rows: list[list[Any]] = [
        ["engine", f"{plan['engine']}, {spread}"],
        ["micro-batch", f"{plan['micro_batch']} x {plan['sequence_length']} tokens, {plan['grad_accum']} a step"],
        ["checkpointing", plan["activation_checkpointing"]],
        [
            "kernels",
            f"{'ours, ' + plan['kernels']['key'] if plan['kernels']['enabled'] else 'torch'}; "
            f"{plan['kernels']['loss_chunk_tokens']} rows of logits at a time",
        ],
        ["tokens/s per GPU", f"{speed['mid']:.0f}  ({speed['low']:.0f} to {speed['high']:.0f}, modelled)"],
        ["MFU / executed", f"{100 * plan['mfu']:.0f} % / {100 * plan['hfu']:.0f} % of the dense bf16 peak"],
        ["step", f"{plan['step_seconds']['total']:.3f} s for {plan['step_tokens']:.0f} tokens"],
        ["steps", _or_unknown(plan["steps"], "{:d}")],
        ["time", _or_unknown(plan["hours"], "{:.4g} h") + _reference(plan["reference_hours"])],
        ["GPU-hours", _or_unknown(plan["gpu_hours"], "{:.4g}") + _interval(plan["gpu_hours_interval"])],
        ["GPU energy", _or_unknown(plan["kwh"], "{:.4g} kWh (85 % of the nominal power, GPUs alone)")],
    ]
    if billed:
        unit = billed["unit"] + (f", {billed['unit_is']}" if billed["unit_is"] else "")
        rows.append(["billed there", f"{billed['amount']:.4g} {unit}"])
    elif plan["hours"] is not None and plan["site"] != "local":
        rows.append(["billed there", "unknown: what the site bills for an hour is not published"])
    if plan.get("billed_share") is not None:
        rows.append(["share of its budget", f"{100 * plan['billed_share']:.3g} %"])
    if plan["co2_kg"] is not None:
        rows.append(["CO2", f"{plan['co2_kg']:.4g} kg"])
    if plan["cost"]:
        rows.append(["cost", f"{plan['cost']['amount']} {plan['cost']['currency'] or ''}"])
    if plan["allocation_share"] is not None:
        rows.append(["share of allocation", f"{100 * plan['allocation_share']:.2g} %"])
    table(None, ["what", "plan"], rows)


def _others(plan: dict[str, Any]) -> None:
    """Other configurations, and other numbers of nodes."""
    out = console()
    if plan["alternatives"]:
        out.print()
        rows = [
            [
                a["engine"],
                f"{a['mesh']['replicate']} x {a['mesh']['shard']}",
                a["activation_checkpointing"],
                f"{a['micro_batch']} x {a['grad_accum']}",
                f"{a['memory_gib']:.1f}",
                f"{a['tokens_per_s_per_gpu']:.0f}",
                f"{100 * a['slower']:+.1f} %",
            ]
            for a in plan["alternatives"]
        ]
        table(
            "Also possible",
            ["engine", "mesh", "checkpointing", "micro x accum", "GiB", "tokens/s", "time"],
            rows,
            right=(4, 5, 6),
        )
    if len(plan["scaling"]) > 1:
        out.print()
        rows = [
            [
                t["nodes"],
                t["gpus"],
                t["engine"],
                f"{t['tokens_per_s']:.0f}",
                _or_unknown(t["hours"], "{:.4g}"),
                _or_unknown(t["gpu_hours"], "{:.4g}"),
            ]
            for t in plan["scaling"]
        ]
        table("Nodes", ["nodes", "GPUs", "engine", "tokens/s", "hours", "GPU-hours"], rows, right=(0, 1, 3, 4, 5))


def _verified(plan: dict[str, Any]) -> None:
    """Bytes of the sharded model that was built, where one was asked for."""
    out = console()
    if plan.get("verified_sharding"):
        out.print()
        checked = plan["verified_sharding"]
        rows = [
            [c["what"], f"{c['built']:.0f}", f"{c['planned']:.0f}", f"{100 * c['difference']:+.3f} %"]
            for c in checked["rows"]
        ]
        table(
            f"Sharded model built for {checked['world']} ranks in {checked['seconds']:.1f} s (rank {checked['rank']})",
            ["bytes", "built", "planned", "difference"],
            rows,
            right=(1, 2, 3),
        )


def _yaml(value: Any) -> str:
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else str(value)


def _or_unknown(value: Any, form: str) -> str:
    return "unknown (how much there is to train on is not known)" if value is None else form.format(value)


def _reference(hours: float | None) -> str:
    return "" if hours is None else f", of which {hours:.3g} h for the reference of the preference method"


def _interval(value: dict[str, float] | None) -> str:
    return f"  ({value['low']:.4g} to {value['high']:.4g})" if value else ""
