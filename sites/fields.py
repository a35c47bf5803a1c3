"""Types of a profile's values: times, counts, text, and the strict model that every section is."""

from __future__ import annotations

import re
from datetime import date as Date
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationInfo, WithJsonSchema, field_validator

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(value: Any) -> int:
    """Seconds from ``"48h"``, ``"30m"``, ``"2d"``, ``"1d12h"``, Slurm's ``"2-00:00:00"``/``"24:00:00"``, or an int of
    seconds.

    >>> parse_duration("1d12h"), parse_duration("2-00:00:00"), parse_duration("00:30:00")
    (129600, 172800, 1800)
    """
    if isinstance(value, bool):
        raise ValueError("a time is needed, such as 48h, 30m or '2-00:00:00'")
    if isinstance(value, int):
        if value <= 0:
            raise ValueError("a time must be positive")
        return value
    text = str(value).strip()
    if re.fullmatch(r"(\d+[dhms])+", text):
        seconds = sum(int(n) * _UNITS[u] for n, u in re.findall(r"(\d+)([dhms])", text))
    else:
        found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
        if not found:
            raise ValueError(f"'{text}' is not a time; write 48h, 30m, 2d or '2-00:00:00'")
        days, hours, minutes, secs = (int(g or 0) for g in found.groups())
        if minutes > 59 or secs > 59:
            raise ValueError(f"'{text}' has more than 59 minutes or seconds")
        seconds = days * 86400 + hours * 3600 + minutes * 60 + secs
    if seconds <= 0:
        raise ValueError("a time must be positive")
    return seconds


def slurm_time(seconds: int) -> str:
    """``D-HH:MM:SS`` or ``HH:MM:SS``, the form that Slurm and PBS Pro both print and Slurm reads."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def compact_time(seconds: int) -> str:
    """The shortest form that profiles use: ``2d``, ``12h``, ``90m``, ``45s``."""
    for unit in ("d", "h", "m"):
        if seconds % _UNITS[unit] == 0 and (unit != "d" or seconds >= 2 * _UNITS["d"]):
            return f"{seconds // _UNITS[unit]}{unit}"
    return f"{seconds}s"


_DURATION_SCHEMA = {
    "type": ["string", "integer"],
    "description": "48h, 30m, 2d, 1d12h or '2-00:00:00'; an integer is seconds",
}
Seconds = Annotated[int, BeforeValidator(parse_duration), WithJsonSchema(_DURATION_SCHEMA, mode="validation")]
"""Whole seconds; written as a duration in YAML."""

# A vendor's instruction-set name: sm_80 for NVIDIA, gfx90a for AMD. Mixing the two up is caught here and in `sites
# check`.
Arch = Annotated[str, Field(pattern=r"^(sm_\d{2,3}|gfx[0-9a-f]{3,4})$")]
Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


def _as_text(value: Any) -> Any:
    """YAML reads 2026 and 010 as numbers; they are kept as the text that was written."""
    if isinstance(value, (int, float, Date)) and not isinstance(value, bool):
        return getattr(value, "written", None) or str(value)
    return value


Text = Annotated[str, BeforeValidator(_as_text), WithJsonSchema({"type": ["string", "number"]}, mode="validation")]


class SiteModel(BaseModel):
    """An unknown key is an error, and values do not change."""

    model_config = ConfigDict(defer_build=True, extra="forbid", frozen=True, populate_by_name=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool):
            wanted = set(re.findall(r"\w+", str(cls.model_fields[info.field_name or ""].annotation)))
            if wanted & {"int", "float"} and "bool" not in wanted:
                raise ValueError(f"true and false are no value of '{info.field_name}'")
        return value
