"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from aifactory_train.config import TrainConfig

#: In the names of embeddings; those of GPT-2 (GPT-SW3 and others) are ``wte`` and ``wpe``.
EMBEDDINGS = ("embed", ".wte.", ".wpe.")


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Trained parameters in two groups: matrices decay; vectors (norms, biases) and embeddings (by name) do not.

    Each group carries ``names`` in the order of its ``params``.
    """
    decayed: dict[str, list] = {"params": [], "names": []}
    plain: dict[str, list] = {"params": [], "names": []}
    for name, parameter in named:
        if not parameter.requires_grad:
            continue
        group = decayed if parameter.ndim >= 2 and not any(word in name for word in EMBEDDINGS) else plain
        group["params"].append(parameter)
        group["names"].append(name)
    return [
        {**group, "weight_decay": decay} for group, decay in ((decayed, weight_decay), (plain, 0.0)) if group["params"]
    ]


def build_optimizer(groups: list[dict[str, Any]], settings: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (torch's fused implementation, on CPU and GPU) or SGD; the loop sets the learning rate before each step."""
    groups = [{k: v for k, v in group.items() if k != "names"} for group in groups]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True)


def learning_rate(step: int, total: int, settings: TrainConfig) -> float:
    """The rate of optimizer step ``step`` (from 0) of ``total``: linear warm-up, then the schedule.

    The first step of a warm-up of W steps runs at 1/W of the peak, never at zero; the last step of cosine and linear runs
    just above ``min_lr_ratio`` times the peak.
    """
    peak = settings.learning_rate
    warmup = settings.warmup_steps if settings.warmup_steps is not None else math.ceil(total * settings.warmup_ratio)
    if step < warmup:
        return peak * (step + 1) / warmup
    if settings.schedule == "constant":
        return peak
    floor = settings.min_lr_ratio
    done = (step - warmup) / max(1, total - warmup)
    if settings.schedule == "wsd":
        start = 1.0 - settings.decay_ratio
        if done < start:
            return peak
        return peak * (floor + (1 - floor) * (1 - (done - start) / settings.decay_ratio))
    if settings.schedule == "linear":
        return peak * (floor + (1 - floor) * (1 - done))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
