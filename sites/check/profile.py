"""One profile: its schema, identity, sources, and that nothing private stands in it; then the rules of a usable
system.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.sites.catalogue import shared_sources
from aifactory_train.sites.centres import with_centre
from aifactory_train.sites.check.faults import CheckReport, Fault, at, keys_of
from aifactory_train.sites.check.rules import RULES
from aifactory_train.sites.confirmed import single
from aifactory_train.sites.paths import covering, dig, fact_leaves, leaves
from aifactory_train.sites.reading import read_yaml
from aifactory_train.sites.resolving import name_gpu, resolve
from aifactory_train.sites.schema import FACT_SECTIONS, Source
from aifactory_train.sites.system import System


def check_file(path: Path, today: datetime.date | None = None) -> CheckReport:
    """The faults of one profile, shipped or a user's own."""
    report = CheckReport(faults=[])
    check_system(path, report, today)
    return report


def check_system(path: Path, report: CheckReport, today: datetime.date | None = None) -> System | None:
    """Append the faults of one profile file to ``report``; returns the system where it could be read."""
    today = today or datetime.date.today()
    faults = report.faults
    try:
        raw = read_yaml(path)
    except UserError as error:
        faults.append(Fault("yaml", error.where or path.name, error.what, error.fix))
        return None
    try:
        system = resolve(raw, path)
    except UserError as error:
        name = "arch" if "architecture name" in error.what else "schema"
        faults.append(Fault(name, error.where or path.name, error.what, error.fix))
        return None
    raw = with_centre(raw)
    name_gpu(raw)
    report.systems += 1
    faults.extend(_identity(system, path, today))
    faults.extend(_provenance(system, raw, path, report, today))
    faults.extend(_private(raw, path))
    if not system.usable:
        stated = [s for s in FACT_SECTIONS if raw.get(s)]
        if stated:
            faults.append(
                Fault(
                    "not-usable-fact",
                    at(path, stated[0]),
                    f"{system.id} is {system.status} but states {', '.join(stated)}",
                    "what is announced goes into notes",
                )
            )
        return system
    report.complete += system.complete
    report.single[system.id] = single(system)
    faults.extend(_confirmed(system, path))
    for rule in RULES:
        faults.extend(rule(system, path))
    return system


def _identity(system: System, path: Path, today: datetime.date) -> Iterator[Fault]:
    if path.stem != system.id:
        yield Fault(
            "file-name", at(path, "id"), f"the profile '{system.id}' lies in {path.name}", f"name it {system.id}.yaml"
        )
    if not system.maintainer.strip():
        yield Fault(
            "maintainer", at(path, "maintainer"), "the maintainer line is empty", "name a person, team or 'nobody yet'"
        )
    if system.expires < today:
        yield Fault(
            "expired", at(path, "expires"), f"expired on {system.expires}", "read its sources again and set a new date"
        )
    if not system.usable and not (system.status_reason or "").strip():
        yield Fault(
            "status-reason", at(path, "status"), f"{system.status}, but no status_reason", "say why, in a few words"
        )
    if system.usable:
        want, have = set(system.core_missing()), {m for m in system.missing if "." not in m}
        if want != have:
            lacking, surplus = sorted(want - have), sorted(have - want)
            reported = [f"not listed: {', '.join(lacking)}"] if lacking else []
            reported += [f"listed but known: {', '.join(surplus)}"] if surplus else []
            yield Fault("missing-list", at(path, "missing"), "; ".join(reported), f"missing: {sorted(want)}")
        for dotted in (m for m in system.missing if "." in m):
            try:
                value = dig(system, dotted)
            except (KeyError, ValueError):
                yield Fault("missing-list", at(path, "missing"), f"'{dotted}' is no path of the schema")
                continue
            if value not in (None, [], {}):
                yield Fault("missing-list", at(path, "missing"), f"'{dotted}' is listed but holds a value")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _provenance(
    system: System, raw: dict[str, Any], path: Path, report: CheckReport, today: datetime.date
) -> Iterator[Fault]:
    shared = shared_sources()
    known = {**shared, **system.sources}
    table = {p: entry for entry in system.facts for p in entry.at}
    # Durations are written as text ("48h") and are numbers all the same: the resolved value decides.
    for dotted, _ in fact_leaves(raw):
        value = dig(system, dotted)
        numeric = _is_number(value) or (isinstance(value, list) and any(_is_number(v) for v in value))
        report.facts += 1
        report.numeric_facts += numeric
        entry = covering(dotted, table)
        if entry is None:
            yield Fault(
                "no-source", at(path, *keys_of(dotted)), f"{dotted} has no source", "add its path to an entry of facts:"
            )
            continue
        source = known.get(entry.source)
        if source is None:
            continue  # reported once below
        report.covered += 1
        report.numeric_covered += bool(numeric and source.date and entry.confidence)
        if entry.confidence == "recalled" and not dotted.startswith("gpu."):
            yield Fault(
                "recalled",
                at(path, *keys_of(dotted)),
                f"{dotted} is remembered; only GPU constants may be",
                "leave it out, list it under missing:, put it into a note",
            )
    stated = [("facts", i, fact.source) for i, fact in enumerate(system.facts)]
    stated += [("notes", i, note.source) for i, note in enumerate(system.notes)]
    for block, i, name in stated:
        if name not in known:
            yield Fault(
                "unknown-source",
                at(path, block, i),
                f"the source '{name}' is not defined{did_you_mean(name, known)}",
                "define it under sources:, or use one of sources.yaml",
            )
    for i, fact in enumerate(system.facts):
        for dotted in fact.at:
            try:
                value = dig(system, dotted)
            except (KeyError, ValueError):
                value = None
            if value in (None, [], {}):
                yield Fault("unused-fact", at(path, "facts", i), f"facts names '{dotted}', which holds no value")
    for name, source in system.sources.items():
        yield from dated(name, source, path, today)
        if name in shared:
            yield Fault("unknown-source", at(path, "sources", name), f"'{name}' is defined in sources.yaml already")


