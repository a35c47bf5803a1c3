"""What DDP and FSDP2 share: torch's own optimizer, and norms over whatever this rank holds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from aifactory_train.parallel.apply import block_modules
from aifactory_train.parallel.averaging import AVERAGE, Average
from aifactory_train.parallel.dims import ParallelDims
from aifactory_train.parallel.optim import build_optimizer, new_moments, parameter_groups, treatment_of
from aifactory_train.parallel.schedule_free import RUN, ScheduleFreeAdamW, averaged
from aifactory_train.parallel.shards import Shards, local_of
from aifactory_train.parallel.state import Piece, Sharded

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.model.causal_lm import CausalLM
    from aifactory_train.model.precision import Precision
    from aifactory_train.parallel.engine import DeviceBatch
    from aifactory_train.parallel.world import World


def sum_of_squares(tensors: list[torch.Tensor], device: str) -> torch.Tensor:
    """fp32 scalar on ``device``: the squared L2 norm of all tensors together."""
    total = torch.zeros((), dtype=torch.float32, device=device)
    for _, group in _by_place(t for t in tensors if t.numel()):
        norms = torch._foreach_norm(group, 2, dtype=torch.float32)
        total += torch.stack(norms).square().sum().to(device)
    return total


def _by_place(tensors: Iterable[torch.Tensor]) -> Iterator[tuple[torch.dtype, list[torch.Tensor]]]:
    """Tensors of one device and type together: a few kernels serve them all, where each would need its own."""
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    for (_, dtype), group in groups.items():
        yield dtype, group


def clip_factor(norm: torch.Tensor, max_norm: float | None) -> torch.Tensor:
    """The factor (at most 1) that brings a gradient of this norm to ``max_norm``; 1 where there is none."""
    if max_norm is None:
        return torch.ones_like(norm)
    return torch.clamp(max_norm / (norm + 1e-6), max=1.0)


def multiply(gradients: list[torch.Tensor], factor: torch.Tensor) -> None:
    """In place, by an fp32 scalar."""
    for dtype, group in _by_place(gradients):
        here = factor.to(group[0].device)
        if dtype == torch.float32:
            torch._foreach_mul_(group, here)
            continue
        for gradient in group:  # expanded, or the factor would be rounded to their type before the product
            torch.mul(gradient, here.expand_as(gradient), out=gradient)


def clip_to(gradients: list[torch.Tensor], square: torch.Tensor, max_norm: float | None, rest: float) -> torch.Tensor:
    """Scale local gradients by ``rest``, and down to ``max_norm`` where their norm over all ranks is larger; ``square``
    is the square of that norm. Returns the norm before it is clipped."""
    norm = square.sqrt() * rest
    if max_norm is not None or rest != 1.0:
        multiply(gradients, rest * clip_factor(norm, max_norm))
    return norm


def split_scale(scale: float) -> tuple[float, float]:
    """``(power of two, rest in [0.5, 1))`` whose product is ``scale``.

    A bf16 backward pass that begins with a power of two rounds as if it began with 1. Any other number would be rounded
    with every value on its way (1 / 4104 by 0.2 % at each, all in one direction); the rest multiplies the masters'
    gradients in fp32.
    """
    rest, exponent = math.frexp(scale)
    return 2.0**exponent, rest


class TorchEngine:
    """Common part of the engines whose optimizer is torch's; see :class:`aifactory_train.parallel.Engine`."""

    module: nn.Module

    def __init__(self, name: str, core: CausalLM, recipe: Recipe, precision: Precision, world: World):
        self.name, self.dims = name, ParallelDims.of(name, recipe, world.size, world.local_size)
        self.core, self.recipe, self.precision, self.world = core, recipe, precision, world
        self.updates = 0
        self.files: dict[str, Any] = {}
        self.named: list[tuple[str, nn.Parameter]] = []
        self.optimizer: torch.optim.Optimizer
        #: ``train.average``
        self.average: Average | None = None

    def _build_optimizer(self) -> None:
        self.named = [(n, p) for n, p in self.core.named_parameters() if p.requires_grad]
        settings = self.recipe.train
        treatment = treatment_of(self.core, block_modules(self.core), settings)
        groups = parameter_groups(self.named, settings.weight_decay, treatment)
        self.optimizer = build_optimizer(groups, settings, self.precision.compute, self._shards())
        if settings.average is not None:
            self.average = Average(settings.average, self.named)

    # ---- what differs: where the shards lie

    def _shards(self) -> Shards | None:
        """The ranks that share the rows of every parameter; None where this rank has them all."""
        return None

    def _local(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a parameter, gradient or moment."""
        return tensor

    def _norm_group(self) -> dist.ProcessGroup | None:
        """Ranks whose local gradients together are the whole gradient; None where this rank has it all."""
        return None

    def _first_byte(self, tensor: torch.Tensor) -> int:
        """Which byte of the whole parameter this rank's part begins with."""
        return 0

    def _pieces(self, tensor: torch.Tensor) -> list[Piece]:
        raise NotImplementedError

    def _owned(self, number: int) -> bool:
        """Whether this rank writes its pieces of the ``number``-th tensor."""
        raise NotImplementedError

    def _uncut(self, tensor: torch.Tensor) -> bool:
        """Whether every rank has all of ``tensor`` although parameters are cut: the ranks take turns to write it."""
        return False

    # ---- one step

    def forward_backward(self, batch: DeviceBatch, scale: float, last: bool) -> torch.Tensor:
        raise NotImplementedError

    def clip(self, max_norm: float | None, rest: float = 1.0) -> torch.Tensor:
        gradients = [self._local(p.grad) for _, p in self.named if p.grad is not None]
        square = sum_of_squares(gradients, self.world.device)
        group = self._norm_group()
        if group is not None:
            dist.all_reduce(square, group=group)
        return clip_to(gradients, square, max_norm, rest)

    def step(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("rate", 1.0)
        self.optimizer.step()
        self.updates += 1
        if self.average is not None:
            self.average.take_up(self.updates)
        self.discard()

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    # ---- state

    def state(self) -> dict[str, dict[str, Sharded]]:
        state: dict[str, dict[str, Sharded]] = {"model": {}, "optimizer": {}}
        number = 0

        def add(kind: str, name: str, value: torch.Tensor) -> None:
            nonlocal number
            value = value.detach()
            owned = number % self.world.size == self.world.rank if self._uncut(value) else self._owned(number)
            state[kind][name] = Sharded(tuple(value.shape), value.dtype, self._pieces(value), owned)
            number += 1

        for name, parameter in self.named:
            add("model", name, parameter)
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if key != "step" and isinstance(value, torch.Tensor):  # the steps are `updates`
                    add("optimizer", f"{key}/{name}", value)
            if self.average is not None and name in self.average.kept:
                add("optimizer", f"{AVERAGE}/{name}", self.average.kept[name])
        if isinstance(self.optimizer, ScheduleFreeAdamW) and self.optimizer.state:
            add("optimizer", RUN, self.optimizer.run)
        return state

    def prepare_state(self, updates: int) -> None:
        """Allocate the moments (zeros), so that a checkpoint can be read into them; none where nothing was stepped
        yet.
        """
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                self.optimizer.state.pop(parameter, None)
                moments = new_moments(self.optimizer, group, parameter) if updates else {}
                if moments:
                    self.optimizer.state[parameter] = moments
        if self.average is not None:
            self.average.prepare(updates)

    def finish_load(self, updates: int) -> None:
        """Called when the pieces of :meth:`state` have been filled from a checkpoint."""
        self.updates = updates
        self.discard()
        self._weights_changed()
        if hasattr(self.optimizer, "updates"):
            self.optimizer.updates = updates
        for _, parameter in self.named:
            moments = self.optimizer.state.get(parameter, {})
            if isinstance(moments.get("step"), int):
                moments["step"] = updates
            elif "step" in moments:
                moments["step"].fill_(updates)

    # ---- the mean of the weights

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The weights lie in host memory meanwhile."""
        before: list[tuple[torch.Tensor, torch.Tensor]] = []
        for name, parameter in self.named:
            mean = self._mean_of(name, parameter)
            if mean is not None:
                local = local_of(parameter.detach())
                before.append((local, local.clone() if local.device.type == "cpu" else local.cpu()))
                local.copy_(mean)
        self._weights_changed()
        try:
            yield
        finally:
            for local, weights in before:
                local.copy_(weights)
            self._weights_changed()

    def _mean_of(self, name: str, parameter: nn.Parameter) -> torch.Tensor | None:
        """What is evaluated and exported in place of this rank's part of ``parameter``."""
        if self.average is not None and name in self.average.kept:
            return local_of(self.average.kept[name])
        state = self.optimizer.state.get(parameter)
        if isinstance(self.optimizer, ScheduleFreeAdamW) and state:
            return averaged(local_of(parameter.detach()), local_of(state["z"]), self.recipe.train.betas[0])
        return None

    def _weights_changed(self) -> None:
        """What was derived from the parameters is out of date."""

    def full_parameters(self, trained_only: bool = True) -> Iterator[tuple[str, torch.Tensor | None]]:
        raise NotImplementedError
