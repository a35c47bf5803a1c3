"""Meta tensors pass for those of one chip: our operators prepare their launches for it, and torch's optimizers and
norms take the ways that they take on GPUs (fused, many tensors at once)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.kernels import hardware


def refuse_unknown(arch: str) -> None:
    """Raises :class:`UserError` for a chip that the kernels are not proven for, and where Triton is missing."""
    from aifactory_train.kernels.runtime import HAS_TRITON

    if arch not in hardware.TARGETS:
        raise UserError(
            f"the step audit launches our kernels, which are proven for {', '.join(hardware.TARGETS)}, not for {arch}",
            where="--audit",
            fix="--set kernels.enabled=off audits the model's own operators",
        )
    if not HAS_TRITON:
        raise UserError(
            "the step audit prepares Triton launches, and Triton is not installed",
            where="--audit",
            fix="pip install triton (a GPU build of torch brings it), or --set kernels.enabled=off",
        )


@contextlib.contextmanager
def chip(arch: str, sku: str | None) -> Iterator[None]:
    """Within it meta tensors lie on this chip. The tables of torch that name devices are put back afterwards."""
    import torch.optim.optimizer as optimizers
    from torch.utils import _foreach_utils as many

    from aifactory_train.kernels import runtime

    with contextlib.ExitStack() as stack:
        stack.enter_context(runtime.pretend(arch, sku))
        for place in (many, optimizers):
            for name in ("_get_foreach_kernels_supported_devices", "_get_fused_kernels_supported_devices"):
                stack.enter_context(replaced(place, name, _and_meta(getattr(place, name))))
        yield


def _and_meta(names: Any) -> Any:
    return lambda: [*names(), "meta"]


@contextlib.contextmanager
def replaced(place: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)
