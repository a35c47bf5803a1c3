"""The block ``experts`` of a recipe: what is trained of a mixture of experts, and the losses of its routers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from aifactory_train.config.strict import Strict


class ExpertsConfig(Strict):
    """Mixtures of experts; a model without experts takes no notice of it."""

    # Defaults are null: a checkpoint of before this block was there goes on as it began.
    adapt: Literal["all", "none"] | None = Field(
        None,
        description="With an adapter, on the routed experts: all of them, or none; null: all where adapter.targets is "
        "all-linear or names them and adapter.kind can be put on them.",
    )
    router: Literal["frozen", "trained"] | None = Field(
        None, description="null: trained with adapter.kind none, frozen beside an adapter."
    )
    balance_loss: float | None = Field(
        None,
        ge=0,
        description="Weight of the load-balancing loss over the tokens of the whole step; null: what the model's "
        "configuration asks for (router_aux_loss_coef where output_router_logits is set), else 0.",
    )
    z_loss: float | None = Field(
        None,
        ge=0,
        description="Weight of the routers' z loss (mean square of the log of their softmax's sum); null: what the "
        "model's configuration asks for (router_z_loss_coef where output_router_logits is set), else 0.",
    )
