"""``aifactory env``: the software environment of a site."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--site", required=True, metavar="SYSTEM", help="a system of 'aifactory sites', or a profile's file"
    )
    parser.add_argument(
        "--site-file", metavar="FILE", help="your own values for the site (work_dir, container_image, modules)"
    )
    parser.add_argument(
        "--container", metavar="IMAGE", help="over the torch of this image; without, the site's image, modules or none"
    )
    parser.add_argument(
        "--bundle",
        type=Path,
        metavar="DIR",
        help="pack code, wheels, model and data for one rsync into this new folder",
    )
    parser.add_argument(
        "--recipe",
        action="append",
        default=[],
        metavar="RECIPE",
        help="with --bundle: carry its fetched model and data; repeatable",
    )
    parser.add_argument("--no-wheels", action="store_true", help="with --bundle: leave the wheels out")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="write the build script there instead of printing it"
    )
    parser.add_argument(
        "--verify",
        metavar="PYTHON",
        help="import everything in this interpreter of this machine and print what it found",
    )
    parser.add_argument(
        "--json", action="store_true", help="one line of JSON: the way, requirements, what was and was not checked here"
    )


def run(args: argparse.Namespace) -> int:
    from aifactory_train import sites
    from aifactory_train.core.errors import EXIT_DONE, EXIT_FAILED
    from aifactory_train.core.output import note, print_json
    from aifactory_train.launchers import software
    from aifactory_train.launchers.request import LaunchRequest

    system = sites.load(args.site, overlay=args.site_file) if args.site_file else sites.load(args.site)
    sites.require_usable(system)
    request = LaunchRequest(recipe="env", site=system.id, container=args.container)
    known = _known_faults(system, request)
    for fault in known:
        note(f"known fault: {fault.sentence()}")
    if args.verify:
        found = software.verify_here(args.verify)
        if system.node.isa and found["isa"] != system.node.isa:
            note(
                f"not checked here: compute nodes of {system.name} are {system.node.isa}, this machine is "
                f"{found['isa']}"
            )
        if args.json:
            print_json(found)
        else:
            for name, version in found["packages"].items():
                print(f"{name} {version}")
        return EXIT_DONE if found["ok"] else EXIT_FAILED
    way = software.way_of(system, request)
    if args.bundle is not None:
        facts = software.bundle(
            system, way, args.bundle, request, recipes=args.recipe, wheels=not args.no_wheels, say=note
        )
        if args.json:
            print_json({**facts, "known_faults": [fault.as_dict() for fault in known]})
        else:
            size = sum(f["bytes"] for f in facts["files"].values()) / 1e6
            note(
                f"{args.bundle}: {len(facts['files'])} files, {size:,.1f} MB; rsync it to the site, then: bash "
                f"build-env.sh"
            )
            for text in facts["missing"]:
                note(f"not in it: {text}")
            for text in facts["not_checked_here"]:
                note(f"not checked here: {text}")
        return EXIT_DONE
    text = software.script(system, way, request)
    software.parses(text)
    facts = software.manifest(system, way)
    if args.output is not None:
        args.output.write_text(text)
        args.output.chmod(0o755)
    if args.json:
        facts["known_faults"] = [fault.as_dict() for fault in known]
        print_json({**facts, "script": str(args.output) if args.output else text})
        return EXIT_DONE
    for unchecked in facts["not_checked_here"]:
        note(f"not checked here: {unchecked}")
    if args.output is None:
        sys.stdout.write(text)
    else:
        note(f"{args.output}: {way.kind}, {way.why}; run it at {system.name}")
    return EXIT_DONE


def _known_faults(system: Any, request: Any) -> list[Any]:
    """Faults of the image and the variables that jobs have there, as far as one knows before there is a job."""
    from aifactory_train.launchers.container import container_of
    from aifactory_train.sites import known_faults

    container = container_of(request, system)
    variables = {**system.environment.set, **system.user.env}
    image = container.image if container is not None else None
    return known_faults.applicable(known_faults.Situation(system, image, variables=variables, nodes=2))
