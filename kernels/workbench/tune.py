"""Chooses launch parameters in the order legality, code quality, dominance, model, measurement, and says which of them
was reached.

Without a GPU the result is ``modelled`` (or ``static-pruned`` where the device's units are unknown), never tuned. On a
device the best of the model, two random configurations and the default are timed, and the rank correlation of model and
time is reported: the number that tells whether the model deserves trust.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from aifactory_train.kernels import hardware, registry
from aifactory_train.kernels.hardware import Sku, Target
from aifactory_train.kernels.spec import ITEMSIZE, Config, Kernel, Operator, Shape, grid_stride, moderate
from aifactory_train.kernels.workbench import compile as compiler
from aifactory_train.kernels.workbench.check import is_aligned

HALF = ["bf16", "fp16"]

#: upper ends of the size ranges that configurations are chosen for; the last range is open
BUCKETS = {
    "hidden": (256, 1024, 2048, 4096, 8192, 16384),
    "width": (28672,),
    "vocab": (151936,),
    "numel": (4096 * 4096,),
    "head_dim": (64, 128, 256),
    "in": (4096,),
    "out": (4096,),
}


#: size that a range is tuned at, where that is not its upper end: rows up to 256 wide are mostly heads of 128 (QK-norm)
REPRESENTATIVE = {("hidden", 256): 128}


@dataclasses.dataclass
class TrialConfig:
    """One configuration with what is known of it. ``seconds`` is the model's estimate, ``measured`` the device's
    median.
    """

    config: Config
    use: compiler.Compiled | None = None
    problems: tuple[str, ...] = ()
    in_flight: float = 0.0
    extra_bytes: float = 0.0
    seconds: float | None = None
    measured: float | None = None


def ranges(kernel: Kernel, operator: Operator) -> tuple[int, ...]:
    """Upper ends of the size ranges of a kernel: its own, the usual ones of its key, or one range at the operator's
    widest shape.
    """
    return kernel.ranges or BUCKETS.get(kernel.key) or (max(shape[kernel.key] for shape in operator.checks),)


def typical(kernel: Kernel, operator: Operator, size: int) -> dict[str, int]:
    """A shape in which ``kernel.key`` has the given size: 8192 rows (prime neighbours would only change masks), common
    heads.
    """
    shape = {
        "rows": 8192,
        "hidden": 4096,
        "width": 14336,
        "vocab": 128256,
        "numel": 1 << 24,
        "heads": 32,
        "kv_heads": 8,
        "head_dim": 128,
        "in": 4096,
        "out": 4096,
        "rank": 16,
    }
    # Sizes of no usual name: those of the operator's usual shape to check.
    shape = dict(operator.checks[min(1, len(operator.checks) - 1)]) | shape
    return shape | {kernel.key: REPRESENTATIVE.get((kernel.key, size), size), "rows": 8191}


def gate(kernel: Kernel, dtype: str, shape: Shape, target: Target, configs: Iterable[Config]) -> list[TrialConfig]:
    """Compile every configuration; ``problems`` names what legality or code quality holds against it."""
    out = []
    for config in configs:
        candidate = TrialConfig(config)
        try:
            candidate.use = compiler.compile_kernel(kernel, config, dtype, shape, target.name)
        except compiler.Unsupported:
            raise
        except RuntimeError as error:
            candidate.problems = (f"does not compile: {str(error).splitlines()[0][:120]}",)
        else:
            matrix = kernel.matrix and dtype != "fp32"
            candidate.problems = tuple(
                compiler.findings(candidate.use, target, matrix, is_aligned(kernel, dtype, shape), kernel.thin)
            )
        out.append(candidate)
    return out


def tile_bytes(kernel: Kernel, config: Config, dtype: str, shape: Shape) -> float:
    """Bytes that one block of the kernel requests before it waits: its tile in every input, times the pipeline's
    stages.
    """
    c = kernel.constexprs(config, dtype, shape)
    if kernel.tile is None and "BLOCK" not in c:
        raise ValueError(f"{kernel.name}: without a compile-time BLOCK its space.py must give the kernel a `tile`")
    elements = kernel.tile(c) if kernel.tile else c["BLOCK"] * c.get("ROWS", 1)
    return elements * ITEMSIZE[dtype] * kernel.inputs * config.get("stages", 1)


def model(kernel: Kernel, candidates: list[TrialConfig], dtype: str, shape: Shape, sku: Sku, floor: int) -> None:
    """Fill in ``seconds`` by Little's law: bandwidth is reached when units x latency worth of bytes are in flight.

    seconds = (floor + partial sums) / (bandwidth x min(1, in flight / needed) x load width / 16). An estimate for
    ranking only: the latency is assumed, and whether the hardware keeps all requested bytes outstanding cannot be known
    here.
    """
    needed = sku.bandwidth / sku.units * hardware.LATENCY
    for c in candidates:
        if c.problems or c.use is None or not c.use.occupancy:
            continue
        blocks = c.use.occupancy
        if "grid_mult" in c.config:
            blocks = min(blocks, c.config["grid_mult"])
            programs = grid_stride(c.config, shape["rows"], sku.units)
            c.extra_bytes = 8.0 * programs * (kernel.partial(shape) if kernel.partial else shape[kernel.key])
        c.in_flight = blocks * tile_bytes(kernel, c.config, dtype, shape)
        reach = min(1.0, c.in_flight / needed) * min(1.0, c.use.load_bytes / 16)
        c.seconds = (floor + c.extra_bytes) / (sku.bandwidth * reach)


def undominated(candidates: list[TrialConfig]) -> list[TrialConfig]:
    """Drop a legal candidate when another has at least its bytes in flight and occupancy, at most its traffic and
    registers.
    """

    def beats(a: TrialConfig, b: TrialConfig) -> bool:
        assert a.use and b.use
        ours = (a.in_flight, a.use.occupancy or 0, -a.extra_bytes, -a.use.registers)
        theirs = (b.in_flight, b.use.occupancy or 0, -b.extra_bytes, -b.use.registers)
        return all(x >= y for x, y in zip(ours, theirs, strict=True)) and ours != theirs

    legal = [c for c in candidates if not c.problems]
    return [c for c in legal if not any(beats(o, c) for o in legal if o is not c)]


def preference(c: TrialConfig) -> tuple:
    """Order among equal estimates: occupancy, then fewer registers, then less shared memory."""
    assert c.use
    return (c.seconds if c.seconds is not None else 0.0, -(c.use.occupancy or 0), c.use.registers, c.use.shared)


def floor_of(kernel: Kernel, op: str, dtype: str, shape: Shape) -> int:
    return registry.operator(op).floor(kernel.direction, dtype, shape)


@dataclasses.dataclass
class Result:
    """The outcome for one kernel, dtype and size range."""

    op: str
    kernel: Kernel
    dtype: str
    size: int
    shape: dict[str, int]
    considered: int
    illegal: int
    dominated: int
    kept: list[TrialConfig]
    status: str
    correlation: float | None = None


def tune_kernel(
    op: str,
    kernel: Kernel,
    dtype: str,
    size: int,
    target: Target,
    sku: Sku | None,
    keep: int,
    measure: Callable[[str, Kernel, Config, str, Shape], float] | None = None,
) -> Result:
    """All gates for one kernel; ``kept`` is best first. Raises ``LookupError`` when nothing is legal."""
    operator = registry.operator(op)
    shape = typical(kernel, operator, size)
    configs = list(kernel.space(target, dtype, shape))
    default = registry.select(op, target.name, None, dtype, {d: shape[d] for d in operator.dims}).config[kernel.name]
    candidates = gate(kernel, dtype, shape, target, configs if default in configs else [*configs, default])
    if sku:
        model(kernel, candidates, dtype, shape, sku, floor_of(kernel, op, dtype, shape))
    _gate_elsewhere(op, kernel, dtype, size, target, candidates)
    legal = [c for c in candidates if not c.problems]
    if not legal:
        worst = "; ".join(sorted({p for c in candidates for p in c.problems}))
        raise LookupError(
            f"{kernel.name} {dtype} {kernel.key}={size}: no legal configuration on {target.name} ({worst})"
        )
    front = sorted(undominated(candidates), key=preference)
    kept = front[:keep]
    rest = [c for c in legal if c not in kept]
    random.Random(f"{kernel.name}{dtype}{size}").shuffle(rest)
    kept += rest[:2] + [c for c in legal if c.config == default and c not in kept and c not in rest[:2]]
    status = "modelled" if kept[0].seconds is not None else "static-pruned"
    correlation = None
    if measure:
        for c in kept:
            c.measured = measure(op, kernel, c.config, dtype, shape)
        if all(c.seconds is not None for c in kept):
            correlation = spearman([float(c.seconds or 0) for c in kept], [float(c.measured or 0) for c in kept])
        kept.sort(key=lambda c: float(c.measured or 0))
        status = "measured"
    return Result(
        op,
        kernel,
        dtype,
        size,
        shape,
        len(candidates),
        len(candidates) - len(legal),
        len(legal) - len(front),
        kept,
        status,
        correlation,
    )


def _gate_elsewhere(
    op: str, kernel: Kernel, dtype: str, size: int, target: Target, candidates: list[TrialConfig]
) -> None:
    """Hold legal candidates against the other shapes that ``kernels check`` compiles in the same size range (other head
    counts).
    """
    sizes = ranges(kernel, registry.operator(op))
    at = sizes.index(size)
    above, upto = (sizes[at - 1] if at else 0), (size if at < len(sizes) - 1 else 1 << 62)
    for shape in registry.operator(op).checks:
        if kernel.key in shape and above < shape[kernel.key] <= upto:
            legal = [c for c in candidates if not c.problems]
            for candidate, other in zip(
                legal, gate(kernel, dtype, shape, target, [c.config for c in legal]), strict=True
            ):
                candidate.problems = other.problems


def spearman(a: list[float], b: list[float]) -> float | None:
    """Rank correlation of two lists (ties share their mean rank); None when either is constant or shorter than 3."""

    def ranks(values: list[float]) -> list[float]:
        order = sorted(values)
        return [order.index(v) + (order.count(v) - 1) / 2 for v in values]

    if len(a) < 3:
        return None
    x, y = ranks(a), ranks(b)
    mx, my = sum(x) / len(x), sum(y) / len(y)
    sxx, syy = sum((v - mx) ** 2 for v in x), sum((v - my) ** 2 for v in y)
    if sxx == 0 or syy == 0:
        return None
    return sum((p - mx) * (q - my) for p, q in zip(x, y, strict=True)) / (sxx * syy) ** 0.5


def tune(
    operators: Iterable[str],
    target: Target,
    sku: Sku | None,
    dtypes: Iterable[str] = ("bf16",),
    keep: int = 8,
    measure: Callable[[str, Kernel, Config, str, Shape], float] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Result]:
    """Tune every kernel of the operators over the size buckets. A kernel with no legal configuration is said and left
    to the fallback.
    """
    results = []
    for op in operators:
        for kernel in registry.operator(op).kernels:
            for dtype in dtypes:
                for size in ranges(kernel, registry.operator(op)):
                    try:
                        result = tune_kernel(op, kernel, dtype, size, target, sku, keep, measure)
                    except LookupError as error:
                        say(str(error))
                        continue
                    results.append(result)
                    say(
                        f"{kernel.name} {dtype} {kernel.key}<={size}: {result.considered} configurations, "
                        f"{result.illegal} illegal, "
                        f"{result.dominated} dominated, {result.kept[0].config} {result.status}"
                    )
    return results


def entries(results: Iterable[Result], measured_note: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """Configuration-file entries of the best candidates; equal neighbouring size ranges are merged by the loader's
    first match.
    """
    out: list[dict[str, Any]] = []
    for r in results:
        best, sizes = r.kept[0], ranges(r.kernel, registry.operator(r.op))
        assert best.use
        match: dict[str, Any] = {"dtype": HALF if r.dtype in HALF else [r.dtype]}
        if len(sizes) > 1:
            at = sizes.index(r.size)
            bounds = {"gt": sizes[at - 1]} if at else {}
            match[r.kernel.key] = bounds | ({"le": r.size} if at < len(sizes) - 1 else {})
        out.append(
            {
                "kernel": r.kernel.name,
                "match": match,
                "config": best.config,
                "status": r.status,
                "kernel_sha256": r.kernel.digest,
                "static": {
                    "shape": r.shape,
                    "registers": best.use.registers,
                    "spills": best.use.spills,
                    "shared_bytes": best.use.shared,
                    "occupancy": best.use.occupancy,
                    "load_bytes": best.use.load_bytes,
                },
                "considered": r.considered,
                "illegal": r.illegal,
                "dominated": r.dominated,
                "measured": {
                    "us": round(float(best.measured) * 1e6, 2),
                    **(measured_note or {}),
                    "rank_correlation": r.correlation,
                }
                if best.measured
                else None,
            }
        )
    return out


def merged(path: Path, body: dict[str, Any], results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The file's entries with those of the tuned kernels and dtypes replaced; an entry of another kernel or dtype is
    kept as it is.

    A file is of one Triton version and one device. Raises ``ValueError`` where it holds entries of another that would
    stay in it.
    """
    before = registry.load(path)
    if before is None:
        return results
    tuned = {(e["kernel"], d) for e in results for d in e["match"]["dtype"]}
    kept = [e for e in before["entries"] if not all((e["kernel"], d) in tuned for d in e["match"].get("dtype", [None]))]
    for key in ("arch", "sku"):
        if kept and before.get(key) != body.get(key):
            raise ValueError(f"{path} is for {before.get(key)}, not for {body.get(key)}")
    ours, theirs = body["toolchain"]["triton"], (before.get("toolchain") or {}).get("triton")
    if kept and ours != theirs:
        raise ValueError(
            f"{path} holds {len(kept)} entries recorded with Triton {theirs}; those made now are for {ours}"
        )
    return kept + results


