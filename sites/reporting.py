"""``aifactory sites report``: from what a machine showed to the files of a pull request.

Read is an ``acceptance.json`` or the record of a finished run. What leaves this machine is picked, not filtered: names
of checks, their status, numbers, versions, and which facts of the profile were seen. Accounts, users, job numbers,
host names, paths, recipes of one's own and texts of logs are not among it.
"""

from __future__ import annotations

import datetime
import json
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aifactory_train.core import yaml_text
from aifactory_train.core.errors import UserError
from aifactory_train.sites.catalogue import READINESS
from aifactory_train.sites.check import check_file, check_readiness
from aifactory_train.sites.paths import fact_leaves
from aifactory_train.sites.reading import read_yaml
from aifactory_train.sites.resolving import readiness_of, resolve
from aifactory_train.sites.schedulers import SCHEDULERS
from aifactory_train.sites.schema import Overlay
from aifactory_train.sites.system import System

#: Statuses of a check, as an acceptance writes them.
STATUSES = ("PASS", "FAIL", "SKIP")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._+-]{0,60}")
#: Facts that a report may speak of; anything else in a file of this name is not of an acceptance.
FACT = re.compile(r"(node|gpu|interconnect|software|scheduler|energy)(\.\w+)+")


@dataclass
class Evidence:
    """What was seen, without anything of the user's."""

    kind: str  # acceptance | run
    site: str | None
    date: str  # YYYY-MM-DD
    why_not: str  # why it says nothing of the readiness; empty where it does
    summary: str
    versions: dict[str, str] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)  # name, status, seconds, figures (numbers alone)
    facts: list[dict[str, Any]] = field(default_factory=list)  # fact, profile, observed, verdict
    figures: dict[str, float] = field(default_factory=dict)


def read_evidence(path: Path) -> Evidence:
    """An ``acceptance.json`` (or the folder that holds one), a ``record.json`` or a run folder. Raises UserError."""
    for name in ("acceptance.json", "record.json"):
        if path.is_dir() and (path / name).is_file():
            path = path / name
            break
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        what = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(
            f"cannot be read: {what}", where=str(path), fix="acceptance.json, or the folder of a run"
        ) from None
    if isinstance(data, dict) and isinstance(data.get("checks"), list):
        return _of_acceptance(data, path)
    if isinstance(data, dict) and isinstance(data.get("run"), dict) and isinstance(data.get("compute"), dict):
        return _of_record(data, path)
    raise UserError(
        "neither an acceptance nor the record of a run",
        where=str(path),
        fix="what 'aifactory accept' wrote (acceptance.json), or the folder of a finished run",
    )


def _of_acceptance(data: dict[str, Any], path: Path) -> Evidence:
    checks = []
    for check in data["checks"]:
        if not isinstance(check, dict) or check.get("status") not in STATUSES or not _plain(check.get("name")):
            raise UserError(f"a check needs a name and one of {', '.join(STATUSES)}", where=f"{path}: checks")
        figures = {k: v for k, v in (check.get("figures") or {}).items() if _plain(k) and _number(v)}
        seconds = check.get("seconds") if _number(check.get("seconds")) else None
        checks.append({"name": check["name"], "status": check["status"], "seconds": seconds, "figures": figures})
    counts = {status: sum(c["status"] == status for c in checks) for status in STATUSES}
    failed = [c["name"] for c in checks if c["status"] == "FAIL"]
    gpus = data.get("gpus")
    why_not = "a check failed" if failed else "no check passed" if not counts["PASS"] else ""
    if not why_not and not (isinstance(gpus, int) and gpus > 0):
        why_not = "no GPU was there"
    said = f"aifactory accept: {counts['PASS']} passed, {counts['FAIL']} failed, {counts['SKIP']} left out"
    facts = [
        {key: row.get(key) for key in ("fact", "profile", "observed", "verdict")}
        for row in data.get("facts") or []
        if isinstance(row, dict) and FACT.fullmatch(str(row.get("fact"))) and _value(row.get("observed"))
    ]
    return Evidence(
        "acceptance",
        data.get("site") if _plain(data.get("site")) else None,
        _day(data.get("written"), path),
        why_not,
        said + (f" ({', '.join(failed)})" if failed else ""),
        _versions(data.get("versions")),
        checks,
        facts,
    )


