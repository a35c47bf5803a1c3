"""Sharding rules: how each registered operator acts on DTensors, so that FSDP2, tensor and sequence parallelism see
through it.

The rules stand in each operator's own ``dtensor.py``, written with :mod:`sharding`; torch refuses DTensors of an
operator without one, by name.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from aifactory_train.kernels import registry


def gathered(weight: Any) -> torch.Tensor:
    """A plain tensor: a DTensor weight is gathered, and its gradient goes back as a partial sum (reduce-scattered to
    its shards).
    """
    if _DTENSOR is None or not isinstance(weight, _DTENSOR):
        return weight
    from torch.distributed.tensor import Partial, Replicate

    sharded: Any = weight
    mesh = sharded.device_mesh
    return sharded.redistribute(mesh, [Replicate()] * mesh.ndim).to_local(grad_placements=[Partial()] * mesh.ndim)


# The DTensor class once the rules are registered; a plain variable, because torch.compile traces the test in
# `gathered`.
_DTENSOR: type | None = None


@lru_cache(None)
def register() -> None:
    """Register the rules once; nothing to do where torch was built without distributed support."""
    global _DTENSOR
    if not torch.distributed.is_available():
        return
    from torch.distributed.tensor import DTensor

    _DTENSOR = DTensor
    for name in registry.OPERATORS:
        registry.part(name, "dtensor")
