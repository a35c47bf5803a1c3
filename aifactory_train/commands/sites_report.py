"""``aifactory sites report``: a pull request from an acceptance or a finished run, shown before anything is written."""

from __future__ import annotations

import argparse
from pathlib import Path

from aifactory_train.core.errors import UserError
from aifactory_train.core.output import note, print_json


def report(words: list[str], args: argparse.Namespace) -> int:
    """Show what would be reported; with ``--out`` write it too."""
    from aifactory_train.sites import finding, profiles, reporting

    if len(words) != 1:
        raise UserError("one file at a time", where="sites report", fix="aifactory sites report acceptance.json")
    evidence = reporting.read_evidence(Path(words[0]))
    site = args.site or evidence.site
    if site is None:
        raise UserError("it does not say which system it is of", where=words[0], fix="--site SYSTEM")
    if evidence.kind == "acceptance" and evidence.site is not None and site != evidence.site:
        raise UserError(
            f"it is of '{evidence.site}', not of '{args.site}'", where="--site", fix=f"--site {evidence.site}"
        )
    system = profiles.load(site, overlay=False)
    reporting.judge(evidence, system)
    made = reporting.files(evidence, system, finding.find_file(site))
    if args.json:
        print_json({"site": system.id, "why_no_readiness": evidence.why_not or None, "files": made})
    else:
        print(made["PULL_REQUEST.md"], end="")
        for name, text in made.items():
            if name == "differences.yaml":
                print(f"\n# {name}\n{text}", end="")
    if args.out is None:
        note("nothing is written: this is all that would leave this machine; --out DIR writes " + ", ".join(made))
        return 0
    out = Path(args.out)
    if out.exists() and any(out.iterdir() if out.is_dir() else [out]):
        raise UserError("there is something already", where=f"--out {out}", fix="a new folder")
    for name, text in made.items():
        target = out / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", where=str(target), fix="another --out") from None
    note(f"written below {out}: {', '.join(made)}")
    note("copy sites/ into a checkout, then 'aifactory sites check --write-index'")
    return 0
