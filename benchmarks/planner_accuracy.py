"""How well the planner predicts published measurements: tokens/s and peak memory, row by row.

    python benchmarks/planner_accuracy.py                       # the measurements that the planner was calibrated on
    python benchmarks/planner_accuracy.py --csv FILE [--json]   # any file with the same columns
    python benchmarks/planner_accuracy.py --refit               # fit the constants anew and write data/calibration.json

Every row from a repository or page that the calibration used is predicted with constants fitted *without that whole
origin*, so what is printed is a validation error, never the fit. A row outside the planner's scope gets ``in_scope:
false``, a reason and no number. Headline figures are over in-scope rows of tier A (or without a tier); tier B
(something inferred or missing in the source) is shown apart, and so are mixtures of experts and rows whose tokens/s
follow from printed TFLOP/s by the convention that the row states.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from planner import calibrate, open_data
from planner.open_data import Row

from aifactory_train.core.errors import UserError
from aifactory_train.planning import memory, timing
from aifactory_train.planning.timing import DATA, Constants

MEASUREMENTS = DATA / "measurements.csv"
CALIBRATION = DATA / "calibration.json"


def constants_for(row: Row, calibration: dict[str, Any]) -> Constants:
    """Constants that never saw the row's origin."""
    values = calibration["without"].get(calibrate.origin(row.source), calibration["constants"])
    return Constants(**values)


def assess(row: Row, calibration: dict[str, Any]) -> dict[str, Any]:
    """One row of the report. Numbers of rows outside the scope are ``None``."""
    out: dict[str, Any] = {
        "id": row.id,
        "tokens_per_s_true": row.tokens_per_s,
        "tokens_per_s_pred": None,
        "low": None,
        "high": None,
        "memory_true": row.memory_gib,
        "memory_pred": None,
        "feasible": None,
        "in_scope": row.job is not None,
        "experts": row.job is not None and row.job.shape.has_experts,
        "why": row.why,
        "tier": row.tier,
        "source": row.source,
        "tokens_derived": row.tokens_derived,
        "assumed": list(row.assumed),
    }
    if row.job is None:
        return out
    try:
        constants = constants_for(row, calibration)
        tokens = timing.tokens_per_s(row.job, constants)
        low, high = timing.interval(row.job, tokens, constants)
        device = memory.predict(row.job)
        stored = calibration["memory_without"].get(calibrate.origin(row.source), calibration["memory"])
        read = calibrate.predicted_memory(row, stored)
    except UserError as error:
        return {**out, "in_scope": False, "why": error.what}
    capacity = memory.capacity(row.job)
    # the published run did fit: only what the planner itself would refuse counts as infeasible
    feasible = None if capacity is None else device.total <= capacity
    return {
        **out,
        "tokens_per_s_pred": round(tokens, 1),
        "low": round(low, 1),
        "high": round(high, 1),
        "memory_pred": round(read, 2),
        "feasible": feasible,
        "why": None
        if feasible is not False
        else f"{device.total:.1f} GiB by the planner's count, {capacity:.1f} GiB on the GPU",
    }


