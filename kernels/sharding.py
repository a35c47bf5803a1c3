"""What the operators' ``dtensor.py`` are written with. Imported only where torch has distributed support.

A rule lists the placements that an operator accepts: for each a pair (placements of the outputs, placements of the
arguments), where an argument that is no tensor has None. Rows are independent in every operator: an input sharded over
a row dimension gives outputs sharded the same way, and gradients that are summed over rows come out as partial sums.
The normalised, gated or vocabulary dimension is not sharded unless the operator is elementwise.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

__all__ = ["Shard", "optional", "rows", "rule", "total", "whole"]

whole, total = Replicate(), Partial()


def rule(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function is the rule of the registered operator ``aifactory::name``; it gets the operator's
    arguments.

    The operator is registered by ``op.py`` of the folder that the rule stands in, which is imported first.
    """

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        importlib.import_module(f"{function.__module__.rpartition('.')[0]}.op")
        return register_sharding(getattr(torch.ops.aifactory, name).default)(function)

    return register


def rows(tensor: Any) -> range:
    """Dimensions that may be sharded: all but the last."""
    return range(len(tensor.shape) - 1)


def optional(tensor: Any, placement: Any) -> Any:
    """The placement of an argument that may be None."""
    return placement if tensor is not None else None
