"""All sites ranked for one job: who can do it, how long, for how much, and whether this user gets in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aifactory_train.advice.routes import Applicant, Need, near, routes_to
from aifactory_train.advice.sizing import Demand, Fit, NoFit, Sizer
from aifactory_train.sites.fleet import load_all
from aifactory_train.sites.index import load_index

if TYPE_CHECKING:
    from aifactory_train.sites.system import System


@dataclass(frozen=True)
class Wishes:
    """What the user asks beside the job. ``deadline_hours`` counts from the job's start: how long a queue holds it
    nobody publishes."""

    applicant: Applicant = field(default_factory=Applicant)
    deadline_hours: float | None = None
    budget_gpu_hours: float | None = None
    sensitive: bool = False


#: Why a site is left out, the kind that is the easiest to change first.
REASONS = ("deadline", "budget", "limits", "memory", "access", "data", "facts", "status")
_NEAR = {"country": 0, "share": 0, "linked": 1}
_READY = {"reported": 0, "run": 1, "twin": 2}


def rank(job: Demand, wishes: Wishes) -> list[dict[str, Any]]:
    """A row a system, the best first; the keys of ``aifactory where --json``.

    Those that fit come first: by open routes before those to be asked about, near ones (of the user's country, or of a
    factory that the country's antenna is linked to) before others, then by what was tried there, hours and GPU-hours.
    The others follow by the kind of their reason.
    """
    sizer = Sizer(job, wishes.deadline_hours, wishes.budget_gpu_hours)
    rows = [_row(system, sizer.of(system), wishes) for system in load_all()]
    there = {row["id"] for row in rows}
    named = {s for m in load_index()["members"] for key in ("announced", "unsuitable") for s in m[key]}
    rows += [_without(s) for s in load_index()["systems"] if s["id"] in named - there]
    rows.sort(key=_order)
    return [{"id": row["id"], "rank": i, **row} for i, row in enumerate(rows, start=1)]


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    if not row["fits"]:
        return 1, REASONS.index(row["excluded_by"]), row["id"]
    nearness = _NEAR[row["near"]["how"]] if row["near"] else 2
    never = float("inf")
    hours, gpu_hours = row["hours"], row["gpu_hours"]
    return (
        0,
        all(route["status"] == "ask" for route in row["access"]),
        nearness,
        _READY.get(row["readiness"], 3),
        never if hours is None else hours,
        never if gpu_hours is None else gpu_hours,
        row["id"],
    )


def _row(system: System, sized: Fit | NoFit, wishes: Wishes) -> dict[str, Any]:
    figures = sized.figures if isinstance(sized, Fit) else {}
    need = _need(sized)
    access, closed = routes_to(system, wishes.applicant, need)
    excluded = _excluded(system, sized, wishes, access, closed)
    close = near(system, wishes.applicant.country)
    index = next(s for s in load_index()["systems"] if s["id"] == system.id)
    billed = figures.get("billed")
    return {
        "id": system.id,
        "name": system.name,
        "country": system.country,
        "members": [m["id"] for m in load_index()["members"] if system.id in m["systems"]],
        "fits": excluded is None,
        "why": excluded[1] if excluded else _why(system, sized, wishes),
        "excluded_by": excluded[0] if excluded else None,
        "nodes": sized.nodes if isinstance(sized, Fit) else None,
        "gpus_per_node": sized.gpus_per_node if isinstance(sized, Fit) else None,
        "gpu": system.gpu.model or system.gpu.sku,
        "hours": figures.get("hours"),
        "gpu_hours": figures.get("gpu_hours"),
        "jobs": sized.pieces if isinstance(sized, Fit) else None,
        "billed": {"unit": billed["unit"], "amount": billed["amount"]} if billed else None,
        "kwh": figures.get("kwh"),
        "co2_kg": figures.get("co2_kg"),
        "access": access,
        "closed": closed,
        "near": {"how": close[0], "member": close[1]} if close else None,
        "internet": system.internet.compute,
        "data": _data_rule(system),
        "readiness": index["readiness"],
        "complete": index["complete"],
        "expired": system.expired,
        "sources": _sources(system, index),
    }


def _without(system: dict[str, Any]) -> dict[str, Any]:
    """The row of a system that no job can run on today."""
    return {
        "id": system["id"],
        "name": system["name"],
        "country": system["country"],
        "members": [m["id"] for m in load_index()["members"] if system["id"] in [*m["announced"], *m["unsuitable"]]],
        "fits": False,
        "why": f"{system['status']}: {system['status_reason']}",
        "excluded_by": "status",
        **dict.fromkeys(("nodes", "gpus_per_node", "gpu", "hours", "gpu_hours", "jobs", "billed", "kwh", "co2_kg")),
        "access": [],
        "closed": [],
        **dict.fromkeys(("near", "internet", "data")),
        "readiness": system["readiness"],
        "complete": False,
        "expired": False,
        "sources": {},
    }


def _need(sized: Fit | NoFit) -> Need:
    if not isinstance(sized, Fit) or sized.figures["hours"] is None:
        return Need()
    billed = sized.figures["billed"]
    in_gpu_hours = billed["amount"] if billed and billed["unit"] == "GPU-hours" else None
    return Need(sized.figures["gpu_hours"], in_gpu_hours, sized.nodes * sized.figures["hours"])


def _excluded(
    system: System, sized: Fit | NoFit, wishes: Wishes, access: list[dict[str, Any]], closed: list[str]
) -> tuple[str, str] | None:
    """``(kind, reason)`` where the site is not for this job and user; a reason that rules out all that is planned comes
    before one that a talk with the site may change."""
    if isinstance(sized, NoFit):
        return sized.kind, sized.why
    if not access:
        why = "no route is open to you: " + ("; ".join(closed) or "none of its member leads to this machine")
        close = near(system, wishes.applicant.country)
        return "access", why + (
            f"; {close[1]} is linked to its factory: ask there" if close and close[0] == "linked" else ""
        )
    if wishes.sensitive and system.data.sensitive not in ("allowed", "agreement"):
        rule = _data_rule(system)
        return "data", rule["rule"]
    return None


def _data_rule(system: System) -> dict[str, str]:
    """``{sensitive, rule}``: whether personal data of special categories may go there; the rule of ``unknown`` names
    whom to ask."""
    said = system.data.sensitive
    if said is None:
        ask = system.data.unknown.get("sensitive") or system.help.support or _contact(system)
        return {"sensitive": "unknown", "rule": f"whether sensitive data may go there is not published; ask {ask}"}
    return {"sensitive": said, "rule": system.data.sensitive_rule or said}


def _contact(system: System) -> str:
    from aifactory_train.sites.access import of_member

    return next(
        (of_member(m["id"])["contact"] for m in load_index()["members"] if system.id in m["systems"]), system.operator
    )


def _why(system: System, sized: Fit | NoFit, wishes: Wishes) -> str:
    """What speaks for a site that fits, and what to mind."""
    assert isinstance(sized, Fit)
    found = [f"fits on {sized.nodes} node(s) x {sized.gpus_per_node} GPU(s)"]
    if wishes.deadline_hours is not None:
        found[0] += f", the fewest that finish within {wishes.deadline_hours:g} h"
    if sized.figures["hours"] is None:
        found.append("how long it takes is not known: prepare the data, or give --tokens")
    if sized.pieces > 1:
        found.append(f"{sized.pieces} jobs one after the other under the time limit")
    if system.offline:
        said = "have no internet" if system.internet.compute == "none" else "are not known to have internet"
        found.append(f"compute nodes {said}: fetch before")
    if wishes.sensitive:
        found.append(f"sensitive data: {_data_rule(system)['rule']}")
    if system.expired:
        found.append(f"the profile is past its date ({system.expires})")
    return "; ".join(found)


#: Column -> the facts of a profile that it rests on, the first that is stated.
_RESTS_ON = {
    "memory": ("gpu.memory_gib",),
    "kwh": ("node.power_cap_w", "gpu.tdp_w"),
    "co2_kg": ("energy.grid_g_co2_per_kwh",),
    "billed": ("accounting.per_node_hour", "accounting.per_gpu_hour"),
    "internet": ("internet.compute",),
    "data": ("data.sensitive",),
    "limits": ("partitions",),
}


def _sources(system: System, index: dict[str, Any]) -> dict[str, Any]:
    """Column -> where it comes from; routes carry their own. ``None``: nothing is published."""
    modelled = _source("modelled (docs/planning.md), from the profile's GPU and links", "derived")
    found: dict[str, Any] = {"hours": modelled, "gpu_hours": modelled}
    for column, paths in _RESTS_ON.items():
        if paths == ("partitions",):
            paths = (f"partitions.{system.default_partition}.max_time",) if system.default_partition else ()
        facts = [fact for fact in (system.provenance(path) for path in paths) if fact is not None]
        said = facts[0] if facts else None
        found[column] = said and _source(said.source, said.confidence, said.date, said.url)
    evidence = index["readiness_evidence"]
    found["readiness"] = _source(evidence or "sites/readiness.yaml names no trial", "documented")
    return found


def _source(source: str, confidence: str, date: Any = None, url: str | None = None) -> dict[str, Any]:
    return {"source": source, "confidence": confidence, "date": date and str(date), "url": url}