def _percentile(values: list[float], share: float) -> float | None:
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1] if ordered else None


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Errors as fractions of the measured value, over the given rows."""
    tokens = [
        r["tokens_per_s_pred"] / r["tokens_per_s_true"] - 1
        for r in rows
        if r["tokens_per_s_true"] and r["tokens_per_s_pred"]
    ]
    stored = [r["memory_pred"] / r["memory_true"] - 1 for r in rows if r["memory_true"] and r["memory_pred"]]
    inside = [r["low"] <= r["tokens_per_s_true"] <= r["high"] for r in rows if r["tokens_per_s_true"] and r["low"]]
    return {
        "rows_tokens": len(tokens),
        "median_abs_err_tokens": statistics.median(map(abs, tokens)) if tokens else None,
        "p90_abs_err_tokens": _percentile([abs(e) for e in tokens], 0.9),
        "rows_memory": len(stored),
        "median_abs_err_memory": statistics.median(map(abs, stored)) if stored else None,
        "coverage": sum(inside) / len(inside) if inside else None,
    }


def report(path: Path) -> dict[str, Any]:
    """The whole report of a CSV file."""
    calibration = json.loads(CALIBRATION.read_text(encoding="utf-8"))
    rows = [assess(open_data.read_row(raw), calibration) for raw in open_data.read_csv(path)]
    scope = [r for r in rows if r["in_scope"]]
    dense = [r for r in scope if not r["experts"]]
    printed = [r for r in dense if not r["tokens_derived"]]
    tier_a = [r for r in printed if r["tier"] in ("A", None)]
    derived = [r for r in dense if r["tokens_derived"] and r["tier"] in ("A", None)]
    headline = summary(tier_a)
    # memory readings of rows with derived tokens/s are readings like any other
    headline.update({k: v for k, v in summary(tier_a + derived).items() if "memory" in k})
    return {
        "rows": rows,
        **headline,
        "tier_b": summary([r for r in printed if r["tier"] not in ("A", None)]),
        "derived": summary(derived),
        "experts": summary([r for r in scope if r["experts"]]),
        "in_scope": len(scope),
        "out_of_scope": len(rows) - len(scope),
        "published_but_infeasible": [r["id"] for r in scope if r["feasible"] is False],
    }


def _show(result: dict[str, Any], path: Path) -> None:
    def percent(value: float | None) -> str:
        return "    –" if value is None else f"{100 * value:+6.1f}%"

    print(f"{path.name}: {result['in_scope']} rows in scope, {result['out_of_scope']} outside\n")
    print(
        f"{'id':<20} {'tier':<4} {'tok/s true':>10} {'predicted':>10} {'error':>8}  {'interval':<19} {'GiB true':>8} "
        f"{'pred.':>7} {'error':>8}  note"
    )
    for r in result["rows"]:
        if not r["in_scope"]:
            continue
        t, p, m, q = r["tokens_per_s_true"], r["tokens_per_s_pred"], r["memory_true"], r["memory_pred"]
        note = "; ".join(filter(None, ["derived" if r["tokens_derived"] else "", r["why"] or "", *r["assumed"]]))
        print(
            f"{r['id']:<20} {r['tier'] or '–':<4} {(t and f'{t:.0f}') or '–':>10} {p:>10.0f} "
            f"{percent(p / t - 1 if t else None):>8}  "
            f"[{r['low']:.0f}, {r['high']:.0f}]".ljust(78)
            + f" {(m and f'{m:.1f}') or '–':>8} {q:>7.1f} {percent(q / m - 1 if m else None):>8}  {note}"
        )
    print("\noutside the planner's scope:")
    for r in result["rows"]:
        if not r["in_scope"]:
            print(f"  {r['id']:<20} {r['why']}")

    def line(name: str, s: dict[str, Any]) -> None:
        print(
            f"  {name:<34} tokens/s: n={s['rows_tokens']:<3} median {percent(s['median_abs_err_tokens'])}  p90 "
            f"{percent(s['p90_abs_err_tokens'])}  "
            f"interval covers {percent(s['coverage'])}   memory: n={s['rows_memory']:<3} median "
            f"{percent(s['median_abs_err_memory'])}"
        )

    print("\nabsolute errors, each row predicted without its whole origin:")
    line("tier A (headline)", result)
    line("tier A, tokens/s from TFLOP/s", result["derived"])
    line("tier B", result["tier_b"])
    line("mixtures of experts, all tiers", result["experts"])
    bugs = result["published_but_infeasible"]
    print(f"  predicted infeasible although published as run: {', '.join(bugs) if bugs else 'none'}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--csv", type=Path, default=MEASUREMENTS, help="measurements; default: those the planner was calibrated on"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument(
        "--refit", action="store_true", help="fit the constants to the shipped measurements and write them"
    )
    args = parser.parse_args(argv)
    try:
        if args.refit:
            rows = [open_data.read_row(raw) for raw in open_data.read_csv(MEASUREMENTS)]
            CALIBRATION.write_text(json.dumps(calibrate.calibrate(rows), indent=1) + "\n", encoding="utf-8")
        result = report(args.csv)
    except UserError as error:
        print(f"planner_accuracy: {error}", file=sys.stderr)
        return error.exit_code
    if args.json:
        print(json.dumps(result, ensure_ascii=False, allow_nan=False))
    else:
        _show(result, args.csv)
    return 0


if __name__ == "__main__":
    sys.exit(main())
