"""The result of an acceptance as a tree for ``acceptance.json`` and as one page without anything from elsewhere."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.acceptance import facts
from aifactory_train.acceptance.checks import BY_NAME
from aifactory_train.acceptance.report import STATUSES
from aifactory_train.core.files import write_atomic

if TYPE_CHECKING:
    from aifactory_train.acceptance.running import Acceptance
    from aifactory_train.sites.system import System

FORMAT = 1
TEMPLATE = Path(__file__).resolve().parent / "page.html.j2"


def summary(acceptance: Acceptance, system: System | None) -> dict[str, Any]:
    """``acceptance.json``: ``checks`` are ``{name, status, seconds, figures, why}`` in order of value; ``facts`` say
    what of the site's profile this machine confirms or contradicts."""
    machine, checks = acceptance.machine, acceptance.results
    gpus = machine.get("gpus") or []
    counts = {status: sum(result["status"] == status for result in checks) for status in STATUSES}
    return {
        "format": FORMAT,
        "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "quick": acceptance.quick,
        "site": system.id if system else None,
        "chip": (gpus[0]["device"] or gpus[0]["name"]) if gpus else None,
        "gpus": len(gpus),
        "versions": machine.get("versions") or {},
        "machine": {key: machine.get(key) for key in ("host", "runtime", "gpus")},
        "checks": checks,
        "facts": facts.compare(system, machine) if system and machine else [],
        "totals": {**counts, "seconds": round(time.monotonic() - acceptance.began, 1)},
    }


def render(found: dict[str, Any]) -> str:
    """The page as text; every value is escaped by the template."""
    from markupsafe import Markup

    from aifactory_train.core.templates import render as filled
    from aifactory_train.report.page_parts import page

    shows = {name: check.shows for name, check in BY_NAME.items()}
    body = filled(TEMPLATE, autoescape=True, **found, shows=shows, lines=figure_lines)
    host = found["machine"].get("host", {}).get("name") or "a machine"
    return page("body.html.j2", f"Acceptance of {host}", body=Markup(body))


def write(path: Path, found: dict[str, Any]) -> None:
    write_atomic(path, render(found))


def figure_lines(figures: dict[str, Any]) -> list[str]:
    """Figures, one line each."""
    return [f"{key}: {value if isinstance(value, str) else json.dumps(value)}" for key, value in figures.items()]
