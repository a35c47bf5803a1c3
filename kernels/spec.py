"""What every operator says about itself in its ``space.py``: kernels, launch parameters, legal configurations, bytes.
No torch here.

Shapes are mappings of named sizes, e.g. ``{"rows": 8192, "hidden": 4096}``; dtypes are ``bf16``, ``fp16``, ``fp32``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from aifactory_train.kernels.hardware import Target

Shape = Mapping[str, int]
Config = dict[str, Any]

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}

#: configuration keys that go to the Triton compiler; every other key is the operator's own
COMPILER_OPTIONS = ("num_warps", "num_stages", "waves_per_eu", "maxnreg")

PACKAGE = "aifactory_train.kernels"


def folders() -> list[Path]:
    """The folders that hold operators: this package, and what ``AIFACTORY_KERNELS`` names (see the package's
    ``__init__``).
    """
    return [Path(p) for p in importlib.import_module(PACKAGE).__path__]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One Triton function in one use.

    ``function`` is ``module:name`` below this package. ``arguments(dtype, shape)`` maps each run-time argument to a
    Triton type (``*bf16``, ``fp32``) or to the integer of a typical launch, from which divisibility is derived as the
    JIT does. ``constexprs(config, dtype, shape)`` are the compile-time arguments, used by launch and cross-compilation
    alike. ``space(target, dtype, shape)`` yields the configurations worth compiling. ``key`` is the size that
    configurations depend on. ``matrix`` is true when a matrix instruction must appear; ``inputs`` counts the
    activation-sized tensors it loads.

    For tuning: ``ranges`` are the upper ends of the ranges of ``key`` that get configurations of their own (the last is
    open; by default those that are usual for the key), ``tile(constexprs)`` the elements of each input that a block
    loads before it waits (by default BLOCK x ROWS), ``partial(shape)`` the columns of one fp32 partial row where
    programs keep sums (by default ``key``).

    ``thin``: beside its tiles it loads single numbers a row into every lane that needs them, so that loads of 16 bytes
    must be there but need not carry most of the data.
    """

    name: str
    direction: str
    function: str
    arguments: Callable[[str, Shape], dict[str, str | int]]
    constexprs: Callable[[Config, str, Shape], dict[str, Any]]
    space: Callable[[Target, str, Shape], Iterable[Config]]
    key: str
    matrix: bool = False
    inputs: int = 1
    ranges: tuple[int, ...] = ()
    tile: Callable[[Mapping[str, Any]], int] | None = None
    partial: Callable[[Shape], int] | None = None
    thin: bool = False

    @property
    def source(self) -> Path:
        name = self.function.split(":")[0].replace(".", "/") + ".py"
        return next((folder / name for folder in folders() if (folder / name).is_file()), folders()[0] / name)

    def load(self):
        """The Triton function itself (imports triton)."""
        module, name = self.function.split(":")
        return getattr(importlib.import_module(f"{PACKAGE}.{module}"), name)

    @property
    def digest(self) -> str:
        """SHA-256 of the source file: any edit makes recorded configurations stale, which is the safe side."""
        return _digest(self.source)


@lru_cache(None)
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Operator:
    """All that is said about an operator: the sizes of its shape in order, its kernels, its traffic, and how to try it.

    ``floor(direction, dtype, shape)`` is the number of HBM bytes that cannot be avoided, in the formula of the
    documentation; ``pointwise`` marks the operators whose counted traffic must stay within 1.10 of it. ``checks`` are
    the shapes to compile for.

    ``inputs(make, shape)`` gives the positional arguments of the function ``op.NAME`` and of the oracle
    ``reference.NAME``; ``make`` is a :class:`workbench.inputs.Make`, which draws the tensors. ``options`` are keyword
    arguments of the operator alone. ``small`` are the shapes whose values are tested (by default a few that fit no
    block). ``counted`` are the directions whose bytes are counted, and ``shrink`` the sizes to use there for what the
    vendor's GEMM does. ``flops`` is floating-point operations an element, which places it on the roofline. ``eager``:
    whether ``kernels bench`` times the oracle beside it, eager and compiled; ``covers(dtype, shape)``: whether there
    are kernels for it (elsewhere the torch path is taken, and nothing is compiled); ``dry``: whether its bytes can be
    counted without loading anything, because no value decides what is touched; an optional ``rivals.py`` with
    ``rivals()`` names other implementations.
    """

    name: str
    dims: tuple[str, ...]
    kernels: tuple[Kernel, ...]
    floor: Callable[[str, str, Shape], int]
    checks: tuple[dict[str, int], ...]
    inputs: Callable[[Any, Shape], tuple[Any, ...]]
    pointwise: bool = True
    note: str = ""
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    small: tuple[dict[str, int], ...] = ()
    counted: tuple[str, ...] = ("forward", "backward")
    shrink: Mapping[str, int] = dataclasses.field(default_factory=dict)
    flops: int | None = None
    eager: bool = True
    covers: Callable[[str, Shape], bool] = lambda dtype, shape: True
    dry: bool = True

    def shape(self, shape: Mapping[str, int] | tuple[int, ...]) -> dict[str, int]:
        """A shape as named sizes; a tuple is read in the order of ``dims``."""
        if isinstance(shape, Mapping):
            missing = [d for d in self.dims if d not in shape]
            if missing:
                raise ValueError(f"shape of {self.name} needs {', '.join(self.dims)}; missing: {', '.join(missing)}")
            return {d: int(shape[d]) for d in self.dims}
        if len(shape) != len(self.dims):
            raise ValueError(f"shape of {self.name} is ({', '.join(self.dims)}), got {tuple(shape)}")
        return dict(zip(self.dims, map(int, shape), strict=True))


