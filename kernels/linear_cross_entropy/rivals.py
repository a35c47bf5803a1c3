"""Other implementations of the linear cross-entropy for ``kernels bench``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch


def rivals() -> dict[str, Callable[..., Any]]:
    """All logits at once, torch's own chunked function where this torch has it, and Liger's where it is installed."""
    functional = torch.nn.functional
    found: dict[str, Callable[..., Any]] = {
        "eager": lambda a, w, y: functional.cross_entropy((a @ w.t()).float(), y, reduction="sum")
    }
    chunked = getattr(functional, "linear_cross_entropy", None)
    if chunked is not None:
        found["torch_linear_cross_entropy"] = lambda a, w, y: chunked(a, w, y, reduction="sum")
    if importlib.util.find_spec("liger_kernel") is not None:
        from liger_kernel.transformers import functional as liger

        found["liger"] = lambda a, w, y: liger.liger_fused_linear_cross_entropy(a, w, y, reduction="sum")
    return found
