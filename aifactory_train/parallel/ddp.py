"""One copy of the model per rank; gradients are summed over ranks (a single process is the same engine without the
sum).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from aifactory_train.core import compat
from aifactory_train.parallel.state import Piece
from aifactory_train.parallel.torch_engine import TorchEngine

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.model.causal_lm import CausalLM
    from aifactory_train.model.precision import Precision
    from aifactory_train.parallel.engine import DeviceBatch
    from aifactory_train.parallel.world import World


def _sum_hook(dtype: torch.dtype, bucket):  # DDP reads annotations as types, which this module keeps as strings
    """Sum in the policy's reduction type, where DDP's default would average in the bucket's own."""
    buffer = bucket.buffer()
    reduced = buffer if buffer.dtype == dtype else buffer.to(dtype)
    future = dist.all_reduce(reduced, async_op=True).get_future()

    def arrived(done: torch.futures.Future) -> torch.Tensor:
        total = done.value()[0]
        return total if total.dtype == buffer.dtype else buffer.copy_(total)

    return future.then(arrived)


class DDPEngine(TorchEngine):
    """See :class:`aifactory_train.parallel.Engine`."""

    def __init__(self, name: str, core: CausalLM, recipe: Recipe, precision: Precision, world: World):
        super().__init__(name, core, recipe, precision, world)
        self.module: nn.Module = core
        self.warns = world.size > 1
        if self.warns:
            ddp = DistributedDataParallel(
                core,
                device_ids=[torch.device(world.device).index] if world.device != "cpu" else None,
                gradient_as_bucket_view=True,
                # With this on, DDP keeps its first buckets. Otherwise it sorts them anew after one step, and from three
                # ranks on the order of summation would differ between a run and its resumption. It also lets a
                # parameter go unused (an expert without tokens). The price is one walk through the graph a step: 4 ms
                # with the 448 matrices of an 8B LoRA on a slow core, while the device still has the forward's work
                # before it.
                find_unused_parameters=True,
                **compat.ddp_without_buffer_sync(),  # type: ignore[arg-type]
            )
            ddp.register_comm_hook(precision.reduce, _sum_hook)
            self.module = ddp
        self._build_optimizer()

    def forward_backward(self, batch: DeviceBatch, scale: float, last: bool) -> torch.Tensor:
        waits = isinstance(self.module, DistributedDataParallel) and not last
        with self.module.no_sync() if waits else contextlib.nullcontext():  # type: ignore[operator]
            if self.warns and not waits:
                self.warns = False
                loss = compat.quiet_unused_parameters(lambda: self.module(**batch.kwargs()))
            else:
                loss = self.module(**batch.kwargs())
            (loss * scale).backward()
        return loss.detach()

    def discard(self) -> None:
        # gradient_as_bucket_view: DDP owns the memory, so zeros rather than None
        self.optimizer.zero_grad(set_to_none=self.module is self.core)

    def _pieces(self, tensor: torch.Tensor) -> list[Piece]:
        return [Piece((0,) * tensor.dim(), tensor)]

    def _owned(self, number: int) -> bool:
        return number % self.world.size == self.world.rank  # all hold all: the ranks take turns

    def full_parameters(self, trained_only: bool = True) -> Iterator[tuple[str, torch.Tensor | None]]:
        for name, parameter in self.core.named_parameters():
            if parameter.requires_grad or not trained_only:
                yield name, parameter.detach().cpu() if self.world.is_main else None

    def gathered(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def describe(self) -> list[tuple[str, str, str]]:
        how = f"{self.world.size} copies, gradients summed" if self.world.size > 1 else "one process"
        return [("engine", self.name, how)]
