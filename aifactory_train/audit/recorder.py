"""Books every operator and every Triton launch of what runs inside it, and the memory that lives meanwhile.

On meta tensors nothing is computed: operators of torch make their outputs' shapes, our own operators run their launch
code (not their stand-in for tracing), and a launch ends where it would reach the device. On real tensors everything is
computed as usual and booked all the same, which is how tests hold one against the other.

What is counted, for everybody alike:

* a launch: an operator that is no view and makes more than an empty tensor; lists of tensors as many as torch's
  multi-tensor kernels need. A matrix product is one launch.
* bytes: each tensor that an operator takes is read once and each that it makes is written once. Expanded dimensions
  count once; a lookup reads the rows that it returns; ``beta=0`` reads nothing. Triton kernels by :mod:`traffic`.
* FLOPs: matrix products (torch's own formulas), products inside Triton kernels, and packed attention: per document, and
  half of the square because it is causal.
* what the host would wait for (``item``, ``tolist``, ``equal``, ``nonzero``): answered from ``answers``, and counted.
  Where it asks for the bounds of the experts' rows, the load is even.
* nothing of what the host computes by itself while a step runs on meta tensors (the boundaries of documents).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from aifactory_train.audit import traffic

#: What memory is for. ``activations`` are what the forward pass made and what backward still needs of it;
#: ``transient`` is made in backward and in the update.
COMPONENTS = ("weights", "gradients", "optimizer", "inputs", "activations", "transient")

#: No kernel: they allocate, or name memory that is there.
FREE = {
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "alias", "lift_fresh",
    "_unsafe_view", "_reshape_alias", "resize_", "set_", "is_same_size", "sym_size", "sym_stride", "sym_numel",
    "promote_types", "_record_function_enter_new", "_record_function_exit", "_has_compatible_shallow_copy_type",
}  # fmt: skip
#: Written without being read.
OVERWRITES = {"copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "normal_", "uniform_"}
#: They read as much of their first tensor as they return.
LOOKUPS = {"embedding", "index_select", "gather", "index", "take"}
#: They write as much of their first tensor as their last one holds.
PLACES = {"index_copy_", "index_put_", "scatter_", "scatter_add_", "index_add_"}
PACKED_FORWARD = {"torch_attn::_varlen_attn", "flash_attn::_flash_attn_varlen_forward"}
PACKED_BACKWARD = {"torch_attn::_varlen_attn_backward", "flash_attn::_flash_attn_varlen_backward"}

#: torch's multi_tensor_apply: elements of a chunk, blocks of a launch, tensors of a launch by the number of lists.
CHUNK, BLOCKS, TENSORS = 65536, 320, {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}


@dataclass
class Booked:
    """One row of the account."""

    launches: int = 0
    read: int = 0
    written: int = 0
    flops: int = 0

    @property
    def bytes(self) -> int:
        return self.read + self.written

    def add(self, other: Booked, times: int = 1) -> None:
        self.launches += other.launches * times
        self.read += other.read * times
        self.written += other.written * times
        self.flops += other.flops * times


@dataclass
class HostAnswers:
    """What the host is told where it would wait for the device, and the documents of the batch. ``routed``: the rows
    that all experts of a layer get, tokens times the experts that each is sent to."""

    targets: int
    lengths: list[int] = field(default_factory=list)
    truth: bool = False
    routed: int = 0


class Holdings:
    """The storages that live, by what they are for, and the largest sum of them that there was."""

    def __init__(self) -> None:
        self.bytes: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self._total = self._largest = 0
        self._known: dict[int, tuple[weakref.ref, int, str]] = {}

    def see(self, tensor: torch.Tensor, component: str, move: bool = False) -> None:
        """Count the storage of ``tensor``, if it is new, as ``component``; ``move`` counts a known one anew."""
        for local in _locals(tensor):
            storage = local.untyped_storage()
            key = id(storage)
            known = self._known.get(key)
            if known is not None and known[0]() is storage:
                if move and known[2] != component:
                    self.bytes[known[2]] -= known[1]
                    self.bytes[component] += known[1]
                    self._known[key] = (known[0], known[1], component)
                continue
            size = storage.nbytes()
            self._known[key] = (weakref.ref(storage, functools.partial(self._gone, key)), size, component)
            self.bytes[component] += size
            self._total += size
            if self._total > self._largest:
                self._largest = self._total
                self.peak = {name: self.bytes[name] for name in COMPONENTS}

    def _gone(self, key: int, _: object = None) -> None:
        _, size, component = self._known.pop(key)
        self.bytes[component] -= size
        self._total -= size

    @property
    def total(self) -> int:
        """Bytes that live now."""
        return self._total

    def forget_peak(self) -> None:
        """The peak begins anew with what lives now."""
        self._largest = self._total
        self.peak = {name: self.bytes[name] for name in COMPONENTS}


class StepRecorder(TorchDispatchMode):
    """See the module. ``phase`` is what the rows of :attr:`rows` are kept under; set it while recording."""

    def __init__(self, answers: HostAnswers):
        super().__init__()
        self.answers = answers
        self.phase = "forward"
        self.rows: dict[tuple[str, str], Booked] = {}
        self.collectives: dict[tuple[str, str], Booked] = {}
        self.syncs: Counter[str] = Counter()
        self.holdings = Holdings()
        #: the step runs on meta tensors: what has none is the host's own
        self.meta = False
        self._patches = contextlib.ExitStack()

    # ---- where operators and launches arrive

    def __enter__(self):
        self._patches.enter_context(_launches_to(self._launched))
        self._patches.enter_context(_lists_from(self._told))
        return super().__enter__()

    def __exit__(self, *error):
        self._patches.close()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(hasattr(kind, "to_local") for kind in types):
            return NotImplemented  # a sharded tensor takes the operator apart: its local ones arrive here
        kwargs = kwargs or {}
        if self.meta and _on_the_host(args, kwargs):
            return function(*args, **kwargs)
        name = function.name()
        short = name.partition("::")[2]
        if name.startswith("aifactory::") and _definition(name) is not None:
            # below autograd, as the dispatcher runs it; what it calls arrives here again
            with _again(self), torch._C._AutoDispatchBelowAutograd():
                return _definition(name)._init_fn(*_filled(function, args, kwargs))
        waited = self._waited(short.partition(".")[0], args)
        if waited is not _GO_ON:
            return waited
        if function not in _WHOLE:  # a composition of others: they arrive here one by one
            parts = NotImplemented
            if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU"):  # devices have a kernel of it
                with _again(self):
                    parts = function.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
            _WHOLE.add(function)
        out = self._attended(name, args) or function(*args, **kwargs)
        self._see(out)
        if name.startswith(("c10d::", "_c10d_functional::")):
            largest = max(map(_size, args), default=0)  # what is gathered, or what is reduced
            self.collectives.setdefault((self.phase, name), Booked()).add(Booked(1, largest))
            return out
        row = self._booked(function, name, short.partition(".")[0], args, kwargs, out)
        if row is not None:
            self.rows.setdefault((self.phase, name), Booked()).add(row)
        return out

    def _launched(self, kernel: Any, arguments: dict[str, Any]) -> None:
        name = kernel.__name__
        read, written = traffic.moved(name, arguments)
        row = Booked(1, read, written, traffic.products(name, arguments))
        self.rows.setdefault((self.phase, name), Booked()).add(row)

    # ---- memory

    def _see(self, out: Any) -> None:
        component = "activations" if self.phase.startswith("forward") else "transient"
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.holdings.see(tensor, component)

    # ---- what the host waits for

    def _waited(self, short: str, args: tuple) -> Any:
        meta = bool(args) and isinstance(args[0], torch.Tensor) and args[0].device.type == "meta"
        if short not in ("_local_scalar_dense", "equal", "nonzero"):
            return _GO_ON
        self.syncs[short] += 1
        if not meta:
            return _GO_ON
        if short == "nonzero":
            return args[0].new_empty((len(self.answers.lengths), args[0].dim()), dtype=torch.int64)
        if short == "equal" or args[0].dtype == torch.bool:
            return self.answers.truth
        return self.answers.targets if not args[0].is_floating_point() else 1.0

    def _told(self, tensor: torch.Tensor) -> list[int] | None:
        """The bounds [E + 1] of the rows of each expert under an even load; None: not asked of a meta tensor."""
        if tensor.device.type != "meta":
            return None
        if tensor.dtype != torch.int32 or tensor.dim() != 1 or not self.answers.routed:
            raise NotImplementedError(
                f"a step on meta tensors has no answer to tolist() of {tensor.dtype} {tuple(tensor.shape)}"
            )
        self.syncs["tolist"] += 1
        experts = len(tensor) - 1
        return [self.answers.routed * e // experts for e in range(experts + 1)]

    # ---- packed attention, one formula for all

    def _attended(self, name: str, args: tuple) -> Any:
        if args and isinstance(args[0], torch.Tensor) and args[0].device.type == "meta":
            if name in PACKED_FORWARD:
                q = args[0]
                lse = q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)
                return q.new_empty(q.shape), lse, q.new_empty(2, dtype=torch.int64)
            if name in PACKED_BACKWARD:
                return tuple(t.new_empty(t.shape) for t in args[1:4])
        return None

    def _packed(self, args: tuple, out: Any, backward: bool) -> Booked:
        """Queries, keys, values, result and log-sum-exp; backward also the gradients. Two products over half of each
        document's square in forward, five in backward."""
        query = args[1] if backward else args[0]
        pairs = sum(n * n for n in self.answers.lengths or [query.shape[0]]) // 2
        flops = (5 if backward else 2) * 2 * pairs * query.shape[1] * query.shape[2]
        read = sum(map(_size, args[:6] if backward else args[:3]))
        return Booked(1, read, sum(map(_size, out[:3] if backward else out[:2])), flops)

    # ---- everything else

    def _booked(self, function, name: str, short: str, args: tuple, kwargs: dict, out: Any) -> Booked | None:
        if name in PACKED_FORWARD or name in PACKED_BACKWARD:
            return self._packed(args, out, name in PACKED_BACKWARD)
        if short in FREE or function.is_view or _only_views(function, args, kwargs, out):
            return None
        read, written = _traffic(function, short, args, kwargs, out)
        return Booked(_kernels(short, args), read, written, _products(short, args, out))


