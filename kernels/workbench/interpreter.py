"""Triton's interpreter made exact for bf16, and an instrument that records every address a kernel touches.

Up to 3.9 the interpreter truncates fp32 to bf16 and does bf16 arithmetic on raw bits. :func:`exact` replaces the
conversions by torch's round-to-nearest-even and refuses reductions of bf16, so that a kernel that forgets to upcast
fails instead of looking wrong. Both tools act on Triton's interpreter objects of this process only and need
``TRITON_INTERPRET=1`` from the start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import types

import numpy as np
import torch
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter as interp

_FLOATS = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float32: torch.float32}
_SIGNED = {16: np.int16, 32: np.int32}
_UNSIGNED = {16: (torch.int16, np.uint16), 32: (torch.int32, np.uint32)}


def _convert(data, source, target, rounding):
    """Round-to-nearest-even between the float types that torch knows; an explicit other rounding goes to the
    original.
    """
    if source not in _FLOATS or target not in _FLOATS or rounding == ir.ROUNDING_MODE.RTZ:
        return _original("convert")(data, source, target, rounding)
    raw = np.frombuffer(np.ascontiguousarray(data).tobytes(), dtype=_SIGNED[source.primitive_bitwidth]).copy()
    value = torch.from_numpy(raw).view(_FLOATS[source]).to(torch.float32).to(_FLOATS[target])
    as_torch, as_numpy = _UNSIGNED[target.primitive_bitwidth]
    return value.view(as_torch).numpy().view(as_numpy).reshape(np.shape(data))


_saved: dict[str, object] = {}


def _original(name: str):
    return _saved[name]


def _is_bf16(handle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _up(handle):
    """bf16 is held as raw uint16 bits; give numpy the fp32 value."""
    if not _is_bf16(handle):
        return handle
    return interp.TensorHandle(_convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32), tl.float32)


def _down(handle):
    if handle.data.dtype != np.float32:  # a comparison stays boolean
        return handle
    return interp.TensorHandle(_convert(handle.data, tl.float32, tl.bfloat16, None), tl.bfloat16)


@functools.lru_cache(None)
def exact() -> None:
    """Install the exact conversions (once a process)."""
    builder = interp.InterpreterBuilder
    _saved.update(
        convert=interp._convert_float, dot=builder.create_dot, binary=builder.binary_op, unary=builder.unary_op,
        cast=builder.cast_impl, check=interp.ReduceScanOpInterface.check_tensor,
    )  # fmt: skip
    interp._convert_float = _convert

    def create_dot(self, a, b, d, *rest, **kw):
        return _original("dot")(self, _up(a), _up(b), d, *rest, **kw)

    def binary_op(self, lhs, rhs, op):
        if _is_bf16(lhs) and op not in (np.bitwise_and, np.bitwise_or, np.bitwise_xor):
            return _down(_original("binary")(self, _up(lhs), _up(rhs), op))
        return _original("binary")(self, lhs, rhs, op)

    def unary_op(self, arg, op):
        return _down(_original("unary")(self, _up(arg), op)) if _is_bf16(arg) else _original("unary")(self, arg, op)

    def cast_impl(self, src, dst_type):
        if dst_type.scalar == tl.bfloat16 and not src.dtype.scalar.is_floating():
            return _down(interp.TensorHandle(src.data.astype(np.float32), tl.float32))
        return _original("cast")(self, src, dst_type)

    def check_tensor(self, inputs):
        if any(t.dtype.scalar == tl.bfloat16 for t in inputs):
            raise TypeError("reduction of bf16: the interpreter would add raw bits; convert to fp32 first")
        return _original("check")(self, inputs)

    builder.create_dot, builder.binary_op, builder.unary_op = create_dot, binary_op, unary_op
    builder.cast_impl = cast_impl
    interp.ReduceScanOpInterface.check_tensor = check_tensor


@functools.lru_cache(None)
def quick() -> None:
    """Patch Triton's language modules once a launch instead of once a device-function call, which takes half of the
    time.

    A device function's own patches are never undone by Triton either, so nothing changes but the number of repetitions.
    """
    patch = interp._patch_lang
    done: set[tuple[int, ...]] = set()

    class Nothing:
        def restore(self) -> None:
            pass

    def patch_once(fn):
        names = tuple(sorted(id(v) for v in set(map(_module, fn.__globals__.values())) if v in (tl, tl.core)))
        if names in done:
            return Nothing()
        done.add(names)
        return patch(fn)

    launch = interp.GridExecutor.__call__

    def call(self, *args, **kwargs):
        done.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            done.clear()

    interp._patch_lang = patch_once
    of_type = interp._get_np_dtype
    kinds: dict[object, object] = {}

    def np_dtype(kind):
        if isinstance(kind, tl.pointer_type) or (
            isinstance(kind, tl.block_type) and isinstance(kind.element_ty, tl.pointer_type)
        ):
            return of_type(kind)
        name = kind.scalar.name
        if name not in kinds:
            kinds[name] = of_type(kind)
        return kinds[name]

    interp._get_np_dtype = np_dtype
    if hasattr(interp.interpreter_builder.options, "sanitize_overflow"):
        # Compiled kernels do not check either; wrapped offsets are what the fake-stride tests look for.
        object.__setattr__(interp.interpreter_builder.options, "sanitize_overflow", False)
    interp.GridExecutor.__call__ = call


def _module(value):
    return value if isinstance(value, types.ModuleType) else None


@dataclasses.dataclass
class KernelLaunch:
    """Bytes of one kernel launch: ``loaded`` and ``stored`` count distinct addresses, ``requested_*`` every access of
    every program.
    """

    kernel: str
    loaded: int = 0
    stored: int = 0
    requested_loads: int = 0
    requested_stores: int = 0

    @property
    def bytes(self) -> int:
        return self.loaded + self.stored

    @property
    def requested(self) -> int:
        return self.requested_loads + self.requested_stores


class _Spans:
    """A set of byte addresses as [start, end) intervals, merged now and then so that it stays small."""

    def __init__(self) -> None:
        self.parts: list[np.ndarray] = []
        self.pending = 0
        self.requested = 0

    def add(self, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        flat = np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))[np.broadcast_to(
            mask, np.broadcast_shapes(addresses.shape, mask.shape))]  # fmt: skip
        if flat.size == 0:
            return
        flat = flat.astype(np.int64, copy=False)
        self.requested += flat.size * size
        if flat.size > 1 and np.any(flat[1:] <= flat[:-1]):
            flat = np.unique(flat)
        breaks = np.flatnonzero(np.diff(flat) != size)
        starts = flat[np.concatenate(([0], breaks + 1))]
        ends = flat[np.concatenate((breaks, [flat.size - 1]))] + size
        self.parts.append(np.stack((starts, ends)))
        self.pending += starts.size
        if self.pending > 200_000:
            self._merge()

    def _merge(self) -> np.ndarray:
        if not self.parts:
            return np.zeros((2, 0), np.int64)
        both = np.concatenate(self.parts, axis=1)
        both = both[:, np.argsort(both[0], kind="stable")]
        reach = np.maximum.accumulate(both[1])
        new = np.concatenate(([True], both[0, 1:] > reach[:-1]))
        first = np.flatnonzero(new)
        last = np.concatenate((first[1:] - 1, [both.shape[1] - 1]))
        merged = np.stack((both[0, first], reach[last]))
        self.parts, self.pending = [merged], merged.shape[1]
        return merged

    def total(self) -> int:
        merged = self._merge()
        return int((merged[1] - merged[0]).sum())

    def bounds(self) -> tuple[int, int] | None:
        merged = self._merge()
        return (int(merged[0, 0]), int(merged[1, -1])) if merged.shape[1] else None


@contextlib.contextmanager
def counting(dry: bool = False):
    """Record every launch inside the block: yields a list that fills with :class:`KernelLaunch`.

    ``dry`` touches no memory: loads give zeros and stores are dropped, so that pointers may be far outside any
    allocation (each entry then has ``spans``, the (first, last) byte addresses read and written). Nothing about values
    holds in a dry run.
    """
    builder, executor = interp.InterpreterBuilder, interp.GridExecutor
    before = (builder.create_masked_load, builder.create_masked_store, executor.__call__)
    arithmetic = (builder.binary_op, builder.unary_op, builder.cast_impl)
    launches: list[KernelLaunch] = []
    loads, stores = _Spans(), _Spans()

    def create_masked_load(self, ptrs, mask, other, *rest):
        loads.add(ptrs.data, mask.data, interp._get_np_dtype(ptrs.get_element_ty()).itemsize)
        if dry:
            kind = ptrs.get_element_ty()
            return interp.TensorHandle(np.zeros(ptrs.data.shape, interp._get_np_dtype(kind)), kind)
        return before[0](self, ptrs, mask, other, *rest)

    def create_masked_store(self, ptrs, value, mask, *rest):
        stores.add(ptrs.data, mask.data, value.data.dtype.itemsize)
        return None if dry else before[1](self, ptrs, value, mask, *rest)

    # In a dry run floating-point values mean nothing: they are not computed, only their types and shapes are.
    def binary_op(self, lhs, rhs, op):
        if not lhs.dtype.scalar.is_floating():
            return arithmetic[0](self, lhs, rhs, op)
        shape = np.broadcast_shapes(lhs.data.shape, rhs.data.shape)
        if op in (np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal):
            return interp.TensorHandle(np.zeros(shape, bool), tl.int1)
        return interp.TensorHandle(np.zeros(shape, lhs.data.dtype), lhs.dtype.scalar)

    def unary_op(self, arg, op):
        return arg if arg.dtype.scalar.is_floating() else arithmetic[1](self, arg, op)

    def cast_impl(self, src, dst_type):
        if not src.dtype.scalar.is_floating():
            return arithmetic[2](self, src, dst_type)
        kind = dst_type.scalar
        return interp.TensorHandle(np.zeros(src.data.shape, interp._get_np_dtype(kind)), kind)

    def call(self, *args, **kwargs):
        nonlocal loads, stores
        loads, stores = _Spans(), _Spans()
        before[2](self, *args, **kwargs)
        launch = KernelLaunch(self.fn.__name__, loads.total(), stores.total(), loads.requested, stores.requested)
        launch.spans = (loads.bounds(), stores.bounds())  # type: ignore[attr-defined]
        launches.append(launch)

    builder.create_masked_load, builder.create_masked_store = create_masked_load, create_masked_store
    executor.__call__ = call
    if dry:
        builder.binary_op, builder.unary_op, builder.cast_impl = binary_op, unary_op, cast_impl
    try:
        yield launches
    finally:
        builder.binary_op, builder.unary_op, builder.cast_impl = arithmetic
        builder.create_masked_load, builder.create_masked_store, executor.__call__ = before
