"""What the documents share: fields with who fills them, the footer with rule and date, plain Markdown."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aifactory_train.core.missing import has_missing, is_missing, missing
from aifactory_train.core.templates import render

TEMPLATES = Path(__file__).resolve().parent / "templates"
DATA = Path(__file__).resolve().parents[1] / "data"
ALL = ("AIO", "NCA", "DP")
AUTHORITIES = ("AIO", "NCA")
RECIPIENTS = {"AIO": "the AI Office", "NCA": "national competent authorities", "DP": "downstream providers"}


@functools.cache
def legal_basis() -> dict[str, Any]:
    return json.loads((DATA / "legal_basis.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Field:
    """One field of a form. ``fill``: auto, person, base (the base model's provider) or auto+person. ``per`` overrides
    the value for single recipients."""

    number: str
    title: str
    fill: str
    value: Any
    recipients: tuple[str, ...] = ALL
    per: tuple[tuple[str, Any], ...] = ()

    def shown_to(self, recipient: str | None) -> Any:
        return dict(self.per).get(recipient, self.value) if recipient else self.value

    @property
    def status(self) -> str:
        """``auto``, ``person`` (a person has answered), ``partly MISSING`` or ``MISSING``."""
        if is_missing(self.value):
            return "MISSING"
        if has_missing(self.value):
            return "partly MISSING"
        return "person" if self.fill in ("person", "base") else "auto"

    def as_dict(self, recipient: str | None = None) -> dict[str, Any]:
        return {
            "number": self.number,
            "title": self.title,
            "fill": self.fill,
            "status": self.status,
            "value": self.shown_to(recipient),
        }


def text_of(value: Any) -> str:
    """A value as Markdown text of one cell or paragraph."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, dict):
        return "; ".join(f"{k.replace('_', ' ')}: {text_of(v)}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(text_of(v) for v in value) if value else "none"
    return str(value)


_MARKS = str.maketrans({"\\": "\\\\", "<": "&lt;", "[": "\\[", "]": "\\]", "`": "\\`"})
#: What makes a heading, a list, a quotation or a line of a paragraph's beginning.
_BEGINS = re.compile(r"^([#>=~]|[-+*](?=[\s*-]|$)|\d+(?=[.)](?:\s|$)))")


def inline(value: Any) -> str:
    """A value as one line of Markdown text that stays text: no tags, links or code, no new paragraph, heading or
    list.
    """
    text = " ".join(text_of(value).split()).translate(_MARKS)
    return _BEGINS.sub(lambda found: f"{found[1]}\\" if found[1].isdigit() else f"\\{found[1]}", text)


def cell(value: Any) -> str:
    """As :func:`inline`, for a cell of a table."""
    return inline(value).replace("|", "\\|")


def markdown(template: str, **values: Any) -> str:
    """A document of ``templates/``, with :func:`inline` and :func:`cell` for texts from outside."""
    return render(TEMPLATES / f"{template}.md.j2", inline=inline, cell=cell, **values)


def footer(rule: str, record: dict[str, Any]) -> str:
    """Rule, its version, since when, where its text was taken from, and what this document is not."""
    basis, run = legal_basis(), record.get("run", {})
    return markdown(
        "footer",
        basis=basis,
        rule=basis["rules"][rule],
        version=run.get("code", {}).get("version", "?"),
        run=run.get("id", "?"),
        log=record["log"],
    )


def form_markdown(title: str, intro: str, fields: Iterable[Field], recipient: str | None = None) -> str:
    """A form as headings and tables; sections by the first part of the number."""
    return markdown("form", title=title, intro=intro, fields=fields, recipient=recipient)


def get(record: dict[str, Any], place: str, who: str = "run: not recorded") -> Any:
    """The value at ``a/b/c``, or MISSING."""
    node: Any = record
    for part in place.split("/"):
        if not isinstance(node, dict) or part not in node:
            return missing(who)
        node = node[part]
    return missing(who) if node is None else node


def names(values: Iterable[Any]) -> list[Any]:
    """Distinct values in their order."""
    found: list[Any] = []
    for value in values:
        for one in value if isinstance(value, list) else [value]:
            if one not in found:
                found.append(one)
    return found
