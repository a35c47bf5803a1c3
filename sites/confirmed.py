"""Second sources: where somebody else says the same as a fact of a profile, and which facts have none."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from aifactory_train.sites.fields import SiteModel

if TYPE_CHECKING:
    from aifactory_train.sites.system import System


class Confirmation(SiteModel):
    """``at`` lists dotted paths (each covers everything below it) whose values ``source`` states too."""

    at: list[str] = Field(min_length=1)
    source: str


def confirmed_by(system: System, path: str) -> list[str]:
    """Names of the further sources that state the value at a path."""
    return [c.source for c in system.confirmed if any(path == at or path.startswith(at + ".") for at in c.at)]


def single(system: System) -> list[str]:
    """Paths of facts that rest on one user's repository alone: nobody else was found who says the same."""
    return [
        fact.path
        for fact in system.stated_facts()
        if fact.confidence == "documented-user" and not confirmed_by(system, fact.path)
    ]
