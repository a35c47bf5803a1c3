"""``access.yaml``: how one gets access at each of the 32 members, and whom one asks."""

from __future__ import annotations

import functools
from typing import Any, Literal

from pydantic import Field, model_validator

from aifactory_train.sites.catalogue import ROOM
from aifactory_train.sites.fields import SiteModel, Text
from aifactory_train.sites.reading import read_yaml
from aifactory_train.sites.schema import Confidence, Source

ACCESS = ROOM / "access.yaml"


class Remark(SiteModel):
    text: str
    link: str | None = None
    source: str
    confidence: Confidence


#: Who applies: a small or medium company or start-up, another company, a university, a public body.
UserKind = Literal["sme", "industry", "academia", "public"]


class Award(SiteModel):
    """What one application gives, as published."""

    unit: Literal["GPU-hours", "node-hours"]
    least: float | None = None
    most: float | None = None


class Route(SiteModel):
    """A call or scheme. What is ``None`` is not published, or was not found."""

    name: str
    who: str
    what: str
    length: str | None = None
    decision: str | None = None  # how long one usually takes
    cost: str | None = None
    link: str
    source: str
    confidence: Confidence
    # the same for machines to read
    open_to: list[UserKind] = Field(min_length=1)
    on: Literal[
        "eurohpc", "host", "own"
    ]  # whose share of a machine it gives: the JU's, the host country's, the operator's
    operator: str | None = None  # on own
    systems: list[str] = []  # only these
    countries: list[str] = []  # only applicants from these
    award: Award | None = None


class Part(SiteModel):
    """Systems, countries or both, with the source of the list."""

    system: str | None = None
    systems: list[str] = []
    countries: list[str] = []
    source: str
    confidence: Confidence
    note: str | None = None


class MemberAccess(SiteModel):
    contact: Text | None = None
    source: str | None = None  # of the contact
    unknown: bool = False  # nothing of the member's own was found: the file's ``ask`` says who would know
    routes: list[str] = Field(min_length=1)
    note: str | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> MemberAccess:
        if self.unknown == (self.contact is not None) or (self.contact is None) != (self.source is None):
            raise ValueError("a contact with its source, or unknown: true")
        return self


class AccessFile(SiteModel):
    sources: dict[str, Source]
    common: list[Remark] = []
    routes: dict[str, Route]
    eurohpc: Part
    states: Part
    shares: list[Part] = []
    ask: Remark
    members: dict[str, MemberAccess]


@functools.lru_cache(maxsize=1)
def access_file() -> AccessFile:
    return AccessFile.model_validate(read_yaml(ACCESS))


def of_member(member: str) -> dict[str, Any]:
    """``{contact, contact_known, note, routes: [...], common: [...]}`` of a member as plain data."""
    file = access_file()
    entry = file.members[member]
    dated = {key: source.retrieved or source.date for key, source in file.sources.items()}
    routes = [
        {"id": key, **file.routes[key].model_dump(exclude_none=True), "as_of": dated[file.routes[key].source]}
        for key in entry.routes
    ]
    return {
        "contact": entry.contact or f"{file.ask.text}: {file.ask.link}",
        "contact_known": entry.contact is not None,
        "note": entry.note,
        "routes": routes,
        "common": [remark.text for remark in file.common],
    }
