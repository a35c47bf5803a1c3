"""Cross-compiles Triton kernels for a GPU that need not be here, and reads registers, memory and instructions back.

Works on Triton 3.4 to 3.9 with a CPU build of torch; ptxas, cuobjdump, nvdisasm and LLVM come with the Triton wheel.
What is measured is the code, never the time: such numbers rank and exclude configurations.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import io
import os
import re
import subprocess
import tempfile
from functools import lru_cache
from typing import Any

# 3.9 warns when this is unset and 3.10 flips the default: reports must stay comparable.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

from aifactory_train.kernels.hardware import TARGETS, Target, occupancy
from aifactory_train.kernels.spec import COMPILER_OPTIONS, Config, Kernel, Shape
from aifactory_train.kernels.workbench.lint import lint


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What one compiled kernel needs and contains.

    ``spills`` is vector registers (AMD) or bytes of stack (NVIDIA); ``stack`` bytes of scratch a lane; ``load_bytes``
    the width in bytes of the load instructions that carry most of the data; ``loads`` every width with its number of
    instructions.
    """

    registers: int
    spills: int
    stack: int
    shared: int
    warps: int
    loads: dict[int, int]
    load_bytes: int
    matrix: dict[str, int]
    atomics: dict[str, int]
    cas: bool
    fences: int
    hazards: tuple[str, ...]
    occupancy: int | None


class Unsupported(Exception):
    """The installed Triton cannot compile for this target at all; the message says what it said."""


