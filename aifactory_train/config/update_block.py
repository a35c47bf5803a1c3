"""The part of the recipe's ``train`` that says which weights move, how fast each, and which mean of them is kept."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from aifactory_train.config.strict import Strict


class AverageConfig(Strict):
    """A mean of the weights over the steps, which is evaluated and exported in place of the last ones."""

    kind: Literal["ema", "mean"] = Field(
        "ema", description="ema: older steps count ever less; mean: all steps after start_step count the same."
    )
    decay: float = Field(
        0.999, gt=0, lt=1, description="ema: share of the mean that a step leaves; at first (1 + steps) / (10 + steps)."
    )
    start_step: int = Field(0, ge=0, description="Optimizer steps before the mean begins.")


class UpdateConfig(Strict):
    """Which weights move and how fast; what is not given does nothing."""

    freeze: list[str] | None = Field(
        None,
        min_length=1,
        description="Patterns of names of parameters that are not trained, e.g. 'model.embed_tokens.*' or "
        "'*.layers.[0-3].*'.",
    )
    lora_plus_ratio: float | None = Field(
        None, gt=0, description="LoRA+: learning rate of an adapter's B over that of its A, e.g. 16."
    )
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Each block learns at this share of the rate of the one above it; the embeddings are below the "
        "first.",
    )
    average: AverageConfig | None = None
