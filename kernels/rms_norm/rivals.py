"""Other implementations of RMSNorm for ``kernels bench``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any


def rivals() -> dict[str, Callable[..., Any]]:
    """Liger's, where it is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.transformers import functional as liger

    return {"liger": lambda x, w, eps: liger.liger_rms_norm(x, w, eps, in_place=False)}
