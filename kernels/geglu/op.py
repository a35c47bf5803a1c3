"""GeGLU: the registered gated activation with the gelu kinds."""

import torch

from aifactory_train.kernels import runtime
from aifactory_train.kernels.geglu import reference
from aifactory_train.kernels.swiglu import op as _registers_glu  # noqa: F401

__all__ = ["geglu"]


def geglu(gate: torch.Tensor, up: torch.Tensor, approximate: str = "tanh") -> torch.Tensor:
    """``gelu(gate) * up``. Both [..., I] of one shape and dtype, any row stride; differentiable in both; fp32 inside.

    ``approximate`` is ``tanh`` (Gemma) or ``none`` (exact, by erf). Raises ``ValueError`` for anything else.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"geglu: approximate must be 'tanh' or 'none', not {approximate!r}")
    if not runtime.use_triton("geglu", gate):
        return reference.geglu(gate, up, approximate)
    return torch.ops.aifactory.glu_fwd(gate, up, 1 if approximate == "tanh" else 2)
