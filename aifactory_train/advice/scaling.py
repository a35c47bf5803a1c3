"""What a scaling campaign measured (``scaling.json``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aifactory_train.core.errors import UserError
from aifactory_train.core.files import read_json


class ScalingPoint(BaseModel):
    """One number of nodes, its repeats together. ``spread``: half of the range over the mean; ``efficiency``: tokens/s
    of a GPU over that of the fewest nodes."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    kind: Literal["strong", "weak"]
    nodes: int = Field(gt=0)
    gpus: int = Field(gt=0)
    repeats: int = Field(gt=0)
    tokens_per_s: float = Field(gt=0)
    spread: float = Field(ge=0)
    efficiency: float = Field(gt=0)


class Campaign(BaseModel):
    """``scaling.json``: what was run where, and the points. ``source`` names the runs that the figures come from."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: Literal[1]
    recipe: str
    site: str
    date: str
    source: str
    points: list[ScalingPoint] = Field(min_length=1)


def read_measured(path: Path) -> dict[str, Any]:
    """A measured campaign as plain values; refuses a file of another shape."""
    try:
        return Campaign.model_validate(read_json(path, dict)).model_dump()
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        where = ".".join(str(key) for key in fault["loc"])
        raise UserError(
            f"{where}: {fault['msg']}", where=str(path), fix="the scaling.json of 'aifactory scale'"
        ) from None