def _confirmed(system: System, path: Path) -> Iterator[Fault]:
    known = {**shared_sources(), **system.sources}
    first = {fact.path: fact.source_id for fact in system.stated_facts()}
    for i, entry in enumerate(system.confirmed):
        place = at(path, "confirmed", i)
        if entry.source not in known:
            close = did_you_mean(entry.source, known)
            yield Fault("second-source", place, f"the source '{entry.source}' is not defined{close}")
        for dotted in entry.at:
            below = [p for p in first if p == dotted or p.startswith(dotted + ".")]
            if not below:
                yield Fault("second-source", place, f"confirmed names '{dotted}', which holds no fact")
            elif all(first[p] == entry.source for p in below):
                yield Fault(
                    "second-source", place, f"'{dotted}' is from '{entry.source}' already: that is no second one"
                )


def dated(name: str, source: Source, path: Path, today: datetime.date) -> Iterator[Fault]:
    if source.date == "n.d." and not source.retrieved:
        yield Fault(
            "undated",
            at(path, "sources", name),
            f"the source '{name}' has no date",
            "add retrieved: <day you read it>",
        )
    for value in (source.date, source.retrieved):
        if value and value != "n.d." and value > today.isoformat()[: len(value)]:
            yield Fault(
                "future-date", at(path, "sources", name), f"the source '{name}' is dated {value}, today is {today}"
            )


#: What must not stand in a profile: somebody's home, a secret, a command.
_PRIVATE = (
    (re.compile(r"/(?:home|users|u)/(?!\{|\$|<)[a-z][a-z0-9._-]+", re.I), "a user's path"),
    (re.compile(r"\$\(|`|;\s*(?:rm|export|source|bash)\b|&&\s|\|\s*(?:sh|bash)\b"), "code"),
    (re.compile(r"(?:hf|ghp|sk)_[A-Za-z0-9]{16,}|BEGIN [A-Z ]*PRIVATE KEY"), "a secret"),
)


def _private(raw: dict[str, Any], path: Path) -> Iterator[Fault]:
    for section in FACT_SECTIONS:
        for dotted, value in leaves(raw.get(section) or {}, section):
            if dotted.endswith(("notes", "note", "login_notes")) or "avoid." in dotted:
                continue  # prose
            for text in value if isinstance(value, list) else [value]:
                for pattern, what in _PRIVATE:
                    if isinstance(text, str) and not dotted.startswith("detect.") and pattern.search(text):
                        yield Fault(
                            "private",
                            at(path, *keys_of(dotted)),
                            f"{dotted} holds {what}: {text!r}",
                            "it belongs into an overlay",
                        )
