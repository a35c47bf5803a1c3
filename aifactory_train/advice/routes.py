"""Routes of access to a system that are open to an applicant, and why others are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.sites.access import Award, Route, UserKind, access_file, of_member
from aifactory_train.sites.index import load_index
from aifactory_train.sites.system import System


@dataclass(frozen=True)
class Applicant:
    """Who asks; ``None`` is not said, and then nothing is ruled out by it."""

    country: str | None = None  # two letters
    kind: UserKind | None = None


@dataclass(frozen=True)
class Need:
    """What a job takes: hours of GPUs as the scheduler counts them and as the site bills them, and of nodes."""

    gpu_hours: float | None = None
    billed_gpu_hours: float | None = None
    node_hours: float | None = None

    def of(self, award: Award) -> float | None:
        """The need in the unit of an award."""
        if award.unit == "node-hours":
            return self.node_hours
        return self.billed_gpu_hours if self.billed_gpu_hours is not None else self.gpu_hours


#: What people and the EU write for two countries, and what ISO 3166 does.
_OTHER_CODES = {"UK": "GB", "EL": "GR"}


def country_code(text: str) -> str:
    """The two letters of a country, given by them or by its name. Refuses one that neither hosts a member nor is known
    to take part."""
    names = {m["country_name"].lower(): m["country"] for m in load_index()["members"]}
    file = access_file()
    known = {*names.values(), *file.states.countries, *(c for part in file.shares for c in part.countries)}
    wanted = text.strip()
    code = names.get(wanted.lower(), _OTHER_CODES.get(wanted.upper(), wanted.upper()))
    if code not in known:
        words = {name.title(): code for name, code in names.items()} | {c: c for c in known}
        raise UserError(
            f"'{text}' is no country that takes part{did_you_mean(wanted.title(), words)}",
            where="--country",
            fix=f"two letters ({', '.join(sorted(known))}), or leave it out",
        )
    return code


def routes_to(system: System, applicant: Applicant, need: Need) -> tuple[list[dict[str, Any]], list[str]]:
    """``(routes that are open, why the others are not)`` to a system of the 32, the easiest first.

    ``status`` of a route is ``open``, or ``ask`` where it is not known whether applicants of the country are taken.
    """
    file = access_file()
    found: list[dict[str, Any]] = []
    closed: list[str] = []
    for member in (m for m in load_index()["members"] if system.id in m["systems"]):
        for key in file.members[member["id"]].routes:
            route = file.routes[key]
            if any(r["id"] == key for r in found) or not leads_to(route, system):
                continue
            why = _closed(route, system, applicant, need)
            if why is None:
                found.append(_as_dict(key, system, applicant, member))
            elif why not in closed:
                closed.append(why)
    return found, closed


def leads_to(route: Route, system: System) -> bool:
    """Whether a route gives hours on that system at all."""
    if route.systems and system.id not in route.systems:
        return False
    if route.on == "eurohpc":
        return system.id in access_file().eurohpc.systems
    return route.on == "host" or system.operator == route.operator


def _closed(route: Route, system: System, applicant: Applicant, need: Need) -> str | None:
    """Why a route is not open to the applicant; None where it is."""
    if applicant.kind is not None and applicant.kind not in route.open_to:
        return f"{route.name}: for {route.who}"
    countries: list[str | None] = [*route.countries]
    if route.on == "host" and not countries:
        countries = [system.country, *_sharers(system)]
    if applicant.country is not None and countries and applicant.country not in countries:
        return f"{route.name}: for applicants from {', '.join(c for c in countries if c)}"
    wanted = need.of(route.award) if route.award else None
    if wanted is not None and route.award and route.award.most and wanted > route.award.most:
        return f"{route.name}: gives {route.what}; the job takes {wanted:,.0f} {route.award.unit}"
    return None


def _sharers(system: System) -> list[str]:
    """Countries beside the host's that give out a part of the system."""
    return [c for part in access_file().shares if part.system == system.id for c in part.countries]


def _as_dict(key: str, system: System, applicant: Applicant, member: dict[str, Any]) -> dict[str, Any]:
    file = access_file()
    route = file.routes[key]
    through, share = member, None
    if route.on == "host" and applicant.country in _sharers(system):
        share = next(p for p in file.shares if p.system == system.id and applicant.country in p.countries)
        own = [m for m in load_index()["members"] if m["country"] == applicant.country]
        through = own[0] if own else member
    source = file.sources[share.source if share else route.source]
    ask = route.on == "eurohpc" and applicant.country is not None and applicant.country not in file.states.countries
    return {
        "id": key,
        "name": route.name,
        "status": "ask" if ask else "open",
        "through": through["id"],
        "who": f"the share of {applicant.country} of {system.name}" if share else route.who,
        "what": route.what,
        "decision": route.decision,
        "cost": route.cost,
        "link": route.link,
        "contact": of_member(through["id"])["contact"],
        "note": (share.note if share else None) or file.members[through["id"]].note,
        "source": source.title,
        "as_of": source.retrieved or source.date,
        "confidence": share.confidence if share else route.confidence,
    }


def near(system: System, country: str | None) -> tuple[str, str] | None:
    """How a system is near to the applicant: ``(country | share | linked, the member through which)``."""
    if country is None:
        return None
    here = [m for m in load_index()["members"] if m["country"] == country]
    if system.country == country:
        return "country", next((m["id"] for m in here if system.id in m["systems"]), here[0]["id"] if here else "")
    if country in _sharers(system):
        return "share", here[0]["id"] if here else ""
    linked = next((m["id"] for m in here if system.id in m["linked_systems"]), None)
    return ("linked", linked) if linked else None
