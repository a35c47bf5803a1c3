"""``aifactory launch``: run a recipe here, or write, check and submit the batch script of a site."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from typing import Any

from aifactory_train.commands.arguments import add_overrides
from aifactory_train.core.errors import UserError
from aifactory_train.run.profiled_steps import steps_asked
from aifactory_train.sources import licences


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="recipe id (health/phenotype-terms) or path of a .yaml file")
    where = parser.add_argument_group("where")
    where.add_argument(
        "--site",
        default=None,
        metavar="SYSTEM",
        help="a system of 'aifactory sites', a profile's file, or local (default)",
    )
    where.add_argument(
        "--site-file", default=None, metavar="FILE", help="your own values for the site (account, paths, container)"
    )
    where.add_argument("--partition", metavar="P")
    where.add_argument("--qos", metavar="Q")
    where.add_argument("--account", metavar="A")
    where.add_argument("--nodes", type=int, default=1, metavar="N")
    where.add_argument(
        "--gpus-per-node",
        type=int,
        metavar="G",
        help="as the scheduler counts them (on MI250X: GCDs); default: all of a node",
    )
    where.add_argument(
        "--nproc", type=int, metavar="N", help="processes per node; default: one per GPU, or one on the CPU"
    )
    where.add_argument(
        "--time", metavar="HH:MM:SS", help="also 90m, 24h, 2d, D-HH:MM:SS (default 4 h, or the partition's limit)"
    )
    where.add_argument("--reservation", metavar="R")
    where.add_argument("--constraint", metavar="C")
    where.add_argument("--exclude", action="append", default=[], metavar="NODE", help="never use this node")
    how = parser.add_argument_group("how")
    how.add_argument(
        "--backend", metavar="B", help="local, mpi, slurm, pbspro, torque, kubernetes (default: the site's)"
    )
    how.add_argument("--style", metavar="S", help="torchrun (one task a node) or srun (one task a GPU)")
    how.add_argument("--mpi", metavar="openmpi|mpich", help="form of mpirun's options (default: what it says it is)")
    how.add_argument("--container", metavar="FILE", help="image that holds torch")
    how.add_argument("--venv", metavar="DIR", help="virtual environment that holds torch and aifactory-train")
    how.add_argument("--preflight", choices=["auto", "on", "off"], default="auto", help="auto: on for several nodes")
    how.add_argument("--directive", action="append", default=[], metavar="--FLAG[=V]", help="one more scheduler option")
    what = parser.add_argument_group("what")
    what.add_argument(
        "--accept",
        action="store_true",
        help="no recipe: check one node of the site (aifactory accept, docs/acceptance.md)",
    )
    what.add_argument("--quick", action="store_true", help="with --accept: the checks of most value alone")
    what.add_argument("--name", help="the run folder is runs/NAME")
    what.add_argument("--run-dir", metavar="DIR")
    add_overrides(what)
    what.add_argument("--env", action="append", default=[], metavar="K=V", help="an environment variable of the ranks")
    what.add_argument(
        "--array",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="one task for each value (product over several)",
    )
    licences.add_arguments(what)
    again = parser.add_argument_group("time limits and failures")
    again.add_argument(
        "--resubmit",
        choices=["requeue", "chain", "none"],
        help="how a run goes on after its time limit (default: the site's way)",
    )
    again.add_argument(
        "--chain", type=int, default=0, metavar="K", help="queue K further jobs at once, one running at a time"
    )
    again.add_argument(
        "--restarts",
        action="append",
        default=[],
        metavar="KIND=N",
        help="most restarts: time=50, node=3, crash=1, preempted=50",
    )
    again.add_argument(
        "--grace", type=int, metavar="S", help="seconds kept for the last save (default 300, or a tenth of a short job)"
    )
    again.add_argument(
        "--hang", type=int, default=1800, metavar="S", help="end an attempt that makes no step for so long; 0: never"
    )
    again.add_argument(
        "--resume", action="store_true", help="RECIPE is a run folder: submit it again, unchanged, to go on"
    )
    again.add_argument(
        "--profile", metavar="STEPS", help="every rank records where the time of these steps goes: a number, or A-B"
    )
    cost = parser.add_argument_group("cost and output")
    cost.add_argument("--budget", type=float, metavar="H", help="refuse more than H GPU-hours")
    cost.add_argument(
        "--site-budget", type=float, metavar="N", help="refuse more than N of the unit that the site bills in"
    )
    cost.add_argument("--yes", action="store_true", help="confirm a large job")
    cost.add_argument("--dry-run", action="store_true", help="print the script alone on standard output; needs no site")
    cost.add_argument(
        "--test-only", action="store_true", help="write the run folder and ask the scheduler, submit nothing"
    )
    cost.add_argument(
        "--token", metavar="T", help="a word for this launch: made again with it, it submits nothing twice"
    )
    cost.add_argument("--explain", action="store_true", help="print why every line is there and which fact it rests on")
    cost.add_argument("--json", action="store_true", help="print the decision as one line of JSON")


def run(args: argparse.Namespace) -> int:
    if args.accept or args.quick:
        _only_an_acceptance(args)
    elif args.recipe is None:
        raise UserError("no recipe is named", where="RECIPE", fix="'aifactory recipes' lists them")
    if args.resume:
        if args.profile is not None:
            raise UserError(
                "--resume submits a run folder unchanged",
                where="--profile",
                fix="leave --profile out, or submit the recipe anew with it",
            )
        return _resume(args)
    args.overrides = licences.overrides(args)
    # Scanning all installed distributions for pydantic plug-ins costs a tenth of a dry run; none is used.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    from aifactory_train import sites
    from aifactory_train.config.loading import load_recipe
    from aifactory_train.launchers import backends, checks, tokens
    from aifactory_train.launchers.build import build
    from aifactory_train.launchers.planned import plan_for
    from aifactory_train.launchers.shaping import shape_of

    if args.token is not None:
        tokens.check_token(args.token)
    request = request_of(args)
    system = load_site(args)
    recipe = None if args.accept else load_recipe(args.recipe, args.overrides)
    if recipe is not None:
        licences.gate(recipe)
    shape = shape_of(request, system)
    submitting = not (args.dry_run or args.explain)
    plan: dict[str, Any] | None = None
    wanted: list[str] = []
    remark: str | None = None
    if recipe is not None and (not args.dry_run or args.json):
        plan, wanted, remark = plan_for(request, system, shape, recipe)
        if wanted:
            # The planner's settings lie below the user's own, which win.
            request = dataclasses.replace(request, overrides=(*wanted, *request.overrides))
            recipe = load_recipe(args.recipe, list(request.overrides))
    sub = build(request, system, recipe, shape=shape, plan=plan, files=submitting)
    if wanted:
        sub.notes.append("settings of the planner: " + " ".join(wanted))
    if remark:
        sub.notes.append(remark)
    if args.token is not None and submitting and (begun := tokens.begun_with(sub.run_dir.parent, args.token)):
        sub.run_dir, sub.name = begun, begun.name
        return _submit_rest(args, sub, [])
    batch = backends.get(shape.backend).batch
    here = not batch or system.id in ("lab",) or sites.identify() == system.id or submitting
    if not here:
        sub.notes.append(
            f"this is not {system.name}: paths in the script ({sub.run_dir}, caches, environment) are those of this "
            f"machine; "
            f"call it again on a login node there"
        )
    found = checks.check(sub, recipe, here=here, submitting=submitting)
    _tell(args, sub, found)
    checks.raise_refusals(found)
    if args.explain and not args.json:
        from aifactory_train.launchers.explain import render

        print(render(sub))
        return 0
    if args.dry_run:
        if args.json:
            _print_json(sub, found, extra={"script": sub.script, **_explained(args, sub)})
        else:
            sys.stdout.write(sub.script)
        return 0
    return _submit(args, sub, found)


def _only_an_acceptance(args: argparse.Namespace) -> None:
    """Refuse what has no meaning without a recipe: an acceptance is one process on one node, once."""
    if not args.accept:
        raise UserError("goes with --accept alone", where="--quick", fix="aifactory launch --accept --quick --site S")
    given = {
        "RECIPE": args.recipe is not None,
        "--nodes": args.nodes != 1,
        "--nproc": args.nproc is not None,
        "--set": bool(args.overrides),
        "--array": bool(args.array),
        "--chain": bool(args.chain),
        "--resubmit": args.resubmit not in (None, "none"),
        "--resume": args.resume,
        "--profile": args.profile is not None,
    }
    wrong = [name for name, there in given.items() if there]
    if wrong:
        raise UserError(
            f"--accept checks one node, once, without a recipe; {', '.join(wrong)} cannot go with it",
            where=wrong[0],
            fix=f"leave {' and '.join(wrong)} out; for several nodes submit one acceptance each (--exclude NODE)",
        )


def request_of(args: argparse.Namespace):
    """The typed request of the command line; each wrong value is refused with a rule."""
    from aifactory_train.launchers import request as rq

    array = []
    for text in args.array:
        key, values = rq.pair(text, "--array")
        if not all(part.isidentifier() or part.isdigit() for part in key.split(".")):
            raise rq.Refusal(
                "array-key",
                f"{rq.shown(key)} is no key of a recipe",
                where="--array",
                fix="--array train.learning_rate=1e-4,2e-4",
            )
        array.append((key, tuple(v for v in values.split(",") if v != "")))
    if args.profile is not None:
        steps_asked(args.profile)
    limits = dict(vars(rq.Restarts()))
    for text in args.restarts:
        kind, number = rq.pair(text, "--restarts")
        if kind not in limits or not number.isdecimal():
            raise rq.Refusal(
                "restarts-form",
                f"{rq.shown(text)} is not KIND=N",
                where="--restarts",
                fix=f"KIND is one of {', '.join(limits)}, N a number",
            )
        limits[kind] = int(number)
    for flag, value in (("--chain", args.chain), ("--hang", args.hang), ("--grace", args.grace or 0)):
        if value < 0:
            raise rq.Refusal("not-negative", f"{value}", where=flag, fix="0 or more")
    for flag, budget in (("--budget", args.budget), ("--site-budget", args.site_budget)):
        if budget is not None and not budget > 0:
            unit = " GPU-hours" if flag == "--budget" else ""
            raise rq.Refusal("budget-positive", f"a budget of {budget}{unit}", where=flag, fix="more than 0")
    return rq.LaunchRequest(
        recipe="--accept" if args.accept else args.recipe,
        site=args.site or "local",
        backend=args.backend,
        style=args.style,
        partition=args.partition,
        qos=args.qos,
        account=args.account,
        nodes=args.nodes,
        gpus_per_node=args.gpus_per_node,
        nproc=args.nproc,
        time_s=rq.duration(args.time) if args.time is not None else None,
        reservation=args.reservation,
        constraint=args.constraint,
        exclude=tuple(args.exclude),
        name=args.name,
        run_dir=args.run_dir,
        overrides=tuple(args.overrides),
        env=tuple(rq.pair(text, "--env") for text in args.env),
        profile=args.profile,
        array=tuple(array),
        container=args.container,
        venv=args.venv,
        resubmit=args.resubmit,
        chain=args.chain,
        restarts=rq.Restarts(**limits),
        grace_s=args.grace,
        hang_s=args.hang,
        preflight=args.preflight,
        budget_gpu_hours=args.budget,
        site_budget=args.site_budget,
        confirmed=args.yes,
        mpi=args.mpi,
        extra_flags=tuple(args.directive),
        accept=(("--quick",) if args.quick else ()) if args.accept else None,
    ).checked()


def load_site(args: argparse.Namespace):
    """The system, with the user's own values laid over it."""
    from aifactory_train import sites
    from aifactory_train.launchers import backends
    from aifactory_train.launchers.here import this_machine

    asked = backends.find(args.backend) if args.backend is not None else None
    if args.site is None and (args.backend is None or (asked is not None and not asked.batch)):
        return this_machine()
    name = args.site or "local"
    if name == "local" and args.site_file is None:
        return this_machine()
    return sites.load(name, overlay=args.site_file) if args.site_file else sites.load(name)


