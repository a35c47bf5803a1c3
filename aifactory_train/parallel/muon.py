"""Muon: the momentum of each matrix of a block, made orthogonal, is its update; everything else is stepped by AdamW.

The iteration and its coefficients are those of Jordan et al. 2024 (https://kellerjordan.github.io/posts/muon/). The
update is scaled by ``0.2 sqrt(max(rows, columns))`` (Liu et al. 2025, arXiv:2502.16982, equation 4), which gives it the
root mean square of AdamW's: one learning rate and one weight decay serve both parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch

from aifactory_train.parallel.optim import adamw_moments
from aifactory_train.parallel.shards import Shards, is_cut, local_of

#: of the quintic ``a X + b (X X^T) X + c (X X^T)^2 X``; singular values end between 0.7 and 1.2
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS, MOMENTUM = 5, 0.95


def orthogonalised(matrices: torch.Tensor) -> torch.Tensor:
    """``[..., M, N]`` with the singular vectors of ``matrices`` and singular values near 1 (:data:`STEPS`
    Newton-Schulz iterations in its own type)."""
    a, b, c = COEFFICIENTS
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """Groups with ``orthogonal`` are stepped by Muon, the others by torch's AdamW.

    A matrix whose rows lie on several ranks is gathered on one of them in turn, made orthogonal there, and dealt out
    again: every matrix is worked on once, and no rank holds more than one whole. Of stacks of matrices (experts) the
    ranks have whole matrices.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        compute: torch.dtype,
        shards: Shards | None,
    ):
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.compute, self.shards = compute, shards

    def new_state(self, group: dict[str, Any], parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        """The state of ``parameter`` of ``group`` before its first step."""
        if not group["orthogonal"]:
            return adamw_moments(parameter)
        return {"momentum_buffer": torch.zeros_like(parameter)}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step over all parameters that have a gradient; ``closure`` is not called."""
        for group, parameter, update in self._updates():
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(update, alpha=-group["lr"])
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["orthogonal"]]
        try:
            super().step()
        finally:
            self.param_groups = groups

    def _updates(self) -> Iterator[tuple[dict[str, Any], torch.Tensor, torch.Tensor]]:
        """``(group, this rank's rows of a parameter, what is subtracted at rate 1)`` of every matrix."""
        stepped = [(g, p) for g in self.param_groups if g["orthogonal"] for p in g["params"] if p.grad is not None]
        size = self.shards.size if self.shards is not None else 1
        for begin in range(0, len(stepped), size):
            at_once = stepped[begin : begin + size]  # one an owner
            pairs = zip(at_once, self._orthogonal([p for _, p in at_once]), strict=True)
            for (group, parameter), update in pairs:
                scale = 0.2 * math.sqrt(max(parameter.shape[-2:]))
                local = local_of(parameter)
                yield group, local, update.to(local.dtype).mul_(scale)

    def _momentum(self, parameter: torch.Tensor) -> torch.Tensor:
        """Nesterov's look ahead from this rank's rows of the momentum, which takes up the gradient."""
        state = self.state[parameter]
        if not state:
            state.update(self.new_state({"orthogonal": True}, parameter))
        gradient, momentum = local_of(parameter.grad), local_of(state["momentum_buffer"])  # type: ignore[arg-type]
        momentum.lerp_(gradient.to(momentum.dtype), 1 - MOMENTUM)
        return gradient.to(momentum.dtype).lerp(momentum, MOMENTUM).to(self.compute)

    def _orthogonal(self, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
        """This rank's rows of each parameter's update; at most as many parameters as there are ranks."""
        rows = [self._momentum(parameter) for parameter in parameters]
        shards = self.shards
        if shards is None:
            return [orthogonalised(row) for row in rows]
        cut = [owner for owner, p in enumerate(parameters) if p.ndim == 2 and is_cut(p)]
        whole: dict[int, torch.Tensor] = {}
        for owner in cut:
            here = shards.to_owner(rows[owner], parameters[owner].shape, owner)
            if here is not None:
                whole[owner] = orthogonalised(here)
        for owner in range(len(parameters)):
            if owner in cut:
                shape = parameters[owner].shape
                rows[owner] = shards.from_owner(whole.get(owner), rows[owner], shape, owner)
            elif rows[owner].numel():
                rows[owner] = orthogonalised(rows[owner])
        return rows
