"""``aifactory sites``: the 32 factories and antennas, the facts of one system, comparisons, checks, probes, new
profiles.
"""

from __future__ import annotations

import argparse
from typing import Any

from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.core.output import note, print_json, table

ACTIONS = ("compare", "check", "new", "probe", "report", "schema")

EPILOG = """\
  aifactory sites                        what runs today at each of the 32
  aifactory sites --sector health        those that focus on a sector
  aifactory sites --country fi           those in a country
  aifactory sites lumi-g                 one system: every fact with its source (also a factory's or antenna's name)
  aifactory sites compare lumi-g leonardo-booster
  aifactory sites check [NAME|FILE]      schema, sources, arithmetic, limits, links, dates
  aifactory sites probe [SYSTEM]         ask this machine and print the difference to the profile, as a patch
  aifactory sites new ID                 write a new profile: from Slurm where it answers, else by interview
  aifactory sites report FILE            acceptance.json or a run folder to a pull request; shown, then written (--out)
  aifactory sites schema [overlay]       JSON Schema for editors
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "words", nargs="*", metavar="SYSTEM|ACTION", help="a system or member, or " + ", ".join(ACTIONS)
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON on standard output")
    parser.add_argument("--sector", help="only members that focus on this sector")
    parser.add_argument("--country", metavar="FI|finland", help="only members in this country")
    parser.add_argument("--site-file", metavar="FILE", help="your overlay, or a profile of your own")
    parser.add_argument(
        "--write-index", action="store_true", help="check: rebuild index.json and the exported schemas first"
    )
    parser.add_argument("--list", action="store_true", help="check: name every fault that can be found")
    parser.add_argument("--patch", metavar="FILE", help="probe: write the differences as an overlay")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="new: where the profile goes (default: your configuration folder); report: a folder",
    )
    parser.add_argument("--site", metavar="SYSTEM", help="report: what it is of, where the file does not say")
    parser.add_argument("--partition", help="new: the GPU partition to read from Slurm")
    parser.add_argument("--no-probe", action="store_true", help="new: ask everything, do not ask Slurm")


def run(args: argparse.Namespace) -> int:
    words = list(args.words)
    action = words[0] if words and words[0] in ACTIONS else ("list" if not words else "show")
    _refuse_stray_options(args, action)
    if action == "list":
        return _list(args)
    if action == "show":
        if len(words) > 1:
            close = did_you_mean(words[0], ACTIONS)
            raise UserError(f"one system at a time{close}", where=" ".join(words), fix="aifactory sites compare A B")
        return _show(words[0], args)
    from aifactory_train.commands import sites_profiles as profiles
    from aifactory_train.commands import sites_report

    actions = {
        "compare": _compare,
        "check": profiles.check_profiles,
        "new": profiles.new_profile,
        "probe": profiles.probe_system,
        "report": sites_report.report,
        "schema": _schema,
    }
    return actions[action](words[1:], args)


_OPTIONS = {
    "list": {"json", "sector", "country"},
    "show": {"json", "site_file"},
    "compare": {"json"},
    "check": {"json", "write_index", "list"},
    "new": {"out", "partition", "no_probe", "json"},
    "probe": {"json", "patch", "site_file"},
    "report": {"json", "out", "site"},
    "schema": {"json"},
}


def _refuse_stray_options(args: argparse.Namespace, action: str) -> None:
    for name in (
        "sector",
        "country",
        "site_file",
        "write_index",
        "list",
        "patch",
        "out",
        "partition",
        "no_probe",
        "site",
    ):
        if getattr(args, name) and name not in _OPTIONS[action]:
            where = f"sites {action}" if action in ACTIONS else "sites" + (" SYSTEM" if action == "show" else "")
            raise UserError(
                f"--{name.replace('_', '-')} does not go with this", where=where, fix="aifactory sites --help"
            )


# -- the table
# -----------------------------------------------------------------------------------------------------------------


def _list(args: argparse.Namespace) -> int:
    from aifactory_train.sites.index import READINESS_WORDS, load_index

    index = load_index()
    members = index["members"]
    if args.country:
        members = _in_country(members, args.country)
    if args.sector:
        members = _of_sector(members, args.sector)
    if args.json:
        print_json([_member_json(m) for m in members])
        return 0
    systems = {s["id"]: s for s in index["systems"]}
    rows: list[list[Any]] = []
    for m in members:
        kind = "factory" if m["kind"] == "factory" else "antenna"
        for i, system_id in enumerate(m["systems"] or [None]):
            head = [m["name"] if i == 0 else "", kind if i == 0 else "", m["country"] if i == 0 else ""]
            if system_id is None:
                linked = ", ".join(m["linked_systems"])
                why = f"no system of its own today: {m['reason']}" + (f" (linked: {linked})" if linked else "")
                rows.append([*head, why, "", "", "", "", ""])
                continue
            s = systems[system_id]
            rows.append(
                [
                    *head,
                    system_id,
                    f"{s['arch'] or '?'}",
                    s["gpus_per_node"] or "?",
                    _hours(s["max_time"]),
                    s["internet"] or "?",
                    READINESS_WORDS[s["readiness"]] + ("" if s["complete"] else " (gaps)"),
                ]
            )
    _plain_table(
        ["member", "kind", "in", "system today", "arch", "GPUs/node", "max time", "internet", "readiness"], rows
    )
    factories = sum(m["kind"] == "factory" for m in members)
    print(
        f"\n{_count(factories, 'factory', 'factories')}, {_count(len(members) - factories, 'antenna', 'antennas')}. ? "
        f"= not published. 'aifactory sites SYSTEM' shows facts and sources."
    )
    return 0


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _plain_table(columns: list[str], rows: list[list[Any]]) -> None:
    """A left-aligned table; a row whose later cells are empty may run to the line's end. Needs no rich: this is the
    fast path.
    """
    widths = [len(c) for c in columns]
    for row in rows:
        full = all(str(cell) for cell in row[3:])
        for i, cell in enumerate(row):
            if full or i < 3:
                widths[i] = max(widths[i], len(str(cell)))
    for row in [columns, *rows]:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _in_country(members: list[dict[str, Any]], country: str) -> list[dict[str, Any]]:
    wanted = country.strip().lower()
    found = [m for m in members if wanted in (m["country"].lower(), m["country_name"].lower())]
    if not found:
        known = {word: m for m in members for word in (m["country"], m["country_name"])}
        raise UserError(
            f"no member in '{country}'{did_you_mean(wanted.title(), known)}",
            where="--country",
            fix=f"one of {', '.join(sorted({m['country'] for m in members}))}",
        )
    return found


def _of_sector(members: list[dict[str, Any]], sector: str) -> list[dict[str, Any]]:
    wanted = sector.strip().lower()
    known = sorted({s for m in members for s in m["sectors"]})
    found = [m for m in members if wanted in m["sectors"]]
    if not found:
        raise UserError(
            f"no member names the sector '{sector}'{did_you_mean(wanted, known)}",
            where="--sector",
            fix=f"one of {', '.join(known)}",
        )
    return found


def _member_json(m: dict[str, Any]) -> dict[str, Any]:
    keys = ("id", "name", "kind", "country", "sectors", "links", "systems", "announced", "reason")
    return {k: m[k] for k in keys} | {k: m[k] for k in ("host", "wave", "focus", "linked_systems", "unsuitable")}


def _hours(seconds: int | None) -> str:
    if seconds is None:
        return "?"
    return f"{seconds / 3600:.4g} h" if seconds >= 3600 else f"{seconds / 60:.4g} min"


# -- one system or member
# --------------------------------------------------------------------------------------------------------


def _show_members(name: str, json: bool) -> bool:
    """Show the member of that name, or those of that host or country; False where there is none."""
    from aifactory_train.sites.finding import find_member, members_at

    member = find_member(name)
    found = [member] if member is not None else members_at(name)
    if found and json:
        from aifactory_train.sites.access import of_member

        rows = [{**_member_json(m), "access": of_member(m["id"])} for m in found]
        print_json(rows[0] if member is not None else rows)
    for i, one in enumerate(found if not json else []):
        print("\n" if i else "", end="")
        _show_member(one)
    return bool(found)


def _show(name: str, args: argparse.Namespace) -> int:
    from aifactory_train.sites.finding import shipped
    from aifactory_train.sites.profiles import load

    if not args.site_file and name not in shipped() and _show_members(name, args.json):
        return 0
    system = load(name, overlay=args.site_file)
    if system.expired:
        note(
            f"warning: this profile expired on {system.expires}; 'aifactory sites probe {system.id}' there tells what "
            f"changed"
        )
    if args.json:
        print_json(system.as_dict())
        return 0
    from aifactory_train.sites.fields import slurm_time
    from aifactory_train.sites.index import READINESS_WORDS

    print(f"{system.name} ({system.id}), {system.operator}{', ' + system.country if system.country else ''}")
    reason = f": {system.status_reason}" if system.status_reason else ""
    print(
        f"{system.status}{reason}; readiness: {READINESS_WORDS[system.readiness]}; expires {system.expires}; "
        f"maintainer: {system.maintainer}"
    )
    if system.usable:
        gaps = system.core_missing()
        print("complete" if not gaps else f"not known: {', '.join(gaps)}")
    for label, value in _summary(system):
        print(f"  {label:11} {value}")
    rows, legend = [], {}
    for fact in system.stated_facts():
        value = slurm_time(fact.value) if fact.path.endswith(("max_time", "default_time")) else fact.value
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        section = "gpu constants, " if fact.path.startswith("gpu.") and fact.source_id not in system.sources else ""
        legend[f"{section}{fact.source_id}"] = fact
        rows.append([fact.path, text, fact.confidence, fact.source_id + (f": {fact.note}" if fact.note else "")])
    if rows:
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        print()
        for path, text, confidence, source in rows:
            print(f"{path:{widths[0]}}  {text:{min(widths[1], 44)}}  {confidence:{widths[2]}}  {source}")
        print("\nsources")
        for label, fact in sorted(legend.items()):
            when = fact.date if fact.date != "n.d." else f"undated, read {fact.retrieved}"
            print(f"  {label}: {fact.source} ({when})" + (f" {fact.url}" if fact.url else ""))
    for remark in system.notes:
        print(f"\n- {remark.text} [{remark.confidence}, {remark.source}]")
    from aifactory_train.commands import sites_services as services

    services.show_unknown(system)
    services.show_known_faults(system)
    return 0


def _summary(system: Any) -> list[tuple[str, str]]:
    """What a user asks first, a line each; what is not known has no line. Every fact with its source follows below."""
    from aifactory_train.commands import sites_services as services
    from aifactory_train.sites.fields import compact_time

    node, gpu, access, internet = system.node, system.gpu, system.access, system.internet
    memory = f", {gpu.memory_gib:g} GiB each" if gpu.memory_gib else ""
    cores = [
        f"{node.cores} cores" if node.cores else "",
        f"{node.memory_gib:g} GiB of memory" if node.memory_gib else "",
    ]
    rows = [
        ("GPUs a node", " x ".join(filter(None, [str(node.gpus or ""), gpu.model or gpu.sku])) + memory),
        ("nodes", ", each with ".join(filter(None, [str(node.count or ""), " and ".join(filter(None, cores))]))),
    ]
    for name, part in system.partitions.items():
        limit = system.limits(name)
        other = part.max_time and limit["max_time"] and part.max_time > limit["max_time"]
        longer = f" ({compact_time(part.max_time)} with another QoS)" if other else ""
        limits = [
            "the default" if name == system.default_partition else "",
            (f"at most {compact_time(limit['max_time'])}" if limit["max_time"] else "") + longer,
            f"{limit['max_nodes']} node(s) a job" if limit["max_nodes"] else "",
            {True: "nodes are shared", False: "whole nodes"}.get(part.shared, ""),
        ]
        rows.append(("partition", f"{name}: " + (", ".join(filter(None, limits)) or "no limit is published")))
    rows += [
        ("scheduler", system.scheduler.kind),
        ("account", ", ".join(filter(None, [access.account, access.account_form])) if access.account else ""),
        ("login", ", ".join(access.login_hosts or [])),
        ("internet", ", ".join(f"{k}: {v}" for k, v in (("login", internet.login), ("jobs", internet.compute)) if v)),
        *services.summary(system),
    ]
    return [(label, str(value)) for label, value in rows if value]


def _show_member(member: dict[str, Any]) -> None:
    print(
        f"{member['name']} ({member['kind']}, {member['country_name']}), hosted by {member['host']}, selected "
        f"{member['wave']}"
    )
    print(
        f"sectors: {', '.join(member['sectors']) or member['sectors_reason']}"
        + (f" ({member['focus']})" if member["focus"] else "")
    )
    if member["links"]:
        print(f"linked to: {', '.join(member['links'])}")
    print(f"systems today: {', '.join(member['systems']) or 'none: ' + member['reason']}")
    if not member["systems"] and member["linked_systems"]:
        print(f"its linked factories run: {', '.join(member['linked_systems'])}")
    if member["announced"]:
        print(f"announced: {', '.join(member['announced'])}")
    if member["unsuitable"]:
        print(f"there, but not for this: {', '.join(member['unsuitable'])}")
    from aifactory_train.commands.sites_services import show_access

    show_access(member)


# -- compare
# ----------------------------------------------------------------------------------------------------------------------


def _compare(words: list[str], args: argparse.Namespace) -> int:
    from aifactory_train.sites.profiles import load

    if len(words) != 2:
        raise UserError(
            "two systems are compared", where="sites compare", fix="aifactory sites compare lumi-g leonardo-booster"
        )
    a, b = load(words[0]), load(words[1])
    facts = [{f.path: f.value for f in s.stated_facts()} for s in (a, b)]
    rows = []
    for path in dict.fromkeys([*facts[0], *facts[1]]):
        left, right = facts[0].get(path), facts[1].get(path)
        if left != right:
            rows.append({"fact": path, a.id: left, b.id: right})
    if args.json:
        print_json(rows)
        return 0
    table(
        None,
        ["fact", a.id, b.id],
        [[r["fact"], "-" if r[a.id] is None else r[a.id], "-" if r[b.id] is None else r[b.id]] for r in rows],
    )
    return 0


# -- schema
# ----------------------------------------------------------------------------------------------------------------------


def _schema(words: list[str], args: argparse.Namespace) -> int:
    import json

    from aifactory_train.sites.schema import json_schema

    which = words[0] if words else "profile"
    if which not in ("profile", "overlay") or len(words) > 1:
        raise UserError(
            f"no schema '{' '.join(words)}'{did_you_mean(which, ['profile', 'overlay'])}",
            where="sites schema",
            fix="profile or overlay",
        )
    schema = json_schema(which)
    if args.json:
        print_json(schema)
    else:
        print(json.dumps(schema, indent=1, ensure_ascii=False))
    return 0