_GO_ON = object()
#: operators that are no composition of others
_WHOLE: set[Any] = set()


# ---- sizes


def _locals(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor.to_local()] if hasattr(tensor, "to_local") else [tensor]


def _size(value: Any) -> int:
    """Bytes of the distinct elements of a tensor, or of the tensors in a list: an expanded dimension is one."""
    if isinstance(value, torch.Tensor):
        count = math.prod(n for n, stride in zip(value.shape, value.stride(), strict=True) if stride or n == 0)
        return count * value.element_size()
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0


def _traffic(function, short: str, args: tuple, kwargs: dict, out: Any) -> tuple[int, int]:
    """(bytes read, bytes written) by one operator of torch."""
    schema = function._schema
    named = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
    read = written = 0
    for argument in schema.arguments:
        value = named.get(argument.name)
        size = _size(value)
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if changed and short.startswith("_fused_adam") and argument.name == "grads":
            changed = False  # written only where a loss was scaled
        if changed:
            written += size
        if not (changed and (argument.is_out or short in OVERWRITES)):
            read += size
    if not any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
        written = _size(out)
    if named.get("beta", 1) == 0:
        read -= _size(named.get("self"))
    if short in LOOKUPS:
        read += _size(out) - _size(args[0])
    if short in PLACES:
        source = _size(named.get("source", named.get("src", named.get("values"))))
        read, written = read - _size(args[0]) + (source if "add" in short else 0), source
    return read, written


