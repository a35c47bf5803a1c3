"""Fitting the few constants of :mod:`aifactory_train.planning.timing` to published measurements, and validating them on
sources that were left out.

The fit minimises a Huber loss of the logarithm of predicted over measured tokens/s. Every *source* (repository or page)
has the same weight however many rows it prints, and each constant is drawn towards a prior, which is what it is when no
row speaks for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

from aifactory_train.planning import memory, timing
from aifactory_train.planning.timing import Constants
from planner.open_data import Row

#: Where each constant starts and what draws it there; the second number is the prior's standard deviation of the
#: logarithm. Sources of the priors: matrix products of 60 to 75 % of the peak (more on consumer chips, whose peak is
#: low for their clocks) and flash-attention rates as published with FlashAttention-2 (arXiv:2307.08691: A100 up to 230
#: TFLOP/s forward, H100 up to 335) and 3 (arXiv:2407.08608: H100 up to 740 forward, less in backward); 75 % of the
#: memory bandwidth as in torch's own pointwise kernels; 70 % of a link as in published NCCL bus bandwidths.
PRIORS: dict[str, tuple[float, float]] = {
    "gemm.sm_80": (0.72, 0.15),
    "gemm.sm_90": (0.60, 0.15),
    "gemm.sm_100": (0.50, 0.25),
    "gemm.gfx90a": (0.50, 0.15),
    "gemm.sm_86": (0.70, 0.15),
    "gemm.sm_89": (0.75, 0.15),
    "attention_own": (0.48, 0.15),
    "attention_ported": (0.28, 0.15),
    "small": (150.0, 0.4),
    "pointwise": (0.70, 0.10),
    "links": (0.65, 0.15),
    "hidden": (0.75, 0.10),
    "low_power": (0.5, 0.4),
    "host_ns": (1.5, 0.3),
}
FIXED: dict[str, Any] = {
    "measured": [],
    "gemm_default": 0.45,
    "launch_us": 10.0,
    "spread": 0.25,
    "spread_unmeasured": 0.6,
}


def prior() -> Constants:
    return _build({name: value for name, (value, _) in PRIORS.items()})


def _build(values: dict[str, float]) -> Constants:
    gemm = {name.removeprefix("gemm."): v for name, v in values.items() if name.startswith("gemm.")}
    plain: dict[str, Any] = {name: v for name, v in values.items() if not name.startswith("gemm.")}
    return Constants(gemm=gemm, **plain, **FIXED)


def origin(source: str) -> str:
    """The repository or page that a row was taken from: rows of one origin leak into each other and are left out
    together.
    """
    return source.split()[0].strip(",;:").lower() if source.split() else "unknown"


def usable(rows: Iterable[Row], tier: str = "A") -> list[Row]:
    return [r for r in rows if r.job is not None and r.tokens_per_s and r.tier == tier]


def _loss(values: dict[str, float], rows: Sequence[Row], weights: dict[str, float]) -> float:
    constants = _build(values)
    total = 0.0
    for row in rows:
        assert row.job is not None and row.tokens_per_s is not None
        error = abs(math.log(timing.tokens_per_s(row.job, constants) / row.tokens_per_s))
        knee = 0.10
        total += weights[origin(row.source)] * (error**2 if error < knee else knee * (2 * error - knee)) / 0.10**2
    for name, (start, width) in PRIORS.items():
        total += (math.log(values[name] / start) / width) ** 2
    return total


def fit(rows: Sequence[Row]) -> Constants:
    """Constants by coordinate descent on the logarithms: deterministic, no dependency, a few seconds."""
    origins = [origin(r.source) for r in rows]
    weights = {o: 1 / math.sqrt(origins.count(o)) for o in set(origins)}
    values = {name: value for name, (value, _) in PRIORS.items()}
    best = _loss(values, rows, weights)
    step = 0.08
    while step > 0.004:
        improved = False
        for name in PRIORS:
            for direction in (1, -1):
                trial = dict(values)
                trial[name] = values[name] * math.exp(direction * step)
                if name in ("hidden", "pointwise", "links") or name.startswith(("gemm", "attention")):
                    trial[name] = min(trial[name], 0.97)
                loss = _loss(trial, rows, weights)
                if loss < best - 1e-9:
                    best, values, improved = loss, trial, True
                    break
        if not improved:
            step /= 2
    return _build({name: round(value, 4) for name, value in values.items()})


def leave_one_out(rows: Sequence[Row]) -> dict[str, Constants]:
    """For every origin, the constants fitted to all the others."""
    return {o: fit([r for r in rows if origin(r.source) != o]) for o in sorted({origin(r.source) for r in rows})}


def errors(rows: Sequence[Row], without: dict[str, Constants], otherwise: Constants) -> list[float]:
    """Logarithm of predicted over measured tokens/s; each row predicted by constants that never saw its origin."""
    out = []
    for row in rows:
        assert row.job is not None and row.tokens_per_s is not None
        constants = without.get(origin(row.source), otherwise)
        out.append(math.log(timing.tokens_per_s(row.job, constants) / row.tokens_per_s))
    return out


#: The two memory constants that are not counts: the allocator's fragmentation, and bytes per logit of a compiled loss
#: (between the 6 of one fp32 copy with its bf16 source and the 14 of eager code). Grid, prior first.
MEMORY_GRID = {
    "fragmentation": [0.06, 0.0, 0.02, 0.04, 0.08, 0.10, 0.12],
    "compiled_logit_bytes": [8.0, 6.0, 7.0, 9.0, 10.0, 12.0, 14.0],
}


def fit_memory(rows: Sequence[Row]) -> dict[str, float]:
    """The memory constants with the least mean absolute logarithmic error (capped at 15 %), every origin weighing the
    same, drawn towards the prior.
    """
    origins = [origin(r.source) for r in rows]

    def cost(fragmentation: float, logit: float) -> float:
        total = 0.0
        for row, o in zip(rows, origins, strict=True):
            predicted = predicted_memory(row, {"fragmentation": fragmentation, "compiled_logit_bytes": logit})
            # capped: a run whose memory holds something that no column names (CUDA graphs' pools) must not bend the
            # constants
            total += min(0.15, abs(math.log(predicted / (row.memory_gib or 1)))) / origins.count(o)
        prior = ((fragmentation - 0.06) / 0.03) ** 2 + ((logit - 8.0) / 2.0) ** 2
        return round(total + 0.02 * prior, 6)

    pairs = [(f, b) for f in MEMORY_GRID["fragmentation"] for b in MEMORY_GRID["compiled_logit_bytes"]]
    best = min(pairs, key=lambda pair: cost(*pair))
    return {"fragmentation": best[0], "compiled_logit_bytes": best[1]}


def with_spread(constants: Constants, validation: Sequence[float]) -> Constants:
    """The interval's half-width: 1.25 times the 90th percentile of the validation errors (there are few origins, so the
    percentile itself is uncertain)."""
    ordered = sorted(abs(e) for e in validation)
    at = ordered[min(len(ordered) - 1, math.ceil(0.9 * len(ordered)) - 1)]
    return replace(constants, spread=round(math.exp(1.25 * at) - 1, 3))


def calibrate(rows: Sequence[Row]) -> dict:
    """Everything that ``data/calibration.json`` holds: the constants, those without each origin, and how they
    validate.
    """
    used = usable(rows)
    fitted, without = fit(used), leave_one_out(used)
    validation = errors(used, without, fitted)
    # the share of an architecture counts as measured where at least one row ran on it
    measured = sorted({r.job.gpu.arch for r in used if r.job is not None and r.job.gpu.arch in fitted.gemm})
    fitted = replace(with_spread(fitted, validation), measured=measured)
    read = [r for r in rows if r.job is not None and r.memory_gib and r.tier == "A"]
    return {
        "comment": "Written by benchmarks/planner_accuracy.py --refit from data/measurements.csv; see "
        "docs/planning.md.",
        "rows": len(used),
        "origins": sorted(without),
        "constants": as_dict(fitted),
        "without": {o: as_dict(replace(c, spread=fitted.spread, measured=measured)) for o, c in without.items()},
        "memory": fit_memory(read),
        "memory_without": {
            o: fit_memory([r for r in read if origin(r.source) != o]) for o in sorted({origin(r.source) for r in read})
        },
        "priors": {name: list(value) for name, value in PRIORS.items()},
    }


def as_dict(constants: Constants) -> dict:
    return {f.name: getattr(constants, f.name) for f in fields(Constants)}


def predicted_memory(row: Row, constants: dict[str, float]) -> float:
    """GiB as the row's source would read it: torch's allocator, or the device with its context."""
    assert row.job is not None
    job = row.job
    if job.stack.name.startswith("compiled"):
        job = replace(job, stack=replace(job.stack, loss_bytes_per_logit=constants["compiled_logit_bytes"]))
    reserve = constants["fragmentation"] if row.reserved_reading else 0.0
    return memory.predict(job, context=row.device_reading, fragmentation=reserve).total
