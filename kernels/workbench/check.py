"""Compiles operators for targets and says what would ship: one row for each kernel, target, dtype and shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from aifactory_train.kernels import hardware, registry
from aifactory_train.kernels.spec import ITEMSIZE, Kernel, Operator, Shape
from aifactory_train.kernels.workbench import compile as compiler

DTYPES = ("bf16", "fp32")

#: what a pull request compiles: both wave widths and both vendors, the widest and the commonest shape, default
#: configurations included
SUBSET_TARGETS = ("gfx90a", "gfx942", "sm_90")


def is_aligned(kernel: Kernel, dtype: str, shape: Shape) -> bool:
    """Whether every stride is a multiple of 16 bytes, so that 16-byte loads are possible (weights and partial sums
    included).
    """
    strides = [
        v for k, v in kernel.arguments(dtype, shape).items() if isinstance(v, int) and k.startswith("s") and k != "seed"
    ]
    width = kernel.arguments(dtype, shape).get("n_cols")
    sizes = [s for s in strides if s > 1] + ([width] if isinstance(width, int) else [])
    return all(s * ITEMSIZE[dtype] % 16 == 0 for s in sizes) and shape.get("rank", 16) % 16 == 0


def subset(operator: Operator, shapes: Iterable[Shape]) -> list[Shape]:
    """The commonest and the widest shape of an operator."""
    shapes = list(shapes)
    usual = next((s for s in shapes if s.get(operator.kernels[0].key) == 4096), shapes[min(1, len(shapes) - 1)])
    return [usual, shapes[-1]] if len(shapes) > 1 else shapes


def rows(
    operators: Iterable[str],
    targets: Iterable[tuple[str, str | None]],
    dtypes: Iterable[str] = DTYPES,
    quick: bool = False,
    shapes: Iterable[Shape] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield one row a kernel, (target, SKU), dtype and shape. ``status`` is ``ok``, the findings, or why it could not
    be compiled.
    """
    for target, sku in targets:
        for name in operators:
            operator = registry.operator(name)
            for dtype in dtypes:
                for shape in shapes or (subset(operator, operator.checks) if quick else operator.checks):
                    if not operator.covers(dtype, shape):
                        continue
                    selection = registry.select(name, target, sku, dtype, shape)
                    for kernel in operator.kernels:
                        yield one(operator, kernel, selection, target, dtype, shape)


def write_assembly(row: dict[str, Any], folder: Path) -> list[Path]:
    """The machine code of a row of :func:`rows`, one file a form (``amdgcn``; ``ptx`` and ``sass``), named after the
    row.
    """
    operator = registry.operator(row["op"])
    kernel = next(k for k in operator.kernels if k.name == row["kernel"])
    sizes = "-".join(f"{key}{value}" for key, value in row["shape"].items())
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for suffix, text in compiler.assembly(kernel, row["config"], row["dtype"], row["shape"], row["target"]).items():
        written.append(folder / f"{row['kernel']}.{row['target']}.{row['dtype']}.{sizes}.{suffix}")
        written[-1].write_text(text, encoding="utf-8")
    return written


def one(operator: Operator, kernel: Kernel, selection, target: str, dtype: str, shape: Shape) -> dict[str, Any]:
    """The row of one kernel in its selected configuration."""
    config, source = selection.config[kernel.name], selection.provenance[kernel.name]
    row = {
        "op": operator.name,
        "target": target,
        "dtype": dtype,
        "shape": dict(shape),
        "registers": None,
        "spills": None,
        "shared_bytes": None,
        "occupancy": None,
        "limiter": None,
        "load_bytes": None,
        "status": "ok",
        "kernel": kernel.name,
        "direction": kernel.direction,
        "config": config,
        "config_status": source.status,
        "config_level": source.level,
        "notes": list(source.notes),
        "matrix": None,
        "atomics": None,
        "int32_hazards": None,
    }
    try:
        use = compiler.compile_kernel(kernel, config, dtype, shape, target)
    except compiler.Unsupported as error:
        return row | {"status": f"unsupported: {error}"}
    except RuntimeError as error:
        return row | {"status": f"failed: {str(error).splitlines()[0]}"}
    chip = hardware.TARGETS[target]
    aligned = is_aligned(kernel, dtype, shape)
    problems = compiler.findings(use, chip, kernel.matrix and dtype != "fp32", aligned, kernel.thin)
    return row | {
        "registers": use.registers,
        "spills": use.spills,
        "shared_bytes": use.shared,
        "occupancy": use.occupancy,
        "limiter": hardware.limiter(chip, use.registers, use.shared, use.warps),
        "load_bytes": use.load_bytes,
        "status": "; ".join(problems) or "ok",
        "matrix": sum(use.matrix.values()),
        "atomics": sum(use.atomics.values()),
        "int32_hazards": len(use.hazards),
    }
