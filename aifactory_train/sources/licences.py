"""The licence gate: may this base and these rows be used for what the run is for, and under what may the result go out?

Every data set and every base model has a licence and an entry in ``recipes/licences.yaml`` that says where that licence
was read. For commercial use (``about.use``, the default) the gate refuses, by name and with the alternative, what is
non-commercial, what carries a clause on the output of the model that wrote it, and what is unknown or was never read.
Research use is asked for by name: ``--research``.

Files of the user's own are never refused for an unknown licence: the gate asks for it, and the record keeps it as
MISSING (record/collect.py) until somebody answers. This is care, not legal advice. Imports neither torch nor pydantic
models.
"""

from __future__ import annotations

import argparse
import functools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aifactory_train.core.errors import UserError

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe

FILE = "licences.yaml"
#: Words for rows that nobody else has rights in, or that a contract covers.
OWN = {"own", "proprietary", "licensed"}
_NOT_COMMERCIAL = re.compile(r"(?:^|[-_ ])nc(?:[-_ ]|$)|non-?commercial|research", re.IGNORECASE)
#: From the least to the most binding: the licence of a result is that of its most binding parent.
_KINDS = ("public-domain", "permissive", "attribution", "share-alike", "non-commercial", "unknown")


@dataclass(frozen=True)
class Parent:
    """One parent of a result, judged.

    ``where`` is the configuration key, ``refused`` the reason why it may not be used commercially (None: it may),
    ``asked`` a question to the user that stops nothing.
    """

    where: str
    source: str
    licence: str
    kind: str
    role: str
    refused: str | None = None
    asked: str | None = None
    alternative: str | None = None
    attribution: str | None = None


# ---- the command line


def add_arguments(parser: argparse._ActionsContainer) -> None:
    """``--commercial`` (default) and ``--research``; the last one counts."""
    parser.add_argument(
        "--commercial",
        dest="use",
        action="store_const",
        const="commercial",
        help="refuse what its licence does not allow commercially (default)",
    )
    parser.add_argument(
        "--research", dest="use", action="store_const", const="research", help="research use only: nothing is refused"
    )


def overrides(args: argparse.Namespace) -> list[str]:
    """The ``--set`` list of ``args`` with the use that was asked for."""
    use = getattr(args, "use", None)
    return [*args.overrides, *([f"about.use={use}"] if use else [])]


# ---- judging


@functools.lru_cache(maxsize=1)
def known() -> dict[str, Any]:
    """``recipes/licences.yaml``: ``{"read": date, "licences": {...}, "sources": {...}}``."""
    from aifactory_train.config.loading import RECIPES_DIR
    from aifactory_train.core import yaml_text

    return yaml_text.read(RECIPES_DIR / FILE).value


def parents(recipe: Recipe) -> list[Parent]:
    """The base model, every source of rows and the teacher, each with what its licence allows. Reads no data and no
    network.
    """
    named = [(option.base, option.licence) for option in recipe.model.options]
    by_recipe = (recipe.model.base, recipe.model.licence) in named
    found = [_judge("model", recipe.model.base, recipe.model.licence, "base", by_recipe)]
    for role, sources in (("train", recipe.data.train), ("eval", recipe.data.eval or [])):
        found += [_judge(f"data.{role}.{i}", s.source, s.licence, role) for i, s in enumerate(sources)]
    teacher = recipe.methods.distill
    if teacher is not None:
        found.append(_judge("methods.distill", teacher.teacher, teacher.licence, "teacher"))
    return found


def _judge(where: str, source: str, stated: str, role: str, by_recipe: bool = False) -> Parent:
    """``by_recipe``: the licence came along with the name, so nobody says that he has read it."""
    from aifactory_train.sources import parse

    spec = parse(source)
    name = source.partition("#")[0]
    entry = known()["sources"].get(name) if spec.kind != "local" else None
    licence, contradiction = stated, None
    if entry is not None and stated in ("unknown", entry["licence"]):
        licence = entry["licence"]
    elif entry is not None and entry["basis"] == "recalled":
        entry = None  # somebody who read it knows better than a note from memory
    elif entry is not None and stated.lower() not in OWN:
        contradiction = f"{stated} is stated, but its own page or package says {entry['licence']}"
    terms = _terms(licence)
    alternative = (entry or {}).get("alternative")
    says = (entry or {}).get("says") or (terms or {}).get("says") or ""
    kind = (terms or {}).get("kind", "unknown")
    refused, asked = contradiction, None
    if contradiction:
        alternative = None
    elif (
        (entry or {}).get("commercial") is False
        or (terms and not terms["commercial"])
        or _NOT_COMMERCIAL.search(licence)
    ):
        kind = "non-commercial"
        refused = f"{licence} does not allow commercial use" + (f" ({says})" if says else "")
    elif (entry or {}).get("derived_output") or (terms or {}).get("derived_output"):
        refused = f"{licence} with a clause on model output" + (f": {says}" if says else "")
    elif spec.kind == "local":
        if licence.lower() == "unknown":
            asked = f"whose is {where}? Say it with --set {where}.licence=own (or its SPDX id); the record says MISSING"
        kind = "own" if licence.lower() in OWN else kind
    elif entry is None and spec.kind in ("pypi", "npm") and _other_version(name):
        refused = f"its licence was read for {_other_version(name)}, not for this version"
    elif licence.lower() in ("unknown", "other") or (terms is None and licence.lower() not in OWN):
        refused = f"its licence is {'not known' if licence == 'unknown' else repr(licence) + ', which nobody has read'}"
        refused += f" ({says})" if says else ""
    elif entry is not None and entry["basis"] == "recalled" and (stated == "unknown" or by_recipe):
        refused = f"its licence ({licence}) was never checked"
    elif entry is None or entry["basis"] == "recalled":
        asked = f"{where}: '{source}' is taken as {licence} because you say so; nobody has read it here"
    return Parent(where, source, licence, kind, role, refused, asked, alternative, (entry or {}).get("attribution"))