def _of_record(data: dict[str, Any], path: Path) -> Evidence:
    run, compute = data["run"], data["compute"]
    device, totals = compute.get("device") or {}, compute.get("totals") or {}
    states = [a.get("state") for _, a in sorted((compute.get("attempts") or {}).items())]
    finished = bool(states) and states[-1] == "finished"
    site = str(run.get("host_site"))
    count, nodes = device.get("count") or 0, device.get("nodes") or 1
    said = f"a training {'finished' if finished else 'that did not finish'} on {nodes} node(s), {count} device(s)"
    scheduler = (run.get("scheduler") or {}).get("name")
    seen = {
        # A process outside any job (a login node, an ssh to a node) does not say that the site has no scheduler.
        "scheduler.kind": scheduler if _told_by_jobs(scheduler) else None,
        "gpu.vendor": device.get("vendor"),
        "node.gpus": count // nodes if device.get("kind") != "cpu" and count and count % nodes == 0 else None,
    }
    figures = {k: totals[k] for k in ("steps", "wall_s", "device_hours", "restarts", "mfu") if _number(totals.get(k))}
    facts = [{"fact": k, "profile": None, "observed": v, "verdict": None} for k, v in seen.items() if v is not None]
    return Evidence(
        "run",
        site if NAME.fullmatch(site) and not site.startswith("MISSING") else None,
        _day(run.get("created"), path),
        "it did not finish" if not finished else "no GPU was there" if device.get("kind") == "cpu" else "",
        said,
        _versions(run.get("versions")),
        [],
        facts,
        figures,
    )


def _told_by_jobs(kind: Any) -> bool:
    """Whether a job can tell this kind of scheduler from the others."""
    return kind in SCHEDULERS and SCHEDULERS[kind].variables is not None


def _plain(value: Any) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _value(value: Any) -> bool:
    """A number, a short plain text, or a list of such: nothing that could be a path or an address."""
    if isinstance(value, list):
        return all(_value(v) for v in value)
    return _number(value) or (isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9 ()._+-]{1,60}", value) is not None)


def _versions(versions: Any) -> dict[str, str]:
    given = versions if isinstance(versions, dict) else {}
    return {k: v for k, v in given.items() if _plain(k) and _plain(v)}


def _day(text: Any, path: Path) -> str:
    day = str(text)[:10]
    try:
        datetime.date.fromisoformat(day)
    except ValueError:
        raise UserError(f"'{day}' is no date", where=str(path), fix="a file that aifactory wrote") from None
    return day


def judge(evidence: Evidence, system: System) -> None:
    """Compare the facts of a run with the profile, in place; an acceptance brings its verdicts along."""
    stated = {fact.path: fact.value for fact in system.stated_facts()}
    for row in evidence.facts:
        if row["verdict"] is None:
            row["profile"] = stated.get(row["fact"])
            same = row["profile"] == row["observed"]
            part = row["fact"] == "node.gpus" and row["profile"] and row["observed"] < row["profile"]
            # Jobs of Torque see the names of PBS.
            part = part or (row["fact"] == "scheduler.kind" and not _told_by_jobs(row["profile"] or row["observed"]))
            row["verdict"] = "not seen" if part else "confirmed" if same else "new"
            if row["verdict"] == "new" and row["profile"] is not None:
                row["verdict"] = "contradicted"


def files(evidence: Evidence, system: System, profile: Path, readiness: Path = READINESS) -> dict[str, str]:
    """The files of the pull request by their path in the project: profile, readiness, differences, description.

    Raises UserError where the profile with the confirmed facts would not pass its check.
    """
    out = {}
    raw = read_yaml(profile)
    own = {path for path, _ in fact_leaves(raw)}
    seen = {row["fact"] for row in evidence.facts if row["verdict"] == "confirmed"}
    confirmed = [path for path in sorted(own) if path in seen]
    if confirmed:
        out[f"sites/systems/{profile.name}"] = with_facts(profile.read_text(encoding="utf-8"), raw, evidence, confirmed)
    if not evidence.why_not:
        out["sites/readiness.yaml"] = with_readiness(readiness.read_text(encoding="utf-8"), system, evidence)
    for row in evidence.facts:
        if row["verdict"] in ("contradicted", "new") and not _taken(raw, profile, row):
            row["verdict"] = "no fact"
    changed = {r["fact"]: r["observed"] for r in evidence.facts if r["verdict"] in ("contradicted", "new")}
    if changed:
        out["differences.yaml"] = yaml_text.dump({"overlay_for": system.id, "corrections": changed})
    out["PULL_REQUEST.md"] = description(evidence, system, confirmed)
    _prove(out, profile, system)
    return out


def _taken(raw: dict[str, Any], profile: Path, row: dict[str, Any]) -> bool:
    """Whether a profile can hold what was seen: differences are an overlay that must load."""
    try:
        resolve(raw, profile, Overlay(overlay_for=raw["id"], corrections={row["fact"]: row["observed"]}))
    except UserError:
        return False
    return True


