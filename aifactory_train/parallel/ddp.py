"""One copy of the model per rank; gradients are summed over ranks (a single process is the same engine without the sum)."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from aifactory_train.optim import build_optimizer, parameter_groups

if TYPE_CHECKING:
    from aifactory_train.config import Recipe
    from aifactory_train.model import CausalLM, Precision
    from aifactory_train.parallel import DeviceBatch
    from aifactory_train.parallel.world import World


def _sum_hook(group, bucket):
    """Sum, where DDP's default would average; in the bucket's own dtype."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return work.get_future().then(lambda future: future.value()[0])


class DDPEngine:
    """See :class:`aifactory_train.parallel.Engine`."""

    name = "ddp"

    def __init__(self, core: CausalLM, recipe: Recipe, precision: Precision, world: World):
        self.core, self.world, self.precision = core, world, precision
        self.compute_autocast = precision.compute != precision.parameters or precision.compute != precision.frozen
        self.named = [(n, p) for n, p in core.named_parameters() if p.requires_grad]
        self.module: nn.Module = core
        if world.size > 1:
            ddp = DistributedDataParallel(
                core,
                device_ids=[world.local_rank] if world.device != "cpu" else None,
                gradient_as_bucket_view=True,
                broadcast_buffers=False,
            )
            ddp.register_comm_hook(None, _sum_hook)
            self.module = ddp
        self.optimizer = build_optimizer(parameter_groups(self.named, recipe.train.weight_decay), recipe.train)

    def _autocast(self):
        if not self.compute_autocast:
            return contextlib.nullcontext()
        return torch.autocast(self.world.device.split(":")[0], dtype=self.precision.compute)

    def forward_backward(self, batch: DeviceBatch, scale: float, last: bool) -> torch.Tensor:
        sync = contextlib.nullcontext() if last or self.module is self.core else self.module.no_sync()
        with sync:
            with self._autocast():
                loss = self.module(**batch.kwargs())
            (loss * scale).backward()
        return loss.detach()

    def clip(self, max_norm: float | None) -> torch.Tensor:
        parameters = [p for _, p in self.named]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
        return norm

    def step(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.discard()

    def discard(self) -> None:
        # gradient_as_bucket_view: DDP owns the memory, so zeros rather than None
        self.optimizer.zero_grad(set_to_none=self.module is self.core)

    def state(self) -> dict[str, Any]:
        state = {"model": {n: p.detach() for n, p in self.named}, "optimizer": {}}
        for name, parameter in self.named:
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state["optimizer"][f"{name}.{key}"] = value
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.named:
                parameter.copy_(state["model"][name])
        for name, parameter in self.named:
            prefix = f"{name}."
            values = {k.removeprefix(prefix): v for k, v in state["optimizer"].items() if k.startswith(prefix)}
            if values:
                self.optimizer.state[parameter] = values

    def full_parameters(self, trained_only: bool = True):
        for name, parameter in self.core.named_parameters():
            if parameter.requires_grad or not trained_only:
                yield name, parameter.detach().cpu() if self.world.is_main else None

    def describe(self) -> list[tuple[str, str, str]]:
        how = f"{self.world.size} copies, gradients summed" if self.world.size > 1 else "one process"
        return [("engine", "ddp", how)]
