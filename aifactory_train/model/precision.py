"""Which types hold the weights and compute, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from aifactory_train.config.schema import PrecisionConfig, Recipe
from aifactory_train.core import compat
from aifactory_train.core.errors import UserError

if TYPE_CHECKING:
    pass


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Precision:
    """The one precision policy: what engines, checkpoints and the planner read."""

    parameters: torch.dtype
    frozen: torch.dtype
    compute: torch.dtype
    reduce: torch.dtype

    def describe(self) -> str:
        names = {torch.float32: "fp32", torch.bfloat16: "bf16"}
        return (
            f"trained parameters and optimizer state {names[self.parameters]}, frozen {names[self.frozen]}, "
            f"compute {names[self.compute]}, gradient reduction {names[self.reduce]}"
        )


def choose_precision(recipe: Recipe, device: str) -> tuple[Precision, str]:
    """Resolve ``auto``: fp32 everywhere on CPU; on a GPU with bf16, compute and frozen weights in bf16, master in
    fp32.
    """
    has_bf16 = compat.supports_bf16(device)
    fast = device != "cpu" and has_bf16
    settings = recipe.precision
    for key in ("parameters", "frozen", "compute", "reduce"):
        if getattr(settings, key) == "bf16" and not has_bf16:
            raise UserError("this GPU has no bf16 arithmetic", where=f"precision.{key}", fix="use fp32")
    why = "GPU with bf16" if fast else ("CPU" if device == "cpu" else "this GPU has no bf16")
    return policy(settings, fast=fast), why


def policy(settings: PrecisionConfig, *, fast: bool) -> Precision:
    """The types that ``settings`` ask for; ``fast``: ``auto`` computes in bf16."""

    def pick(value: str, automatic: str) -> torch.dtype:
        return DTYPES[automatic if value == "auto" else value]

    compute = pick(settings.compute, "bf16" if fast else "fp32")
    low = "bf16" if compute == torch.bfloat16 else "fp32"
    return Precision(
        parameters=pick(settings.parameters, "fp32"),
        frozen=pick(settings.frozen, low),
        compute=compute,
        reduce=pick(settings.reduce, "fp32"),
    )


def apply_precision(model: nn.Module, precision: Precision) -> None:
    """Cast trained parameters and frozen parameters (not buffers) to the policy's types."""
    for parameter in model.parameters():
        wanted = precision.parameters if parameter.requires_grad else precision.frozen
        if parameter.dtype != wanted and parameter.is_floating_point():
            parameter.data = parameter.data.to(wanted)
