"""Optimizers and learning-rate schedules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from aifactory_train.config.schema import TrainConfig

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
    """AdamW (torch's fused implementation, on CPU and GPU), AdamW with 8-bit moments (our kernel on a GPU, plain torch
    on a CPU) or SGD; the loop sets the learning rate before each step."""
    groups = [{k: v for k, v in group.items() if k != "names"} for group in groups]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate, momentum=settings.momentum)
    if settings.optimizer == "adamw8bit":
        from aifactory_train.kernels.adamw8bit.op import AdamW8bit

        # Without an fp32 master a small update would be rounded away; the kernel then rounds by chance (from a seed
        # that the step gives).
        lowest = any(p.dtype == torch.bfloat16 for group in groups for p in group["params"])
        return AdamW8bit(
            groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, stochastic_rounding=lowest
        )
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, fused=True)
