"""What a scaling campaign measured (``scaling.json``)."""

from __future__ import annotations

import math
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


def page(measured: dict[str, Any]) -> str:
    """The plot and the table as one HTML page. No script, no outside resource; every text escaped."""
    from aifactory_train.core.templates import render

    nodes = [point["nodes"] for point in measured["points"]]
    left, right = math.log(min(nodes)), math.log(max(nodes))

    def x(count: int) -> float:
        return round(90 + 660 * ((math.log(count) - left) / (right - left) if right > left else 0.5), 1)

    def y(efficiency: float) -> float:
        return round(290 - 250 * efficiency, 1)

    return render(Path(__file__).with_name("scaling.html.j2"), autoescape=True, m=measured, x=x, y=y)
