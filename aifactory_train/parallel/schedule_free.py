"""Schedule-free AdamW (Defazio et al. 2024, arXiv:2405.15682): a weighted mean of the iterates in place of a falling
learning rate.

Gradients are taken at ``y = (1 - b1) z + b1 x``, where ``z`` are the iterates of AdamW without momentum and ``x`` is
their mean, weighted by the square of the highest learning rate so far. The parameters hold ``y``; ``x``, which is what
is evaluated and exported, follows from both (:func:`averaged`). The recursion is the one of the authors' reference
implementation, which never stores ``x``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from aifactory_train.parallel.shards import local_of

#: Of the optimizer as a whole, kept in checkpoints beside what is kept of each parameter: highest learning rate, sum
#: of weights.
RUN = "run"


def averaged(y: torch.Tensor, z: torch.Tensor, beta1: float) -> torch.Tensor:
    """``x`` in fp32, of ``y`` and ``z`` of one shape."""
    return y.float().lerp(z.float(), 1 - 1 / beta1)


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """State of a parameter: ``z``, ``exp_avg_sq``; as many bytes as AdamW's. Weight decay is taken at ``y``."""

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.updates = 0
        #: fp64 ``[2]``: highest learning rate so far, sum of the weights
        self.run = torch.zeros(2, dtype=torch.float64)

    def new_state(self, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of ``parameter`` before its first step, where ``z`` is ``y``."""
        return {"z": parameter.detach().clone(), "exp_avg_sq": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step over all parameters that have a gradient; ``closure`` is not called."""
        self.updates += 1
        # Groups have rates in a fixed ratio, which cancels in the weights.
        self.run[0] = max(float(self.run[0]), max(float(g["lr"]) / g.get("rate", 1.0) for g in self.param_groups))
        weight = float(self.run[0]) ** 2
        self.run[1] += weight
        share = weight / float(self.run[1])
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(group, parameter, share)

    def _step(self, group: dict[str, Any], parameter: torch.Tensor, share: float) -> None:
        """``share``: weight of the new iterate in the mean."""
        state, rate, (beta1, beta2) = self.state[parameter], float(group["lr"]), group["betas"]
        if not state:
            state.update(self.new_state(group, parameter))
        y, gradient = local_of(parameter), local_of(parameter.grad)  # type: ignore[arg-type]
        z, square = local_of(state["z"]), local_of(state["exp_avg_sq"])
        square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        direction = gradient / (square / (1 - beta2**self.updates)).sqrt_().add_(group["eps"])
        if group["weight_decay"]:
            direction.add_(y, alpha=group["weight_decay"])
        y.lerp_(z, share).add_(direction, alpha=rate * (beta1 * (1 - share) - 1))
        z.sub_(direction, alpha=rate)
