"""What every block of the recipe shares."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """A block of the tree: unknown keys are refused, values are validated again when assigned."""

    model_config = ConfigDict(
        defer_build=True, extra="forbid", validate_assignment=True, validate_default=True, allow_inf_nan=False
    )
