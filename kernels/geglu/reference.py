"""GeGLU in plain torch: the oracle of the tests (fp64-capable) and the CPU path."""

import torch


def geglu(gate: torch.Tensor, up: torch.Tensor, approximate: str = "tanh") -> torch.Tensor:
    """``gelu(gate) * up``; ``approximate`` as in ``torch.nn.functional.gelu``: ``tanh`` or ``none``."""
    return torch.nn.functional.gelu(gate, approximate=approximate) * up