def with_facts(text: str, raw: dict[str, Any], evidence: Evidence, confirmed: list[str]) -> str:
    """A profile's text with one source and one entry of ``facts:`` more; every other line stays as it is."""
    name = f"reported-{evidence.date}"
    while name in (raw.get("sources") or {}):
        name += "-b"
    source = f'{{title: "report of a user, {evidence.summary}", date: {evidence.date}}}'
    lines = text.rstrip("\n").split("\n")
    lines = _into(lines, "sources", f"{name}: {source}", first=True)
    entry = f"- {{at: [{', '.join(confirmed)}], source: {name}, confidence: probed}}"
    return "\n".join(_into(lines, "facts", entry, first=False)) + "\n"


def _into(lines: list[str], key: str, entry: str, first: bool) -> list[str]:
    """``lines`` with ``entry`` at the beginning or the end of a top-level key's block, made where it is not there."""
    start = next((i for i, line in enumerate(lines) if line.rstrip() == f"{key}:"), None)
    if start is None:
        return [*lines, f"{key}:", f"  {entry}"]
    end = start + 1
    while end < len(lines) and (not lines[end].strip() or lines[end].startswith((" ", "-", "#"))):
        end += 1
    while not lines[end - 1].strip():
        end -= 1
    block = [line for line in lines[start + 1 : end] if line.strip() and not line.lstrip().startswith("#")]
    indent = block[0][: len(block[0]) - len(block[0].lstrip())] if block else "  "
    place = start + 1 if first else end
    return [*lines[:place], indent + entry, *lines[place:]]


def with_readiness(text: str, system: System, evidence: Evidence) -> str:
    """``readiness.yaml`` with this system's entry made new, in the order of the ids."""
    said = evidence.summary.replace('"', "'")
    line = f'  {system.id}: {{level: reported, date: {evidence.date}, evidence: "{said}"}}'
    lines = text.rstrip("\n").split("\n")
    mine = [i for i, old in enumerate(lines) if re.match(rf"  {re.escape(system.id)}:", old)]
    if mine:
        lines[mine[0]] = line
    else:
        entries = [i for i, old in enumerate(lines) if re.match(r"  [a-z0-9-]+:", old)]
        after = [i for i in entries if lines[i].strip() < line.strip()]
        lines.insert((after[-1] if after else entries[0] - 1 if entries else len(lines) - 1) + 1, line)
    return "\n".join(lines) + "\n"


def description(evidence: Evidence, system: System, confirmed: list[str]) -> str:
    """What the pull request says, and all that it says of the machine."""
    level, _ = readiness_of(system)
    out = [
        f"# {system.name} ({system.id}): {evidence.summary}",
        "",
        f"Date: {evidence.date}. Readiness so far: {level}.",
    ]
    if evidence.why_not:
        out.append(f"No readiness entry: {evidence.why_not}.")
    titles = {
        "confirmed": "Confirmed",
        "contradicted": "Different",
        "new": "New",
        "no fact": "Nothing that a profile holds",
    }
    for verdict, title in titles.items():
        rows = [r for r in evidence.facts if r["verdict"] == verdict]
        if rows:
            out += ["", f"## {title}", ""]
            said = {
                "confirmed": "{observed}",
                "contradicted": "profile {profile}, here {observed}",
                "new": "{observed}",
                "no fact": "{observed}",
            }
            out += [f"- `{r['fact']}`: {said[verdict].format(**r)}" for r in rows]
    if evidence.checks:
        out += ["", "## Checks", "", "| check | status | seconds | figures |", "|---|---|---|---|"]
        for check in evidence.checks:
            figures = ", ".join(f"{k} {v:g}" for k, v in check["figures"].items())
            seconds = "" if check["seconds"] is None else f"{check['seconds']:g}"
            out.append(f"| {check['name']} | {check['status']} | {seconds} | {figures} |")
    if evidence.figures:
        out += ["", "## Figures", "", *(f"- {k}: {v:g}" for k, v in evidence.figures.items())]
    if evidence.versions:
        out += ["", "## Versions", "", ", ".join(f"{k} {v}" for k, v in sorted(evidence.versions.items()))]
    out += ["", "Then: `aifactory sites check --write-index`."]
    return "\n".join(out) + "\n"


def _prove(made: dict[str, str], profile: Path, system: System) -> None:
    """Refuse what would not pass ``sites check``."""
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder) / profile.name
        faults = []
        if f"sites/systems/{profile.name}" in made:
            new.write_text(made[f"sites/systems/{profile.name}"], encoding="utf-8")
            faults += [f for f in check_file(new).faults if f.severity == "error" and f.name != "expired"]
        if "sites/readiness.yaml" in made:
            table = Path(folder) / "readiness.yaml"
            table.write_text(made["sites/readiness.yaml"], encoding="utf-8")
            only = read_yaml(table)["systems"].get(system.id)
            table.write_text(yaml_text.dump({"systems": {system.id: only}}), encoding="utf-8")
            faults += check_readiness(table, {system.id: system}, datetime.date.today())
        if faults:
            raise UserError(f"the report does not pass its check: {faults[0].what}", where=faults[0].where)
