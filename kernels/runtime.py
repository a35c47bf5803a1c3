"""Where the operators run: device and SKU of a tensor, Triton or torch, launch parameters, and the few helpers all
operators share.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from functools import lru_cache
from typing import Any

import torch

from aifactory_train.kernels import hardware, registry
from aifactory_train.kernels.spec import COMPILER_OPTIONS, Config

log = logging.getLogger(__name__)

HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
IGNORE = -100

# (arch, sku) whose configurations the interpreter uses; None: CPU tensors take the torch path.
_interpreted: tuple[str, str | None] | None = None
# (arch, sku) that meta tensors are taken to lie on; None: they take the torch path.
_pretended: tuple[str, str | None] | None = None


@contextlib.contextmanager
def pretend(arch: str, sku: str | None = None):
    """Take meta tensors for those of a device: operators prepare their launches for it. Whoever does so must catch the
    launches (the step audit does), as there is nothing to run them.
    """
    global _pretended
    before, _pretended = _pretended, (arch, sku)
    try:
        yield
    finally:
        _pretended = before


@contextlib.contextmanager
def interpret(arch: str = "sm_90", sku: str | None = "H100-80"):
    """Run the Triton kernels on CPU tensors through Triton's interpreter, with the configuration of ``arch`` and
    ``sku``.

    The process must have been started with ``TRITON_INTERPRET=1``, because Triton reads that when a kernel is defined.
    """
    global _interpreted
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before Triton is imported to run kernels on a CPU")
    before, _interpreted = _interpreted, (arch, sku)
    try:
        yield
    finally:
        _interpreted = before


def custom_op(name: str, schema: str, changes: tuple[str, ...] = ()):
    """Registers a function as ``torch.ops.aifactory.NAME``; ``changes`` are the arguments that it writes to."""
    return torch.library.custom_op(f"aifactory::{name}", mutates_args=changes, schema=schema)


@lru_cache(None)
def device_of(index: int) -> tuple[str, str | None, int]:
    """(architecture, SKU name or None, SM/CU count) of a GPU of this process."""
    p = torch.cuda.get_device_properties(index)
    arch = p.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{p.major}{p.minor}"
    found = hardware.identify(arch, p.multi_processor_count, p.total_memory, p.name)
    if found is None:
        registry.learn()
        found = hardware.identify(arch, p.multi_processor_count, p.total_memory, p.name)
    if found is None:
        log.warning("%s (%s, %d units, %.0f GB) is no known SKU: the configuration of its architecture is used",
                    p.name, arch, p.multi_processor_count, p.total_memory / 1e9)  # fmt: skip
    return arch, found.name if found else None, p.multi_processor_count


def where(x: torch.Tensor) -> tuple[str, str | None, int]:
    """(architecture, SKU name or None, units) of the device a tensor lives on; ``cpu`` for a CPU outside the
    interpreter, ``meta`` outside :func:`pretend`.
    """
    if x.device.type == "cuda":
        return device_of(x.device.index if x.device.index is not None else torch.cuda.current_device())
    found_for = {"cpu": _interpreted, "meta": _pretended}.get(x.device.type)
    if found_for:
        arch, sku = found_for
        found = hardware.sku(sku, arch)
        return arch, sku, found.units if found else 128
    return x.device.type, None, 1


# Why Triton cannot run on this process's GPU, empty where it can; None: not tried yet. No cache of a function: compiled
# code reads it.
_trouble: str | None = None


def trouble(device: torch.device) -> str:
    """Why Triton cannot run on ``device``, a GPU: in one line, empty where it can. Tried once in a process."""
    global _trouble
    if _trouble is None:
        try:
            from aifactory_train.kernels import trial

            trial.run(device)
            _trouble = ""
        except Exception as error:  # whatever the image lacks: the torch path needs none of it
            text = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
            _trouble = f"{text} (it takes a C compiler and Python.h: gcc and python3-dev, or python3-devel)"
    return _trouble


def use_triton(op: str, x: torch.Tensor) -> bool:
    """Whether ``op`` runs as Triton kernels for this tensor; the reason for torch is logged once."""
    if x.device.type == "cpu" and _interpreted is None:
        return False
    if HAS_TRITON and x.device.type == "cuda" and torch.cuda.is_available() and not torch.compiler.is_compiling():
        trouble(x.device)
    if _trouble and x.device.type == "cuda":
        say_once(f"{op}: Triton cannot run here, torch path taken: {_trouble}")
        return False
    if x.dtype not in DTYPES:
        say_once(f"{op}: {x.dtype} takes the torch path (kernels exist for bf16, fp16, fp32)")
        return False
    if not HAS_TRITON:
        say_once(f"{op}: Triton is not installed, torch path taken")
        return False
    arch = where(x)[0]
    if arch not in hardware.TARGETS:
        say_once(f"{op}: the kernels are proven for {', '.join(hardware.TARGETS)}, not for {arch}: torch path taken")
        return False
    return True


@lru_cache(None)
def say_once(text: str) -> None:
    log.warning(text)


def launch(op: str, x: torch.Tensor, **shape: int) -> dict[str, Config]:
    """Launch parameters of each kernel of ``op`` for the device and dtype of ``x``."""
    arch, sku, _ = where(x)
    chosen = _launch(op, arch, sku, DTYPES[x.dtype], tuple(shape.items()))
    return chosen | _forced if _forced else chosen


# kernel -> configuration that tuning tries out instead of the recorded one
_forced: dict[str, Config] = {}


@contextlib.contextmanager
def force(kernel: str, config: Config):
    """Launch one kernel with a given configuration inside the block: how candidates are timed."""
    _forced[kernel] = config
    try:
        yield
    finally:
        del _forced[kernel]


@lru_cache(4096)
def _launch(op: str, arch: str, sku: str | None, dtype: str, shape: tuple[tuple[str, int], ...]) -> dict[str, Config]:
    return registry.select(op, arch, sku, dtype, dict(shape)).config


def units(x: torch.Tensor) -> int:
    return where(x)[2]


def compiler_options(config: Config) -> dict[str, Any]:
    """The part of a configuration that the Triton compiler reads."""
    return {k: config[k] for k in COMPILER_OPTIONS if k in config}


def arithmetic(x: torch.Tensor) -> torch.dtype:
    """The dtype to compute in: autocast's where it is on for the tensor's device, else the tensor's own."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def rows2d(x: torch.Tensor) -> torch.Tensor:
    """``[..., H]`` as ``[N, H]`` with unit column stride: a view where strides allow it, otherwise one copy."""
    flat = x.reshape(-1, x.shape[-1])
    if flat.stride(-1) != 1 and flat.shape[-1] > 1:
        flat = flat.contiguous()
    return flat


def wide(x: torch.Tensor) -> torch.Tensor:
    """At least fp32: half types are widened, fp32 and fp64 stay."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