def _inputs(kernel: Kernel, config: Config, dtype: str, shape: Shape, target: Target):
    """(function, signature, constexprs, hints): what the JIT would derive from the arguments of a launch.

    An integer divisible by 16 and every pointer get the divisibility hint, an integer 1 becomes a constant, and AMD
    pointers get the promise of a 2 GiB range that lets buffer instructions be used (the JIT gives it to small tensors).
    """
    fn = kernel.load()
    constants = dict(kernel.constexprs(config, dtype, shape))
    signature, hints = {}, {}
    for i, name in enumerate(fn.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        value = kernel.arguments(dtype, shape)[name]
        marks = []
        if isinstance(value, str):
            signature[name] = value
            if value.startswith("*"):
                marks.append(["tt.divisibility", 16])
                if target.backend == "hip":
                    marks.append(["tt.pointer_range", 32])
        elif value == 1:
            signature[name], constants[name] = "constexpr", 1
            continue
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                marks.append(["tt.divisibility", 16])
        if marks:
            hints[(i,)] = marks
    return fn, signature, constants, hints


def compile_kernel(kernel: Kernel, config: Config, dtype: str, shape: Shape, target: str) -> Compiled:
    """Compile one kernel in one configuration. Raises :class:`Unsupported`, or what the compiler raised."""
    chip = TARGETS[target]
    fn, signature, constants, hints = _inputs(kernel, config, dtype, shape, chip)
    options = {k: config[k] for k in COMPILER_OPTIONS if k in config}
    key = (
        kernel.function,
        kernel.matrix,
        target,
        tuple(signature.items()),
        tuple(sorted(constants.items())),
        repr(hints),
        tuple(sorted(options.items())),
    )
    if key not in _memory:
        _memory[key] = compile_function(fn, signature, constants, hints, options, target)
    return _memory[key]


_memory: dict[Any, Compiled] = {}


def assembly(kernel: Kernel, config: Config, dtype: str, shape: Shape, target: str) -> dict[str, str]:
    """What the compiler made of a kernel, by suffix: ``amdgcn``, or ``ptx`` and ``sass`` (NVIDIA's machine code,
    disassembled).
    """
    fn, signature, constants, hints = _inputs(kernel, config, dtype, shape, TARGETS[target])
    built = _build(fn, signature, constants, hints, {k: config[k] for k in COMPILER_OPTIONS if k in config}, target)
    if "amdgcn" in built.asm:
        return {"amdgcn": built.asm["amdgcn"]}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        done = subprocess.run([_tool("nvdisasm"), file.name], capture_output=True, text=True)
    return {"ptx": built.asm["ptx"], "sass": done.stdout or f"// nvdisasm: {done.stderr.strip()[:200]}\n"}


def compile_function(fn, signature, constants, hints, options, target: str) -> Compiled:
    """As :func:`compile_kernel`, for any Triton function (also another library's)."""
    return read(_build(fn, signature, constants, hints, options, target), TARGETS[target])


def _build(fn, signature, constants, hints, options, target: str):
    """What Triton compiled. Raises :class:`Unsupported`, or RuntimeError with what the compiler said."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    chip = TARGETS[target]
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=hints)
    noise = io.StringIO()
    try:
        with contextlib.redirect_stdout(noise):  # a ptxas failure prints the whole PTX
            return triton.compile(source, target=GPUTarget(chip.backend, chip.capability, chip.wave), options=options)
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        if reason := lacking(target):
            raise Unsupported(f"Triton {triton.__version__} cannot compile for {target} here: {reason}") from error
        raise RuntimeError(text[:2000]) from error


def supported(target: str) -> bool:
    """Whether the installed Triton can compile anything for the target."""
    return not lacking(target)


@lru_cache(None)
def lacking(target: str) -> str:
    """Why the installed Triton cannot compile a kernel of one store for the target (its first line), or nothing."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from aifactory_train.kernels.workbench.smallest import smallest

    chip = TARGETS[target]
    source = ASTSource(fn=smallest, signature={"X": "*fp32"}, constexprs={}, attrs={})
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            triton.compile(source, target=GPUTarget(chip.backend, chip.capability, chip.wave), options={"num_warps": 1})
    except Exception as error:
        return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return ""


def read(built, chip: Target) -> Compiled:
    """Resources and instruction counts of a compiled kernel."""
    amd = "amdgcn" in built.asm
    text = built.asm["amdgcn"] if amd else built.asm["ptx"]
    if amd:
        found = {k: _amd(text, k) for k in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size")}
        # Scalar spills go to vector lanes and are harmless while no scratch is used, so they are not counted.
        registers, spills, stack = found.values()
    else:
        registers, stack = _nvidia(built.asm["cubin"])
        spills = stack  # ptxas reports spills as stack bytes
    warps, shared = built.metadata.num_warps, built.metadata.shared  # AMD's own group_segment_fixed_size is always 0
    loads = load_widths(built, amd)
    weight = {width: width * count for width, count in loads.items()}
    atomics = _count(text, _ATOMIC)
    return Compiled(
        registers, spills, stack, shared, warps, loads, max(weight, key=lambda w: (weight[w], w), default=0),
        _count(text, _MATRIX), atomics, any("cmpswap" in a or ".cas" in a for a in atomics),
        len(re.findall(r"\b(?:buffer_wbl2|buffer_inv|global_inv|global_wb)\b", text)) if amd else 0,
        tuple(f"{value} = {' x '.join(operands)}" for value, operands in lint(built.asm["ttir"])),
        occupancy(chip, registers, shared, warps),
    )  # fmt: skip


def findings(use: Compiled, chip: Target, matrix: bool, aligned: bool, thin: bool = False) -> list[str]:
    """Reasons why a configuration must not ship; empty when it passes legality and code quality.

    ``matrix``: a matrix instruction must appear. ``aligned``: rows are multiples of 16 bytes, so loads must be 16 bytes
    wide; of a ``thin`` kernel (:class:`Kernel`) some of them.
    """
    out = []
    if use.warps * chip.wave > 1024:
        out.append("more than 1024 threads")
    if use.shared > chip.block_memory:
        out.append(f"{use.shared} bytes of shared memory, cap {chip.block_memory}")
    if use.spills or use.stack:
        out.append(f"spills ({use.spills}, {use.stack} bytes of stack)")
    widest = max(use.loads, default=0) if thin else use.load_bytes
    if aligned and widest < 16:
        out.append(f"loads of {widest} bytes")
    if matrix and not use.matrix:
        out.append("no matrix instruction")
    if use.cas:
        out.append("compare-and-swap loop")
    if use.atomics and use.fences:
        out.append("cache write-back or invalidation around an atomic")
    out.extend(f"32-bit offset {h}" for h in use.hazards)
    return out


_ATOMIC = r"\b((?:global|buffer|flat)_atomic_\w+|(?:atom|red)\.[\w.:]+)"
_MATRIX = r"\b(v_s?mfmac?_\w+|v_s?wmmac?_\w+|wgmma\.mma_async|tcgen05\.mma|mma\.sync)"
_WIDTH = {
    "128": 16,
    "64": 8,
    "U16": 2,
    "S16": 2,
    "U8": 1,
    "S8": 1,
    "dwordx4": 16,
    "dwordx3": 12,
    "dwordx2": 8,
    "dword": 4,
    "ushort": 2,
    "short": 2,
    "ubyte": 1,
    "sbyte": 1,
    "b128": 16,
    "b96": 12,
    "b64": 8,
    "b32": 4,
    "u16": 2,
    "i16": 2,
    "u8": 1,
    "i8": 1,
    "d16": 2,
}


def _count(text: str, pattern: str) -> dict[str, int]:
    return dict(collections.Counter(re.findall(pattern, text)))


def _amd(text: str, key: str) -> int:
    found = re.search(rf"\.{key}:\s+(\d+)", text)
    return int(found.group(1)) if found else 0


def _tool(name: str) -> str:
    import triton

    return os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", name)


def _nvidia(cubin: bytes) -> tuple[int, int]:
    """(registers a lane, bytes of stack a lane) of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([_tool("cuobjdump"), "--dump-resource-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if not found:
        raise RuntimeError(f"cuobjdump gave no resource usage: {done.stderr.strip()[:200]}")
    return int(found.group(1)), int(found.group(2))


def load_widths(built, amd: bool) -> dict[int, int]:
    """{bytes a lane: number of global load instructions}, asynchronous copies to shared memory included.

    NVIDIA widths come from PTX: what ptxas narrows or widens is rare, and disassembly costs more than compilation.
    """
    found: collections.Counter[int] = collections.Counter()
    if amd:
        for suffix in re.findall(r"\b(?:global|buffer)_load_(?:async_to_lds_|lds_)?([a-z0-9]+)", built.asm["amdgcn"]):
            found[_WIDTH.get(suffix, 4)] += 1
        return dict(found)
    for lanes, bits in re.findall(r"\bld\.global(?:\.\w+)*?(?:\.v(\d))?\.[bufs](\d+)", built.asm["ptx"]):
        found[int(lanes or 1) * int(bits) // 8] += 1
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x[0-9a-f]+|\d+)\s*[,;]", built.asm["ptx"]):
        found[int(size, 0)] += 1
    return dict(found)