def next_pow2(n: int) -> int:
    """Smallest power of two that is at least n (1 for n <= 1)."""
    return 1 << max(0, int(n) - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def split_row(config: Config, width: int) -> tuple[int, int]:
    """(BLOCK, CHUNKS) for a row of ``width`` columns under ``config["block"]``."""
    block = min(next_pow2(width), int(config["block"]))
    return block, cdiv(width, block)


def grid_stride(config: Config, rows: int, units: int) -> int:
    """Programs of a kernel that keeps a partial sum: units x ``grid_mult``, but never fewer than ``rows_each`` rows a
    program.

    Each program writes and rereads one fp32 row (8 bytes a column) against 6 bytes a column and row of useful traffic,
    so 16 rows a program keep the overhead at 8 %.
    """
    blocks = cdiv(rows, int(config.get("rows", 1)))
    most = rows // int(config["rows_each"])
    return max(1, min(units * int(config["grid_mult"]), most, blocks))


def row_space(target: Target, dtype: str, width: int, backward: bool) -> Iterable[Config]:
    """Row-kernel configurations: warps whose lanes can each load 16 bytes, whole rows or column chunks, one or two
    stages.
    """
    item = ITEMSIZE[dtype]
    whole = next_pow2(width)
    most = 1024 // target.wave
    if whole <= 1024:  # many short rows: several rows to a program, so that no wave is idle
        for rows, warps in itertools.product((1, 4, 8, 16, 32), (1, 2, 4)):
            lanes = warps * target.wave
            if lanes * 16 <= rows * whole * item and rows * whole // lanes <= 32:
                yield {"block": whole, "rows": rows, "num_warps": warps, "num_stages": 1} | (
                    {"stages": 1, "grid_mult": 4, "rows_each": 16} if backward else {}
                )
        return
    for block in sorted({min(whole, 4096), min(whole, 8192), min(whole, 16384)}):
        if cdiv(width, block) > 4:
            continue  # every further chunk rereads the row
        for warps in (2, 4, 8, 16, 32):
            lanes = warps * target.wave
            if warps > most or lanes * 16 > block * item or block // lanes > 32:
                continue
            if not backward:
                yield {"block": block, "rows": 1, "num_warps": warps, "num_stages": 1}
                continue
            for stages, mult in itertools.product((1, 2) if block >= width else (1,), (1, 2, 4)):
                yield {"block": block, "rows": 1, "num_warps": warps, "num_stages": 1,
                       "stages": stages, "grid_mult": mult, "rows_each": 16}  # fmt: skip


def tile_space(target: Target, dtype: str, width: int) -> Iterable[Config]:
    """Configurations of kernels that walk columns in tiles and keep nothing but the tile."""
    for block, warps in itertools.product((1024, 2048, 4096), (1, 2, 4, 8)):
        lanes = warps * target.wave
        if lanes <= 1024 and lanes * 16 <= block * ITEMSIZE[dtype] and block // lanes <= 16:
            yield {"block": block, "num_warps": warps, "num_stages": 1}


def moderate(target: Target, kernel: Kernel, dtype: str, shape: Shape) -> list[Config]:
    """A kernel's configurations in the order in which to try them where nothing is recorded: moderate sizes first, no
    pipelining.
    """
    wanted = 8 if target.wave == 32 else 4
    configs = list(kernel.space(target, dtype, shape))
    plain = [c for c in configs if c.get("stages", 1) == 1 and c.get("grid_mult", 2) in (2, 4)]
    return sorted(
        plain or configs, key=lambda c: (abs(c["num_warps"] - wanted), c.get("block", 0) > 8192, -c.get("rows", 1))
    )


def by_rule(target: Target, kernel: Kernel, dtype: str, shape: Shape) -> Config | None:
    """The first moderate configuration. A size that has none of its own takes that of the nearest size that has one;
    None: no size has.
    """
    size = shape[kernel.key]
    larger, smaller = [size << i for i in range(1, 24)], [size >> i for i in range(1, size.bit_length())]
    for near in (size, *larger[:12], *smaller, *larger[12:]):
        found = moderate(target, kernel, dtype, {**shape, kernel.key: near})
        if found:
            return found[0]
    return None