def write(path: Path, body: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """Write a configuration file, one entry a line, so that a diff shows what changed; entries of other kernels stay
    (:func:`merged`).
    """
    results = merged(path, body, results)
    text = json.dumps({"schema": 1, **body, "entries": []}, indent=1)
    lines = ",\n".join("  " + json.dumps(e) for e in results)
    path.write_text(text.replace('"entries": []', f'"entries": [\n{lines}\n ]') + "\n", encoding="utf-8")
    registry.load(path)


def describe(target: Target, sku: Sku | None) -> dict[str, Any]:
    """The head of a configuration file."""
    import torch
    import triton

    body: dict[str, Any] = {
        "arch": target.name,
        "toolchain": {"triton": triton.__version__.split("+")[0], "torch": torch.__version__.split("+")[0]},
    }
    if sku:
        body["sku"] = {
            "name": sku.name,
            "units": sku.units,
            "xcd": sku.xcd,
            "wave": target.wave,
            "hbm_TBps": sku.bandwidth / 1e12,
            "recalled": list(sku.recalled),
        }
        if sku.memory_gb:  # not a shipped device: with these figures the file is found again on the device itself
            body["sku"] |= {"bf16_TFLOPs": sku.peak_bf16 / 1e12, "memory_GB": sku.memory_gb}
    return body


def defaults(
    wave: int, dtypes: Iterable[str] = ("bf16", "fp32"), say: Callable[[str], None] = lambda text: None
) -> list[dict[str, Any]]:
    """Entries that are legal on every target of one wavefront width: the fallback when a SKU's or architecture's file
    cannot be used.

    The first configuration of the space that passes both gates everywhere wins, moderate sizes first. They are rules
    checked by the compiler, not choices for a device, hence status ``default`` and no toolchain.
    """
    twins = ("sm_103", "gfx1251")  # compile like sm_100 and gfx1250; `kernels check` covers them
    targets = [
        t for t in hardware.TARGETS.values() if t.wave == wave and t.name not in twins and compiler.supported(t.name)
    ]
    out: list[dict[str, Any]] = []
    seen: set[str] = set()
    for op in registry.OPERATORS:
        for kernel in registry.operator(op).kernels:
            if kernel.name in seen:
                continue
            seen.add(kernel.name)
            for dtype in dtypes:
                sizes = ranges(kernel, registry.operator(op))
                for at, size in enumerate(sizes):
                    sized = [size, 5120] if size == 8192 else [size]
                    shapes = [typical(kernel, registry.operator(op), s) for s in sized]
                    config = _first_legal(kernel, dtype, shapes, targets)
                    match: dict[str, Any] = {"dtype": HALF if dtype in HALF else [dtype]}
                    if len(sizes) > 1:
                        bounds = {"gt": sizes[at - 1]} if at else {}
                        match[kernel.key] = bounds | ({"le": size} if at < len(sizes) - 1 else {})
                    out.append({"kernel": kernel.name, "match": match, "config": config, "status": "default"})
                    say(f"wave{wave} {kernel.name} {dtype} {size}: {config}")
    return out


def _first_legal(kernel: Kernel, dtype: str, shapes: list[dict[str, int]], targets: list[Target]) -> Config:
    for config in moderate(targets[0], kernel, dtype, shapes[0]):
        if all(not gate(kernel, dtype, s, t, [config])[0].problems for s in shapes for t in targets):
            return config
    raise LookupError(
        f"{kernel.name} {dtype} {shapes[0]}: no configuration is legal on {', '.join(t.name for t in targets)}"
    )