def _terms(licence: str) -> dict[str, Any] | None:
    """What is known of a licence by its name, whatever its case."""
    table = {name.lower(): terms for name, terms in known()["licences"].items()}
    return table.get(licence.lower())


def _other_version(name: str) -> str | None:
    """The version of the same package whose licence was read, if it was another one."""
    package = re.split(r"==|(?<=.)@(?=[^@/]*$)", name)[0]
    return next((k for k in known()["sources"] if re.split(r"==|(?<=.)@(?=[^@/]*$)", k)[0] == package), None)


def gate(recipe: Recipe) -> None:
    """:func:`check` for a command: the lines go to standard error, once for all ranks."""
    import os

    from aifactory_train.core.output import note

    lines = check(recipe)
    if int(os.environ.get("RANK", "0")) == 0:
        for line in lines:
            note(line)


def check(recipe: Recipe) -> list[str]:
    """Lines to show a person. Raises :class:`UserError` if the use is commercial and a parent does not allow it."""
    found = parents(recipe)
    bad = [p for p in found if p.refused]
    if bad and recipe.about.use == "commercial":
        first = {p.source: p for p in reversed(bad)}  # one line a source, however often it is read
        reported = "; ".join(f"'{p.source.partition('#')[0]}': {p.refused}" for p in reversed(first.values()))
        instead = [p.alternative for p in reversed(first.values()) if p.alternative]
        stated = f"state a licence that you have read with --set {bad[0].where}.licence=SPDX-ID"
        raise UserError(
            f"not for commercial use: {reported}",
            where=", ".join(dict.fromkeys(p.where for p in bad)),
            fix=(f"use {', or '.join(instead)}; " if instead else f"{stated}; ")
            + "or --research if it is research only",
        )
    lines = [p.asked for p in found if p.asked]
    lines += [f"research use only: '{p.source.partition('#')[0]}': {p.refused}" for p in bad]
    return list(dict.fromkeys(lines))


# ---- the result


def result_licence(recipe: Recipe) -> dict[str, Any]:
    """Under what the result may go out, computed from its parents.

    Whether weights are a derived work of their data is open in law; this takes the careful reading, in which they are.
    Returns ``{"licence": SPDX id or "other", "name": None or words, "because": text, "attribution": [lines],
    "commercial": bool}``. The base's licence is the result's where nothing else binds; one share-alike licence decides;
    two different ones cannot both be met, and that is said.
    """
    found = [p for p in parents(recipe) if p.role != "eval"]
    credit = list(dict.fromkeys(p.attribution for p in found if p.attribution))
    licences = list(dict.fromkeys(p.licence for p in found))
    commercial = not any(p.refused for p in found)
    answer = {"attribution": credit, "commercial": commercial}

    def other(name: str, because: str) -> dict[str, Any]:
        return {"licence": "other", "name": name, "because": because, **answer}

    bound = [p for p in found if p.kind == "non-commercial"]
    if bound:
        names = ", ".join(dict.fromkeys(p.licence for p in bound))
        return other("non-commercial", f"a parent is non-commercial ({names})")
    unknown = [p for p in found if p.kind in ("unknown", "own")]
    if unknown:
        asked = ", ".join(dict.fromkeys(p.where for p in unknown))
        return other("see-parents", f"the owner of {asked} decides; the table lists the parents")
    shared = list(dict.fromkeys(_family(p.licence) for p in found if p.kind == "share-alike"))
    if len(shared) > 1:
        return other("conflicting-share-alike", f"{' and '.join(shared)} cannot both be met: choose one of the sources")
    if shared:
        which = _stricter([p.licence for p in found if p.kind == "share-alike"])
        return {"licence": which, "name": None, "because": f"share-alike of {which}", **answer}
    base = found[0]
    if any(p.licence.startswith("LicenseRef-") or p.kind == "attribution" for p in found if p is not base):
        terms = ", ".join(x for x in licences if x != base.licence)
        because = f"the base's licence; credit and terms of {terms} go along"
    else:
        because = "the base's licence; the rows ask for no more than their notices"
    if base.licence.startswith("LicenseRef-"):
        return other(base.licence, because)
    return {"licence": base.licence, "name": None, "because": because, **answer}


def _family(licence: str) -> str:
    """Licences of one family can be met together: LGPL text inside a GPL result."""
    return "GPL-3.0" if licence.lower().startswith(("gpl-3.0", "lgpl-3.0")) else licence


def _stricter(licences: list[str]) -> str:
    """The one that meets all of one family: the GPL before the LGPL, 'only' before 'or later'."""
    if len(set(licences)) == 1:
        return licences[0]
    return "GPL-3.0-only" if any(x.endswith("-only") for x in licences) else "GPL-3.0-or-later"