def _products(short: str, args: tuple, out: Any) -> int:
    """FLOPs of a matrix product or a convolution: torch's formulas, and two of its own that know groups."""
    factors = [a for a in args if isinstance(a, torch.Tensor)]
    if short == "convolution":
        return 2 * out.numel() * factors[1][0].numel()
    if short == "convolution_backward":  # the gradient of the input, and that of the weight
        return 2 * factors[0].numel() * factors[2][0].numel() * sum(args[-1][:2])
    if short == "_grouped_mm":  # two stacks of matrices, or rows by their stack, or sums over rows
        return 2 * factors[0].numel() * factors[1].shape[-1]
    packet = getattr(torch.ops.aten, short.removesuffix("_"), None)  # in place it is the same product
    return flop_registry[packet](*factors, out_val=out) if packet in flop_registry else 0


def _only_views(function, args: tuple, kwargs: dict, out: Any) -> bool:
    """Whether everything returned lies in memory that was given, and nothing was written (``reshape``, ``to``)."""
    if function._schema.is_mutable:
        return False
    made = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
    given = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
    return bool(made) and all(id(t.untyped_storage()) in given for t in made)


def _kernels(short: str, args: tuple) -> int:
    """Launches of one operator."""
    lists = [a for a in args if isinstance(a, list | tuple) and a and isinstance(a[0], torch.Tensor)]
    if not (short.startswith(("_foreach", "_fused_adam")) and lists):
        return 1
    depth = len([part for part in lists if len(part) == len(lists[0])])
    if short.startswith("_fused_adam"):
        depth -= 1  # the counts of steps are no list of the kernel
    if not short.endswith("_"):
        depth += 1  # the results
    launches, blocks, tensors = 1, 0, 0
    for tensor in lists[0]:
        tensors += 1
        for _ in range(max(1, -(-tensor.numel() // CHUNK))):
            if blocks == BLOCKS or tensors > TENSORS[max(1, min(5, depth))]:
                launches, blocks, tensors = launches + 1, 0, 1
            blocks += 1
    return launches + (1 if short == "_foreach_norm" else 0)  # the partial norms are added in a kernel of their own


# ---- how they are caught


def _on_the_host(args: tuple, kwargs: dict) -> bool:
    """Whether an operator neither takes a meta tensor nor makes one."""
    if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "meta":
        return False
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    return bool(tensors) and all(t.device.type == "cpu" for t in tensors)


def _definition(name: str) -> Any:
    from torch._library.custom_ops import OPDEFS

    return OPDEFS.get(name)


def _filled(function, args: tuple, kwargs: dict) -> list[Any]:
    """All arguments by position: the dispatcher leaves out those that have their default value."""
    arguments = function._schema.arguments
    given = list(args) + [kwargs.get(a.name, a.default_value) for a in arguments[len(args) :]]
    return given


@contextlib.contextmanager
def _again(mode: StepRecorder) -> Iterator[None]:
    """``mode`` on, without replacing the launcher a second time."""
    TorchDispatchMode.__enter__(mode)
    try:
        yield
    finally:
        TorchDispatchMode.__exit__(mode, None, None, None)


@contextlib.contextmanager
def _lists_from(told: Callable[[torch.Tensor], list[int] | None]) -> Iterator[None]:
    """``Tensor.tolist`` of a meta tensor is what ``told`` returns."""
    before = torch.Tensor.tolist

    def tolist(self: torch.Tensor) -> Any:
        found = told(self)
        return before(self) if found is None else found

    torch.Tensor.tolist = tolist  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.tolist = before  # type: ignore[method-assign]


@contextlib.contextmanager
def _launches_to(book: Callable[[Any, dict[str, Any]], None]) -> Iterator[None]:
    """``kernel[grid](...)`` is booked; on meta tensors that is all. Triton's interpreter is caught as the compiler
    is. Where Triton is missing nothing can be launched."""
    try:
        from triton.runtime.interpreter import InterpretedFunction
        from triton.runtime.jit import JITFunction
    except ImportError:
        yield
        return
    before = {kind: kind.run for kind in (JITFunction, InterpretedFunction)}

    def replaced(kind: type) -> Callable:
        def run(self, *args, grid, warmup, **kwargs):
            signature = inspect.signature(self.fn).parameters
            named = {n: p.default for n, p in signature.items() if p.default is not inspect.Parameter.empty}
            named |= dict(zip(signature, args, strict=False)) | {n: v for n, v in kwargs.items() if n in signature}
            book(self.fn, named)
            if any(isinstance(v, torch.Tensor) and v.device.type == "meta" for v in named.values()):
                return None
            return before[kind](self, *args, grid=grid, warmup=warmup, **kwargs)

        return run

    for kind in before:
        kind.run = replaced(kind)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for kind, run in before.items():
            kind.run = run  # type: ignore[attr-defined]
