"""``aifactory record``: show the record, fill in what only people know, sign the manifest, add Slurm's energy
afterwards.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="write record.json again from its events and print it")
    show.add_argument("name", metavar="RUN", help="name below runs/, or path of a run folder")
    show.add_argument("--missing", action="store_true", help="only what people still owe")
    show.add_argument("--json", action="store_true", help="one line of JSON")

    fill = actions.add_parser("fill", help="ask once per organisation for what only people know")
    fill.add_argument(
        "name", metavar="RUN", nargs="?", help="also take the answers into this run's record and render its pack again"
    )
    fill.add_argument(
        "--file", type=Path, metavar="YAML", help="the organisation's answers (default: user configuration)"
    )
    fill.add_argument("--set", action="append", default=[], metavar="KEY=TEXT", dest="answers", help="one answer")
    fill.add_argument("--template", action="store_true", help="print the questions as YAML")

    key = actions.add_parser("key", help="make an Ed25519 key pair for signing manifests")
    key.add_argument("--out", type=Path, metavar="FILE", help="private key (default: user configuration)")

    sign = actions.add_parser("sign", help="render the pack again and sign its manifest")
    sign.add_argument("name", metavar="RUN")
    sign.add_argument("--key", type=Path, metavar="FILE", help="private key (default: the user's)")

    energy = actions.add_parser("energy", help="add the energy that Slurm accounted for a finished job")
    energy.add_argument("name", metavar="RUN")
    energy.add_argument("--sacct", metavar="JOBID", help="job id (default: the jobs that the record knows)")

    lineage = actions.add_parser("changes", help="what changed between two runs")
    lineage.add_argument("earlier")
    lineage.add_argument("later")
    lineage.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    return {"show": _show, "fill": _fill, "key": _key, "sign": _sign, "energy": _energy, "changes": _changes}[
        args.action
    ](args)


def _show(args: argparse.Namespace) -> int:
    import json

    from aifactory_train.core.missing import missing_places
    from aifactory_train.core.output import print_json, table
    from aifactory_train.record.files import EVENTS, load_record, write_record
    from aifactory_train.run.folder import open_run

    folder = open_run(args.name).path
    record = write_record(folder) if (folder / EVENTS).is_file() and not _edited(folder) else load_record(folder)
    if args.missing:
        owed = missing_places(record)
        if args.json:
            print_json([{"place": place, "who": who} for place, who in owed])
        else:
            table(f"{len(owed)} entries are MISSING", ["place", "who must supply it"], [list(x) for x in owed])
    elif args.json:
        print_json(record)
    else:
        print(json.dumps(record, indent=1, ensure_ascii=False))
    return 0


def _edited(folder: Path) -> bool:
    """Whether the record was edited: then it is shown as it is, and ``verify`` names the places; it is not written
    over.
    """
    from aifactory_train.record.check import verify

    return any(f["kind"].startswith("record-") and f["kind"] != "record-missing" for f in verify(folder)["faults"])


def _fill(args: argparse.Namespace) -> int:
    import sys

    from aifactory_train.core.errors import UserError
    from aifactory_train.core.output import note
    from aifactory_train.record import fill
    from aifactory_train.record.people import PEOPLE

    if args.template:
        print(fill.template(), end="")
        return 0
    path = fill.organisation_file(str(args.file) if args.file else None)
    values: dict[str, Any] = fill.check_values(fill.read(path), str(path)) if path.is_file() else {}
    given = {}
    for answer in args.answers:
        key, found, text = answer.partition("=")
        if not found:
            raise UserError(f"'{answer}' is not KEY=TEXT", where="--set")
        given[key] = text
    values.update(fill.check_values(given, "--set"))
    if not given and sys.stdin.isatty():
        for key, (who, question) in PEOPLE.items():
            if key not in values:
                answer = input(f"{question} [{who}; empty: not known] ").strip()
                if answer:
                    values[key] = answer
    fill.save(path, values)
    note(f"{len(values)} of {len(PEOPLE)} answers: {path}")
    if args.name:
        from aifactory_train.record.chain import Chain
        from aifactory_train.record.files import EVENTS, load_record
        from aifactory_train.report.pack import write_pack
        from aifactory_train.run.folder import open_run

        run = open_run(args.name)
        load_record(run.path)
        Chain(run.path / EVENTS).append("filled", {f"people/{k}": v for k, v in values.items()}, f"from {path.name}")
        write_pack(run, say=note)
    return 0


def _key(args: argparse.Namespace) -> int:
    from aifactory_train.record.signing import default_key, make_key

    private = args.out or default_key()
    public = make_key(private)
    print(f"private key (keep it, mode 600): {private}\npublic key (give it to whoever verifies): {public}")
    return 0


def _sign(args: argparse.Namespace) -> int:
    from aifactory_train.core.errors import UserError
    from aifactory_train.core.output import note
    from aifactory_train.record.files import load_record
    from aifactory_train.record.signing import default_key, load_private
    from aifactory_train.report.pack import write_pack
    from aifactory_train.run.folder import open_run

    run = open_run(args.name)
    load_record(run.path)
    key = args.key or default_key()
    load_private(key)  # a wrong key is refused before anything is written
    _refuse_faults(run.path)
    done = write_pack(run, say=note, key=key)
    if not done["manifest"]["signed"]:
        raise UserError("the manifest was not signed", where=str(key))
    return 0


def _refuse_faults(folder: Path) -> None:
    """A record that was edited must not be signed as if it were whole."""
    from aifactory_train.core.errors import UserError
    from aifactory_train.record.check import verify

    serious = [f for f in verify(folder)["faults"] if f["kind"] not in ("file-added", "torn-line")]
    # the pack itself is rendered again: only the record, its events and the artefacts count
    serious = [f for f in serious if not f["where"].startswith(("evidence/", "ro-crate"))]
    if serious:
        first = serious[0]
        raise UserError(
            f"{first['what']} ({len(serious)} faults)",
            where=first["where"],
            fix="aifactory verify RUN names all; nothing was signed",
        )


def _energy(args: argparse.Namespace) -> int:
    from aifactory_train.core.errors import UserError
    from aifactory_train.core.missing import is_missing
    from aifactory_train.core.output import note
    from aifactory_train.energy import from_sacct, read_nodes, site_factors, summarise
    from aifactory_train.record.chain import Chain
    from aifactory_train.record.files import EVENTS, load_record
    from aifactory_train.report.pack import write_pack
    from aifactory_train.run.folder import open_run

    run = open_run(args.name)
    record = load_record(run.path)
    attempts = record.get("compute", {}).get("attempts", {})
    jobs = [args.sacct] if args.sacct else sorted({a["job"] for a in attempts.values() if a.get("job")})
    if not jobs:
        raise UserError("the record knows no Slurm job", where=args.name, fix="name it with --sacct JOBID")
    parts = [from_sacct(job) for job in jobs]
    total = {
        "joules": sum(p["joules"] for p in parts),
        "node_seconds": sum(p["node_seconds"] for p in parts),
        "job": "+".join(p["job"] for p in parts),
    }
    site = record.get("run", {}).get("host_site")
    factors = site_factors(None if is_missing(site) else site)
    energy = summarise(
        read_nodes([run.attempt_dir(int(n)) for n in sorted(attempts)]),
        node_seconds=sum(a["wall_s"] * a["nodes"] for a in attempts.values()),
        sacct=total,
        pue=factors.get("pue"),
        grid=factors.get("grid"),
        site=factors.get("site"),
    )
    Chain(run.path / EVENTS).append("energy-accounted", {"energy": energy}, f"sacct, job {total['job']}")
    write_pack(run, say=note)
    print(
        f"node energy: {energy['node_kwh']:.4g} kWh (Slurm accounting)"
        if energy["node_kwh"] is not None
        else "; ".join(energy["notes"])
    )
    return 0


def _changes(args: argparse.Namespace) -> int:
    from aifactory_train.core.output import print_json, table
    from aifactory_train.record.files import load_record
    from aifactory_train.record.lineage import changes
    from aifactory_train.run.folder import open_run

    found = changes(load_record(open_run(args.earlier).path), load_record(open_run(args.later).path))
    if args.json:
        print_json(found)
    else:
        table("changes", ["what", args.earlier, args.later], [[c["place"], c["earlier"], c["later"]] for c in found])
    return 0
