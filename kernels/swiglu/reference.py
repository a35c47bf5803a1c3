"""SwiGLU in plain torch: the oracle of the tests (fp64-capable) and the CPU path."""

import torch


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``."""
    return torch.nn.functional.silu(gate) * up
