"""fp32 matrix products of linear layers on a CPU, by the faster of the two libraries that torch carries.

torch multiplies fp32 matrices with MKL. Its other library, oneDNN, was 5 to 24 % faster at the shapes of a 135M model's
linear layers on an AMD EPYC (two cores, torch 2.13, micro-batches of 512 tokens; benchmarks/README.md), without packing
or copying a weight. The choice goes by the processor's maker alone and not by a timing: a resumed run must take the
same products as the run that it goes on from. Gradients of weights stay with MKL, which was as fast.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch


@lru_cache(1)
def library() -> tuple[str, str]:
    """(``onednn`` or ``torch``, the reason) for :func:`by_rows` and :func:`by_columns` in this process."""
    if platform.machine() != "x86_64":
        return "torch", f"{platform.machine()} processor"
    try:
        maker = next(
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("vendor_id")
        )
    except (OSError, StopIteration):
        return "torch", "the maker of the processor is unknown"
    if maker != "AuthenticAMD":
        return "torch", f"{maker} processor"
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return "torch", "this torch was built without MKL or oneDNN"
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "torch", "this torch has no call into oneDNN for fp32"
    return "onednn", "AMD processor"


@contextmanager
def as_torch() -> Iterator[None]:
    """Inside, every product is torch's own: for comparing logits with plain transformers to the last bits."""
    global _as_torch
    before, _as_torch = _as_torch, True
    try:
        yield
    finally:
        _as_torch = before


_as_torch = False


def _onednn(left: torch.Tensor) -> bool:
    if _as_torch or left.dtype != torch.float32 or left.device.type != "cpu":
        return False
    return library()[0] == "onednn" and left.numel() > 0


def by_rows(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right.T``: left ``[N, K]``, right ``[M, K]`` -> ``[N, M]``. Not differentiable: for
    ``autograd.Function``.
    """
    if _onednn(left):
        return torch.ops.mkldnn._linear_pointwise(left, right, None, "none", [], "")
    return torch.mm(left, right.t())


def by_columns(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right``: left ``[N, M]``, right ``[M, K]`` -> ``[N, K]``. Not differentiable: for
    ``autograd.Function``.
    """
    if _onednn(left):
        return torch.ops.mkldnn._linear_pointwise(left, right.t(), None, "none", [], "")
    return torch.mm(left, right)
