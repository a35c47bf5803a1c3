"""Other implementations of GeGLU for ``kernels bench``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any


def rivals() -> dict[str, Callable[..., Any]]:
    """Liger's, where it is installed."""
    if importlib.util.find_spec("liger_kernel") is None:
        return {}
    from liger_kernel.transformers import functional as liger

    return {"liger": liger.liger_geglu}