def _tell(args: argparse.Namespace, sub: Any, found: list[Any]) -> None:
    from aifactory_train.core.output import note
    from aifactory_train.launchers import backends

    if args.json:
        return
    for text in sub.notes:
        note(f"note: {text}")
    for finding in found:
        if finding.level == "warn":
            note(f"warning: [{finding.rule}] {finding.what}" + (f"; {finding.fix}" if finding.fix else ""))
        elif finding.level == "not-checked":
            note(f"not checked here: [{finding.rule}] {finding.what}" + (f" ({finding.fix})" if finding.fix else ""))
    shape = sub.shape
    if backends.get(shape.backend).batch:
        from aifactory_train.launchers.checks import Context, billed, gpu_hours

        context = Context(sub, None, False, False)  # type: ignore[arg-type]
        hours, cost = gpu_hours(context), billed(context)
        note(
            f"{sub.system.name}: {shape.nodes} node(s) x {shape.gpus_per_node} GPU(s)"
            + (f" (a GPU is {sub.system.gpu.counted_as})" if sub.system.gpu.counted_as else "")
            + f", {shape.ranks} ranks, at most {hours:,.1f} GPU-hours"
            + (f"; the site bills at most {cost}" if cost else "; what the site bills for them is not published")
        )


def _explained(args: argparse.Namespace, sub: Any) -> dict[str, Any]:
    if not args.explain:
        return {}
    from aifactory_train.launchers.explain import explain

    return {"explained": [line.as_dict() for line in explain(sub)]}


