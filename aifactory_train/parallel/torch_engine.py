"""What DDP and FSDP2 share: torch's own optimizer, and norms over whatever this rank holds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from aifactory_train.parallel.dims import ParallelDims
from aifactory_train.parallel.optim import build_optimizer, parameter_groups
from aifactory_train.parallel.state import Piece, Sharded

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.model.causal_lm import CausalLM
    from aifactory_train.model.precision import Precision
    from aifactory_train.parallel.engine import DeviceBatch
    from aifactory_train.parallel.world import World


def state_keys(recipe: Recipe) -> tuple[str, ...]:
    """Moments that the optimizer keeps of each parameter, as torch names them."""
    if recipe.train.optimizer == "sgd":
        return ("momentum_buffer",) if recipe.train.momentum else ()
    if recipe.train.optimizer == "adamw8bit":
        return ("m", "v", "m_scale", "v_scale")
    return ("exp_avg", "exp_avg_sq")


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

    def _build_optimizer(self) -> None:
        self.named = [(n, p) for n, p in self.core.named_parameters() if p.requires_grad]
        settings = self.recipe.train
        self.optimizer = build_optimizer(parameter_groups(self.named, settings.weight_decay), settings)

    # ---- what differs: where the shards lie

    def _local(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of a parameter, gradient or moment."""
        return tensor

    def _norm_group(self) -> dist.ProcessGroup | None:
        """Ranks whose local gradients together are the whole gradient; None where this rank has it all."""
        return None

    def _pieces(self, tensor: torch.Tensor) -> list[Piece]:
        raise NotImplementedError

    def _owned(self, number: int) -> bool:
        """Whether this rank writes its pieces of the ``number``-th tensor."""
        raise NotImplementedError

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
            group["lr"] = learning_rate
        self.optimizer.step()
        self.updates += 1
        self.discard()

    def discard(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    # ---- state

    def state(self) -> dict[str, dict[str, Sharded]]:
        state: dict[str, dict[str, Sharded]] = {"model": {}, "optimizer": {}}
        number = 0
        for name, parameter in self.named:
            moments = self.optimizer.state.get(parameter, {})
            for key, value in [(None, parameter), *((k, moments[k]) for k in state_keys(self.recipe) if k in moments)]:
                value = value.detach()
                entry = Sharded(tuple(value.shape), value.dtype, self._pieces(value), self._owned(number))
                if key is None:
                    state["model"][name] = entry
                else:
                    state["optimizer"][f"{key}/{name}"] = entry
                number += 1
        return state

    def prepare_state(self, updates: int) -> None:
        """Allocate the moments (zeros), so that a checkpoint can be read into them; none where nothing was stepped
        yet.
        """
        keys = state_keys(self.recipe)
        for _, parameter in self.named:
            if not updates:
                self.optimizer.state.pop(parameter, None)
                continue
            moments: dict[str, Any] = {}
            if self.recipe.train.optimizer == "adamw8bit":
                from aifactory_train.kernels.adamw8bit.op import new_state

                moments = {**new_state(parameter), "step": 0}
                keys = ()
            if self.recipe.train.optimizer == "adamw":
                # torch's fused and capturable implementations want the count beside the parameter
                moments["step"] = torch.tensor(0.0, dtype=torch.float32, device=self._local(parameter).device)
            for key in keys:
                moments[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            if moments:
                self.optimizer.state[parameter] = moments  # type: ignore[assignment]

    def finish_load(self, updates: int) -> None:
        """Called when the pieces of :meth:`state` have been filled from a checkpoint."""
        self.updates = updates
        self.discard()
        for _, parameter in self.named:
            moments = self.optimizer.state.get(parameter, {})
            if isinstance(moments.get("step"), int):
                moments["step"] = updates
            elif "step" in moments:
                moments["step"].fill_(updates)

    def full_parameters(self, trained_only: bool = True) -> Iterator[tuple[str, torch.Tensor | None]]:
        raise NotImplementedError
