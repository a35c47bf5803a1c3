"""What a step looks like on a GPU, on a CPU: variable-length attention as one operator (with a backward of its own),
the loss by the registered operators, and collectives that go nowhere, so that one process can be a rank of several."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


def _documents(bounds: torch.Tensor, *tensors: torch.Tensor) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Each document's part of ``[T, heads, D]`` tensors as fp32 ``[heads, length, D]``."""
    edges = bounds.tolist()
    for begin, end in itertools.pairwise(edges):
        here = slice(begin, end)
        yield here, [part[here].transpose(0, 1).float() for part in tensors]


def _weights(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Causal attention ``[H, length, length]`` of one document."""
    scores = q @ k.repeat_interleave(len(q) // len(k), 0).mT * q.shape[-1] ** -0.5
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, float("-inf")).softmax(-1)


@torch.library.custom_op("aifactory_test::varlen", mutates_args=())
def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int) -> torch.Tensor:
    """Causal attention within each document. q ``[T, H, D]``, k and v ``[T, H_kv, D]``, bounds int32 ``[documents +
    1]``.
    """
    out = torch.empty_like(q)
    for here, (own_q, own_k, own_v) in _documents(bounds, q, k, v):
        out[here] = (_weights(own_q, own_k) @ own_v.repeat_interleave(len(own_q) // len(own_v), 0)).transpose(0, 1)
    return out


@torch.library.custom_op("aifactory_test::varlen_backward", mutates_args=())
def varlen_backward(
    grad: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = (torch.empty_like(states) for states in (q, k, v))
    for here, (own, own_q, own_k, own_v) in _documents(bounds, grad, q, k, v):
        groups, scale = len(own_q) // len(own_k), q.shape[-1] ** -0.5
        weights = _weights(own_q, own_k)
        toward = own @ own_v.repeat_interleave(groups, 0).mT
        scores = weights * (toward - (toward * weights).sum(-1, keepdim=True)) * scale
        dq[here] = (scores @ own_k.repeat_interleave(groups, 0)).transpose(0, 1)
        for into, part in ((dk, scores.mT @ own_q), (dv, weights.mT @ own)):
            into[here] = part.unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
    return dq, dk, dv


varlen.register_fake(lambda q, k, v, bounds, longest: torch.empty_like(q))
varlen_backward.register_fake(
    lambda grad, q, k, v, bounds: (torch.empty_like(q), torch.empty_like(k), torch.empty_like(v))
)
varlen.register_autograd(
    lambda ctx, grad: (*torch.ops.aifactory_test.varlen_backward(grad.contiguous(), *ctx.saved_tensors), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:4]),
)


def attend(q, k, v, bounds, bounds_k, longest, longest_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
    """With the signature of ``torch.nn.attention.varlen.varlen_attn``."""
    assert window_size == (-1, 0) and bounds is bounds_k and longest == longest_k
    return torch.ops.aifactory_test.varlen(q, k, v, bounds, longest)


def use(core: Any) -> Any:
    """Make ``core`` (a :class:`CausalLM`) compute as on a GPU."""
    from aifactory_train.core import compat
    from aifactory_train.model import attention

    compat.varlen_attention = lambda: attend
    compat.varlen_supports_gqa = lambda: True
    attention.register()
    core.language_model.set_attn_implementation(attention.VARLEN)
    core.kernels = True
    return core


@contextlib.contextmanager
def rank_of(size: int) -> Iterator[Any]:
    """This process is rank 0 of ``size``; collectives return at once and change nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from aifactory_train.parallel import ddp
    from aifactory_train.parallel.world import World

    summed = ddp._sum_hook
    ddp._sum_hook = _nowhere  # its all-reduce's future is empty here
    dist.init_process_group("fake", rank=0, world_size=size, store=FakeStore())
    try:
        yield World(0, size, 0, size, "cpu", "a test", "here")
    finally:
        dist.destroy_process_group()
        ddp._sum_hook = summed


def _nowhere(dtype, bucket):
    future: torch.futures.Future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


class Collectives(TorchDispatchMode):
    """Counts collectives by name (``CommDebugMode`` loses its way in a second backward pass)."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, name = function._schema.name.split("::")
        if "c10d" in space:
            self.found[name.strip("_").removesuffix("_into_tensor").removesuffix("_tensor").removesuffix("_base")] += 1
        return function(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    """Counts every operator: a launch each, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.found[function._schema.name] += 1
        return function(*args, **(kwargs or {}))


class Launches(Operators):
    """Counts what launches a kernel: no views, nothing that only makes memory."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        if function.is_view or name.split("::")[1] in NO_LAUNCH:
            return function(*args, **(kwargs or {}))
        return super().__torch_dispatch__(function, types, args, kwargs)


#: Operators that launch nothing, beside views.
NO_LAUNCH = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view"}
