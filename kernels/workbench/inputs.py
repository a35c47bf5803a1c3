"""Draws the inputs that an operator's ``space.py`` describes, and runs operator and oracle on them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from aifactory_train.kernels import registry
from aifactory_train.kernels.spec import Operator

#: sizes that fit no block, with which values are tested where an operator names none: one row, no rows, several
_SMALL = {
    "hidden": 200,
    "width": 200,
    "vocab": 300,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 64,
    "in": 48,
    "out": 80,
    "rank": 4,
    "numel": 700,
}


class Make:
    """What ``inputs(make, shape)`` of a ``space.py`` draws from. Tensors are of ``dtype`` and on torch's default
    device.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def fixed(self, *sizes: int, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers, not differentiated."""
        return (torch.randn(*sizes) * scale).to(self.dtype)

    def normal(self, *sizes: int, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers, differentiated."""
        return self.fixed(*sizes, scale=scale).requires_grad_()

    def scale(self, *sizes: int) -> torch.Tensor:
        """A norm's weight: near 1, differentiated."""
        return (1 + 0.1 * torch.randn(*sizes)).to(self.dtype).requires_grad_()

    def heads(self, rows: int, heads: int, dim: int) -> torch.Tensor:
        """[1, heads, rows, dim] as attention makes it, a transposed view; differentiated."""
        return self.fixed(1, rows, heads, dim).transpose(1, 2).requires_grad_()

    def rotation(self, rows: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [1, rows, dim] with equal halves."""
        angle = (torch.randn(1, rows, dim // 2) * 3).repeat(1, 1, 2)
        return angle.cos().to(self.dtype), angle.sin().to(self.dtype)

    def labels(self, *sizes: int, classes: int) -> torch.Tensor:
        """Class numbers (int64)."""
        return torch.randint(0, classes, sizes)

    def constant(self, value: float, *sizes: int) -> torch.Tensor:
        """One fp32 number everywhere, not differentiated."""
        return torch.full(sizes, value)


def function(name: str) -> Callable[..., Any]:
    """The operator, with the keyword arguments that it declares for the workbench."""
    return _bound(name, getattr(registry.part(name, "op"), name))


def oracle(name: str) -> Callable[..., Any]:
    """Its reference, with those of the keyword arguments that the reference has."""
    return _bound(name, getattr(registry.part(name, "reference"), name))


def _bound(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    options = {k: v for k, v in registry.operator(name).options.items() if k in inspect.signature(run).parameters}
    return lambda *inputs: run(*inputs, **options)


def small(operator: Operator) -> tuple[dict[str, int], ...]:
    """Shapes for testing values: those that the operator names, or a few made from its dimensions."""
    if operator.small:
        return operator.small
    first = operator.checks[0]
    shape = {d: _SMALL.get(d, first[d]) for d in operator.dims}
    return tuple(shape | {"rows": n} for n in (2, 0, 6)) if "rows" in operator.dims else (shape,)


def draw(name: str, shape: dict[str, int], dtype: torch.dtype) -> tuple[Any, ...]:
    """The operator's positional arguments for a shape."""
    return registry.operator(name).inputs(Make(dtype), shape)
