"""Adafactor (Shazeer and Stern 2018, arXiv:1804.04235): of a matrix's second moments the means of its rows and columns.

Algorithm 4 with the decay of its section 7.2 (``1 - t^-0.8``), updates clipped to a root mean square of 1 (section 6),
no first moment. The learning rate is the recipe's: the relative step sizes of section 8 would hold adapters that begin
at zero where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from aifactory_train.parallel.shards import Shards, is_cut, local_of

#: added to squares (the paper's first epsilon); largest root mean square of an update; power of the decay
TINY, CLIP, POWER = 1e-30, 1.0, -0.8


def factored(parameter: torch.Tensor) -> bool:
    """Whether two means stand for the second moments: of matrices, and of stacks of them."""
    return parameter.ndim >= 2


class Adafactor(torch.optim.Optimizer):
    """State of a parameter: ``row`` ``[..., M]`` and ``column`` ``[..., N]`` of a matrix ``[..., M, N]``,
    ``exp_avg_sq`` of a vector; all fp32.

    Where rows lie on several ranks, the means of columns and of updates are taken over all of them, in two collectives
    a step.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float, shards: Shards | None):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})
        self.shards, self.updates = shards, 0

    def new_state(self, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of ``parameter`` before its first step. What follows its rows is cut like it."""
        like = torch.zeros_like(parameter, dtype=torch.float32)
        if not factored(parameter):
            return {"exp_avg_sq": like}
        row = like.sum(-1)
        if parameter.ndim > 2:
            return {"row": row, "column": like.sum(-2)}
        return {"row": row, "column": local_of(like).new_zeros(parameter.shape[-1])}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step over all parameters that have a gradient, which become the updates; ``closure`` is not called."""
        self.updates += 1
        keep = 1 - self.updates**POWER
        stepped = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        parameters = [p for _, p in stepped]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter].update(self.new_state({}, parameter))
        self._take_up(parameters, keep)
        squares = [self._become_update(p) for p in parameters]
        sums = self._total(parameters, squares)
        for (group, parameter), total in zip(stepped, sums, strict=True):
            local, update = local_of(parameter), local_of(parameter.grad)  # type: ignore[arg-type]
            clipped = update.float() / torch.clamp((total / parameter.numel()).sqrt() / CLIP, min=1.0)
            local.mul_(1 - group["lr"] * group["weight_decay"])
            local.add_(clipped.to(local.dtype), alpha=-group["lr"])

    def _take_up(self, parameters: list[torch.Tensor], keep: float) -> None:
        """The means take up this step's squares."""
        columns: list[torch.Tensor] = []
        for parameter in parameters:
            state, square = self.state[parameter], _square(parameter)
            if not factored(parameter):
                local_of(state["exp_avg_sq"]).lerp_(square, 1 - keep)
                continue
            local_of(state["row"]).lerp_(square.mean(-1), 1 - keep)
            if parameter.ndim == 2:
                columns.append(square.sum(-2))
            else:
                local_of(state["column"]).lerp_(square.mean(-2), 1 - keep)
        matrices = [p for p in parameters if p.ndim == 2]
        for parameter, total in zip(matrices, self._total(matrices, columns), strict=True):
            self.state[parameter]["column"].lerp_(total / parameter.shape[-2], 1 - keep)

    def _become_update(self, parameter: torch.Tensor) -> torch.Tensor:
        """The gradient is divided by the root of the second moments; returns the sum of its squares (fp32 scalar)."""
        state, gradient = self.state[parameter], local_of(parameter.grad)  # type: ignore[arg-type]
        if not factored(parameter):
            update = gradient.float() * local_of(state["exp_avg_sq"]).rsqrt()
        else:
            row, column = local_of(state["row"]), local_of(state["column"])
            # the mean of the rows' means is that of the columns' means, which every rank has
            root = (row.unsqueeze(-1) / column.mean(-1, keepdim=True).unsqueeze(-1)).rsqrt()
            update = gradient.float() * root * column.rsqrt().unsqueeze(-2)
        gradient.copy_(update)
        return update.square_().sum()

    def _total(self, parameters: list[torch.Tensor], parts: list[torch.Tensor]) -> list[torch.Tensor]:
        """``parts`` (fp32), one a parameter, summed over the ranks that share its rows."""
        cut = [i for i, parameter in enumerate(parameters) if is_cut(parameter)]
        if self.shards is None or not cut:
            return parts
        together = self.shards.total(torch.cat([parts[i].reshape(-1) for i in cut]))
        found = dict(zip(cut, together.split([parts[i].numel() for i in cut]), strict=True))
        return [found[i].view(part.shape) if i in found else part for i, part in enumerate(parts)]


def _square(parameter: torch.Tensor) -> torch.Tensor:
    """fp32 squares of this rank's gradient."""
    return local_of(parameter.grad).float().square().add_(TINY)  # type: ignore[arg-type]