def _print_json(sub: Any, found: list[Any], extra: dict[str, Any]) -> None:
    from aifactory_train.core.output import print_json
    from aifactory_train.launchers.checks import Context, billed

    shape, cost = sub.shape, billed(Context(sub, None, False, False))  # type: ignore[arg-type]
    print_json(
        {
            "site": sub.system.id,
            "backend": shape.backend,
            "style": shape.style,
            "name": sub.name,
            "run_dir": str(sub.run_dir),
            "nodes": shape.nodes,
            "gpus_per_node": shape.gpus_per_node,
            "ranks": shape.ranks,
            "partition": shape.partition,
            "qos": shape.qos,
            "account": shape.account,
            "time_s": shape.time_s,
            "gpu_hours_most": round(shape.gpu_hours, 3),
            "billed_most": cost.as_dict() if cost else None,
            "findings": [f.as_dict() for f in found],
            "notes": sub.notes,
            "plan": sub.plan,
            **extra,
        }
    )


def _submit(args: argparse.Namespace, sub: Any, found: list[Any]) -> int:
    from aifactory_train.core.output import note
    from aifactory_train.launchers import backends, runs

    script = runs.write(sub, args.token)
    backend = backends.get(sub.shape.backend)
    if args.test_only:
        answer = backend.submit(sub.run_dir, test_only=True)
        if args.json:
            _print_json(sub, found, {"script": str(script), "accepted": True})
        else:
            note(f"the scheduler accepts {script}" + (f" ({answer})" if answer else ""))
        return 0
    return _submit_rest(args, sub, found, new=True)


