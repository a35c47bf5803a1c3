"""SwiGLU in plain torch: the oracle of the tests (fp64-capable) and the CPU path."""

import math

import torch

from aifactory_train.kernels.runtime import wide


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up``."""
    return torch.nn.functional.silu(gate) * up


def gated_backward(
    grad: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, kind: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate, dup) in closed form, computed in at least fp32; ``kind`` 0 silu, 1 gelu by tanh, 2 gelu by erf."""
    g, x, u = wide(grad), wide(gate), wide(up)
    if kind == 0:
        s = torch.sigmoid(x)
        act, slope = x * s, s * (1 + x * (1 - s))
    elif kind == 1:
        a, b = math.sqrt(2 / math.pi), 0.044715
        t = torch.tanh(a * (x + b * x**3))
        act, slope = 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * a * (1 + 3 * b * x * x)
    else:
        cdf = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        act, slope = x * cdf, cdf + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return (g * u * slope).to(gate.dtype), (g * act).to(up.dtype)
