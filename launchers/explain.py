"""Why each line of a script is there, and which fact it rests on.

Directives, variables, modules and options carry their own reason from :mod:`build`. Every other line belongs to a block
of the template, and the comment above the block is its reason: people and this module read the same sentence.
"""

from __future__ import annotations

from dataclasses import dataclass

from aifactory_train.launchers.submission import Submission


@dataclass(frozen=True)
class Explained:
    number: int
    text: str
    why: str
    fact: str | None = None
    source: str | None = None

    def as_dict(self) -> dict[str, object]:
        return {k: v for k, v in vars(self).items() if v is not None}


def explain(sub: Submission) -> list[Explained]:
    """One entry per line that is neither blank nor a comment."""
    out: list[Explained] = []
    block = ""
    previous_comment = False
    for number, text in enumerate(sub.script.splitlines(), 1):
        stripped = text.strip()
        if not stripped:
            previous_comment = False
            continue
        # A directive looks like a comment, but it has its own reason.
        if stripped.startswith("#") and not stripped.startswith("#!") and stripped not in sub.lines:
            if "shellcheck" in stripped:
                continue
            said = stripped.lstrip("# ")
            block = f"{block} {said}" if previous_comment else said
            previous_comment = True
            continue
        previous_comment = False
        line = sub.lines.get(stripped)
        if line is None:
            out.append(Explained(number, text, block or "structure of the script"))
            continue
        source = None
        if line.fact:
            fact = sub.system.provenance(line.fact) if _stated(sub, line.fact) else None
            source = "not published" if fact is None else f"{fact.source}, {fact.date}, {fact.confidence}"
        out.append(Explained(number, text, line.why, line.fact, source))
    return out


def _stated(sub: Submission, path: str) -> bool:
    from aifactory_train.sites.profiles import dig

    try:
        return dig(sub.system, path) is not None
    except (KeyError, ValueError):
        return False


def render(sub: Submission) -> str:
    """For people: the line, then its reason and source, indented."""
    out = []
    for item in explain(sub):
        out.append(item.text)
        fact = f"  [{item.fact}: {item.source}]" if item.source else f"  [{item.fact}]" if item.fact else ""
        out.append(f"        {item.why}{fact}")
    return "\n".join(out)