def _submit_rest(args: argparse.Namespace, sub: Any, found: list[Any], *, new: bool = False) -> int:
    """Submit what is not submitted yet, each job remembered at once, and say which they are."""
    from aifactory_train.core.output import note
    from aifactory_train.launchers import backends, runs, tokens

    backend = backends.get(sub.shape.backend)
    jobs = [] if new else tokens.submitted(sub.run_dir, backend, runs.jobs_of(sub.run_dir))
    if not backend.batch:
        note(f"run folder: {sub.run_dir}")
        code = backend.run(sub.run_dir)
        if args.json:
            _print_json(sub, found, {"exit_code": code})
        return code
    while len(jobs) < 1 + args.chain:
        jobs.append(backend.submit(sub.run_dir))
        runs.remember_jobs(sub.run_dir, jobs[-1:])
    if args.json:
        _print_json(sub, found, {"jobs": jobs})
    else:
        note(f"submitted {', '.join(jobs)}; run folder: {sub.run_dir}")
        note(
            f"follow it: aifactory status {sub.run_dir}; aifactory logs -f {sub.run_dir}; stop it: aifactory stop "
            f"{sub.run_dir}"
        )
    return 0


def _resume(args: argparse.Namespace) -> int:
    """Submit an existing run folder again."""
    from aifactory_train.core.output import note, print_json
    from aifactory_train.launchers import backends, runs
    from aifactory_train.launchers.follow import open_folder, status_of

    folder = open_folder(args.recipe)
    state = status_of(folder)
    if state["state"] in ("running", "pending"):
        raise UserError(
            f"the run is {state['state']}", where=str(folder), fix="wait for it, or 'aifactory stop' it first"
        )
    if state["state"] == "done":
        raise UserError("the run is finished", where=str(folder), fix="start a new run under another --name")
    for run in [folder / f"{task['task']:03d}" for task in state["tasks"]] if "tasks" in state else [folder]:
        if "tasks" in state and state["tasks"][int(run.name)]["state"] == "done":
            continue
        for earlier in ("stop", "cancelled"):  # this is the newer word; one that is asked from now on counts again
            (run / earlier).unlink(missing_ok=True)
        (run / "submission" / "again").write_text("")
    backend = backends.get(state["backend"]) if state["backend"] else backends.of_scheduler("none")
    if not backend.batch:
        note(f"run folder: {folder}")
        return backend.run(folder)
    job = backend.submit(folder)
    runs.remember_jobs(folder, [job])
    if args.json:
        print_json({"run_dir": str(folder), "jobs": [job]})
    else:
        note(f"submitted {job}; run folder: {folder}")
    return 0
