"""What ``aifactory sites`` does to profiles: check them, compare one with this machine, write a new one."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.core.output import note, print_json, table

# -- check
# ----------------------------------------------------------------------------------------------------------------------


def check_profiles(words: list[str], args: argparse.Namespace) -> int:
    """Check one profile, or all that ship; 0 where no fault is found."""
    from pathlib import Path

    from aifactory_train.sites import check, finding

    if args.list:
        rows = [{"fault": k, "means": v} for k, v in check.FAULTS.items()]
        print_json(rows) if args.json else table(None, ["fault", "means"], [[r["fault"], r["means"]] for r in rows])
        return 0
    if len(words) > 1:
        raise UserError("one profile at a time, or none for all", where="sites check", fix="aifactory sites check FILE")
    if args.write_index:
        from aifactory_train.sites import fleet, index

        written = [index.write_index(), fleet.write_fleet(), *index.write_schemas()]
        note("written: " + ", ".join(path.name for path in written))
    if words:
        path = Path(words[0])
        if not path.suffix:
            path = finding.find_file(words[0])
        report = check.check_file(path)
    else:
        report = check.check_room()
    numbers = {
        "systems": report.systems,
        "complete": report.complete,
        "facts": report.facts,
        "numeric_facts": report.numeric_facts,
        "numeric_facts_with_source_date_confidence": report.numeric_covered,
    }
    if args.json:
        faults = [f.as_dict() for f in report.faults]
        print_json({"ok": report.ok, **numbers, "faults": faults, "single_source": report.single})
    else:
        for f in report.faults:
            print(f"{f.severity}: {f.where}: [{f.name}] {f.what}" + (f"\n  fix: {f.fix}" if f.fix else ""))
        print(
            f"{report.systems} profile(s), {report.complete} complete; {report.facts} facts, of them "
            f"{report.numeric_facts} numeric, "
            f"{report.numeric_covered} with source, date and confidence; {len(report.faults)} fault(s)"
        )
        alone = {system: paths for system, paths in report.single.items() if paths}
        if words:
            for paths in alone.values():
                print("resting on one user's repository alone: " + ", ".join(paths))
        elif alone:
            counts = ", ".join(f"{system} {len(paths)}" for system, paths in alone.items())
            print(
                f"facts that rest on one user's repository alone ('aifactory sites check SYSTEM' names them): {counts}"
            )
    return 0 if report.ok else 1


# -- probe
# ----------------------------------------------------------------------------------------------------------------------


def probe_system(words: list[str], args: argparse.Namespace) -> int:
    """Ask this machine, and print what differs from its profile as a patch."""
    from pathlib import Path

    from aifactory_train.core import yaml_text
    from aifactory_train.sites import detection, probe, profiles

    if len(words) > 1:
        raise UserError("one system at a time", where="sites probe", fix="aifactory sites probe SYSTEM")
    name = words[0] if words else detection.identify()
    if name is None:
        raise UserError(
            "this machine is none of the known systems",
            where="sites probe",
            fix="name the system (aifactory sites probe SYSTEM), or write a profile with 'aifactory sites new'",
        )
    system = profiles.load(name, overlay=args.site_file)
    seen = probe.observe()
    probe.require_something(seen)
    differences = probe.compare(system, seen)
    patch = probe.patch(system, differences)
    if args.patch:
        try:
            with Path(args.patch).open("x", encoding="utf-8") as out:
                out.write(yaml_text.dump(patch))
        except FileExistsError:
            raise UserError("the file exists", where=args.patch, fix="another name for --patch") from None
        except OSError as error:
            raise UserError(
                f"cannot be written: {error.strerror}", where=args.patch, fix="another place for --patch"
            ) from None
    for problem in seen.problems:
        note(f"note: {problem}")
    if not seen.in_job:
        note("note: not inside a job: devices and CPU of a login node are not compared; run it in a job for those")
    if args.json:
        rows = [{**vars(d), "correction": d.correction} for d in differences]
        print_json(
            {
                "system": system.id,
                "differences": rows,
                "patch": patch,
                "not_asked": seen.problems,
                "in_job": seen.in_job,
            }
        )
        return 0
    if not differences:
        print(f"{system.id}: no difference to the profile")
        return 0
    print(f"# {len(differences)} difference(s) to the profile of {system.id}:")
    for d in differences:
        word = {
            "differs": f"profile {d.profile}, here {d.observed}",
            "new": f"profile: unknown, here {d.observed}",
            "gone": "not here",
        }
        print(f"#   {d.path}: {word[d.kind]} ({d.evidence})")
    print(yaml_text.dump(patch), end="")
    return 0


# -- new
# ----------------------------------------------------------------------------------------------------------------------


def new_profile(words: list[str], args: argparse.Namespace) -> int:
    """Write a new profile: from Slurm where it answers, else by interview."""
    from pathlib import Path

    from aifactory_train.sites import check, finding, new, probe

    if len(words) != 1:
        raise UserError("a new profile needs an id", where="sites new", fix="aifactory sites new my-cluster")
    system_id = new.check_id(words[0])
    if system_id in finding.shipped():
        raise UserError(f"'{system_id}' exists already", where="sites new", fix=f"aifactory sites {system_id}")
    path = Path(args.out) if args.out else finding.config_dir() / "sites" / f"{system_id}.yaml"
    if path.stem != system_id or path.suffix != ".yaml":
        raise UserError(
            "a profile's file is called as its id",
            where=f"--out {path}",
            fix=f"--out {path.with_name(system_id + '.yaml')}",
        )
    if path.exists():
        raise UserError("the file exists", where=str(path), fix="choose another id or --out, or edit the file")
    known: dict[str, Any] = {}
    if not args.no_probe:
        seen = probe.observe()
        known, remarks = new.bootstrap(seen, args.partition)
        for remark in remarks:
            note(f"read here: {remark}")

    def ask(question: str) -> str:
        note_inline(question)
        line = sys.stdin.readline()
        if not line:
            raise UserError(
                "the answers ended early", where=f"sites new: {question.rstrip(': ')}", fix="answer each question"
            )
        return line.rstrip("\n")

    answers = new.interview(ask, note, known)
    raw = new.compose(system_id, answers, set(known))
    new.write(raw, path)
    report = check.check_file(path)
    if args.json:
        print_json(
            {
                "path": str(path),
                "ok": report.ok,
                "missing": raw["missing"],
                "faults": [f.as_dict() for f in report.faults],
            }
        )
    else:
        for f in report.faults:
            print(f"{f.severity}: {f.where}: [{f.name}] {f.what}" + (f"\n  fix: {f.fix}" if f.fix else ""))
        print(f"written: {path}")
        print(
            "check: passed"
            if report.ok
            else f"check: {len(report.faults)} fault(s); edit the file and run 'aifactory sites check {path}'"
        )
        if raw["missing"]:
            print(f"not known yet: {', '.join(raw['missing'])}")
    return 0 if report.ok else 1


def note_inline(text: str) -> None:
    """A question on standard error, without a line break."""
    sys.stderr.write(text)
    sys.stderr.flush()
