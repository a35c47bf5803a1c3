"""The ranking as one HTML page: the map of the 32, the table with the source of each column, what was left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aifactory_train.advice import map as europe
from aifactory_train.advice.show import asked, number, plan_command
from aifactory_train.core.files import write_atomic
from aifactory_train.core.templates import render

TEMPLATE = Path(__file__).with_name("where.html.j2")


def write_page(answer: dict[str, Any], path: Path) -> None:
    """Write the page; raises :class:`~aifactory_train.core.errors.UserError` where the file cannot be written."""
    write_atomic(path, page(answer), where=f"--html {path}")


def page(answer: dict[str, Any]) -> str:
    """The page as text. No script, no outside resource; every text escaped."""
    left_out: dict[str, list[str]] = {}
    for row in answer["sites"]:
        if not row["fits"]:
            left_out.setdefault(row["why"], []).append(row["id"])
    fits = [row for row in answer["sites"] if row["fits"]]
    return render(
        TEMPLATE,
        autoescape=True,
        answer=answer,
        asked=asked(answer["asked"]),
        fits=fits,
        left_out=left_out,
        **_of_map(answer),
        number=number,
        command=plan_command(answer, fits[0]) if fits else None,
    )


def drawn_map(answer: dict[str, Any]) -> str:
    """The map alone, as a piece of HTML; its classes (``fits``, ``linked``, ``none``, ``grid``, ``link``) are drawn by
    the page's style."""
    return render(TEMPLATE.with_name("map.html.j2"), autoescape=True, **_of_map(answer))


def _of_map(answer: dict[str, Any]) -> dict[str, Any]:
    members = europe.points(answer["sites"])
    return {
        "members": members,
        "links": europe.links(members),
        "graticule": europe.graticule(),
        "width": europe.WIDTH,
        "height": europe.HEIGHT,
    }
