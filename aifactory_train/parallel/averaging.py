"""``train.average``: a mean of the weights over the steps, beside the weights."""

from __future__ import annotations

import torch
from torch import nn

from aifactory_train.config.update_block import AverageConfig
from aifactory_train.parallel.shards import local_of

#: Under this name the mean of a parameter lies in checkpoints, beside the optimizer's moments.
AVERAGE = "average"


def share_of(settings: AverageConfig, updates: int) -> float:
    """The share of the weights after ``updates`` steps in the mean; 1 until it begins."""
    steps = updates - settings.start_step
    if steps <= 1:
        return 1.0
    if settings.kind == "mean":
        return 1.0 / steps
    # a short run's mean must not be what the run began with
    return 1.0 - min(settings.decay, (1 + steps) / (10 + steps))


class Average:
    """``kept``: by name, the mean in fp32, cut as its parameter is; empty before the first step."""

    def __init__(self, settings: AverageConfig, named: list[tuple[str, nn.Parameter]]):
        self.settings, self.named = settings, named
        self.kept: dict[str, torch.Tensor] = {}

    def prepare(self, updates: int) -> None:
        """Zeros where a run of ``updates`` steps keeps a mean."""
        self.kept = {n: torch.zeros_like(p.detach(), dtype=torch.float32) for n, p in self.named} if updates else {}

    @torch.no_grad()
    def take_up(self, updates: int) -> None:
        """After the step that made it ``updates`` steps."""
        if not self.kept:
            self.prepare(updates)
        share = share_of(self.settings, updates)
        for name, parameter in self.named:
            mean, weights = local_of(self.kept[name]), local_of(parameter.detach()).float()
            if share == 1.0:
                mean.copy_(weights)
            else:
                mean.lerp_(weights, share)
