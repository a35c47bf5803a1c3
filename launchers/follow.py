"""Following a run: state, attempts and causes from the run folder, completed by what the scheduler still knows.

Works without accounting: what the scheduler said about a job that ended is kept in ``attempts/NNN/scheduler.json`` the first time
somebody asks, and outcome files tell the rest.
"""

from __future__ import annotations

import functools
import getpass
import json
import os
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import EXIT_REFUSED, RunFailed, UserError, did_you_mean
from aifactory_train.launchers import backends
from aifactory_train.launchers.backends import Job
from aifactory_train.launchers.programs import attempt as book
from aifactory_train.launchers.runs import jobs_of

LIVE = ("pending", "running")
#: What an attempt decided where the run goes on by itself.
GOES_ON = ("requeue", "requeued", "chain", "next-link")


def open_folder(name: str) -> Path:
    """A run folder by path or by its name below ``runs/``."""
    for candidate in (Path(name), Path("runs") / name):
        if any((candidate / f).exists() for f in ("submission", "attempts", "run.yaml")):
            return candidate.resolve()
    known = sorted(
        {p.parent.name for p in Path("runs").glob("*/submission")}
        | {p.parent.name for p in Path("runs").glob("*/run.yaml")}
    )
    raise UserError(
        f"no run '{name}'{did_you_mean(name, known)}",
        fix=f"runs here: {', '.join(known)}" if known else "runs lie in runs/ below the current folder, or give a path",
    )


def manifest_of(folder: Path) -> dict[str, Any]:
    return book.read_json(str(folder / "submission" / "manifest.json")) or {}


def status_of(folder: Path, *, ask: bool = True) -> dict[str, Any]:
    """``{run, state, cause, attempts[], jobs[], step, backend, site, ...}``.

    state: new | pending | running | stopped | done | failed | cancelled. cause: None or {rank, node, kind, message, step}; of a run
    that is done or stopped all the same, it names the attempt that was refused afterwards.
    """
    manifest = manifest_of(folder)
    tasks = manifest.get("array")
    if tasks:
        return _array_status(folder, manifest, ask)
    return _one_status(folder, folder, manifest, ask, lambda: jobs_of(folder))


def _array_status(folder: Path, manifest: dict[str, Any], ask: bool) -> dict[str, Any]:
    backend = backends.get(manifest["backend"])

    def jobs(task: int) -> list[str]:
        return [backend.task_job(job, task) for job in jobs_of(folder)]

    tasks = []
    for i, overrides in enumerate(manifest["array"]):
        one = _one_status(folder / f"{i:03d}", folder, manifest, ask, functools.partial(jobs, i))
        one["task"], one["overrides"] = i, overrides
        tasks.append(one)
    states = [t["state"] for t in tasks]
    order = ("running", "pending", "failed", "cancelled", "stopped", "new", "done")
    state = next((s for s in order if s in states), "new")
    cause = next((t["cause"] for t in tasks if t["state"] == state and t["cause"]), None)
    return {
        "run": str(folder),
        "state": state,
        "cause": cause,
        "attempts": [dict(a, task=t["task"]) for t in tasks for a in t["attempts"]],
        "jobs": [j for t in tasks for j in t["jobs"]],
        "step": None,
        "backend": manifest.get("backend"),
        "site": manifest.get("site"),
        "tasks": tasks,
        "gpu_hours": round(sum(t["gpu_hours"] or 0 for t in tasks), 4),
        "energy_kwh": None,
    }


def _one_status(
    folder: Path, base: Path, manifest: dict[str, Any], ask: bool, jobs_now: Callable[[], list[str]]
) -> dict[str, Any]:
    backend_name = manifest.get("backend")
    backend = backends.get(backend_name) if backend_name else None
    if backend is not None and not backend.followed:
        backend = None
    known: dict[str, Job | None] = {}
    # A folder without a file is a number that somebody is just claiming.
    numbers = [n for n in book.attempt_numbers(str(folder)) if _files(Path(book.attempt_dir(str(folder), n)))]

    def job_state(job: str) -> Job | None:
        if job not in known:
            try:
                known[job] = backend.query(job) if ask and backend is not None else None
            except RunFailed:  # no answer
                if not (numbers and _decision(folder, numbers[-1]).get("final")):
                    raise
                known[job] = None  # nothing hangs on it: the files tell how the run ended
        return known[job]

    attempts = [_attempt(folder, n, n == numbers[-1], backend, job_state if ask else None) for n in numbers]
    state, cause = "new", None
    if attempts:
        state, cause = _reached(folder, attempts)
    jobs = jobs_now()  # after the attempts: a job is closed before its successor is submitted
    newest = job_state(jobs[-1]) if jobs and ask and backend is not None else None
    alive = [
        j for j in jobs if ask and backend is not None and (found := job_state(j)) is not None and found.state in LIVE
    ]
    if state != "running" and alive and not (attempts and attempts[-1].get("final")):
        newest = job_state(alive[0])
        if newest is not None and (not attempts or newest.state == "pending"):
            state = newest.state
        elif attempts and attempts[-1]["next"] in GOES_ON:
            state = "pending"  # between two attempts: this job hands over, or the next one is about to begin
    elif not attempts and jobs and newest is None and ask and backend is not None:
        state = "failed"
        cause = _cause("launch", "the scheduler does not know the job any more, and no attempt was begun")
    elif not attempts and newest is not None and newest.state not in LIVE:
        state = "cancelled" if newest.state == "cancelled" else "failed"
        cause = _scheduler_cause(newest, None) or _cause(
            "launch", f"the job ended ({newest.raw}) before the first attempt: {_log_line(base, jobs[-1])}"
        )
    pending = book.pending_stop(str(folder))
    judged = bool(attempts and attempts[-1]["final"])  # what was asked after that changed nothing any more
    if ask and book.by_a_person(pending) and not alive and not judged and state in ("new", "stopped", "failed"):
        # Asked between two attempts or before the first: the job that saw it began none, and nothing else will.
        before = f"; before that: {cause['message']}" if cause and attempts else ""
        state, cause = "stopped", _cause("stopped", f"asked to stop ({(pending or 'stop file')[:80]}){before}")
    marker = folder / "cancelled"
    if marker.exists() and state not in ("done", "running", "pending"):
        state = "cancelled"
        cause = _cause("cancelled", marker.read_text(errors="replace").strip() or "cancelled by its user")
    reason = newest.reason if newest is not None and newest.state == "pending" else None
    hours = sum(a["gpu_hours"] or 0.0 for a in attempts)
    return {
        "run": str(folder),
        "state": state,
        "cause": cause,
        "attempts": attempts,
        "jobs": [{"id": j, "state": known[j].state if known.get(j) else None} for j in jobs],  # type: ignore[union-attr]
        "pending_reason": reason,
        "step": book.latest_checkpoint(str(folder)),
        "last_step": _last_step(folder, numbers),
        "backend": backend_name,
        "site": manifest.get("site"),
        "gpu_hours": round(hours, 4),
        "energy_kwh": _energy(attempts),
    }


def _decision(folder: Path, number: int) -> dict[str, Any]:
    """What an attempt decided when it was closed; nothing while it is open."""
    record = book.read_json(str(Path(book.attempt_dir(str(folder), number)) / "attempt.json")) or {}
    return record.get("decision") or {}


def _files(where: Path) -> list[Path]:
    """What lies in an attempt's folder, but for files that are just being written."""
    return [p for p in where.glob("*") if not p.name.startswith(".") and p.suffix != ".tmp"]


def _reached(folder: Path, attempts: list[dict[str, Any]]) -> tuple[str, dict[str, Any] | None]:
    """State and cause of the last attempt, unless it changed nothing of what the run had reached before it.

    The trainer's own word is ``state.json``: it says "running" from the first thing that an attempt does to a run, and "failed" where
    that fails. Where it still says "finished", or says "stopped" while the ranks were refused (exit code 2), the run is what it was.
    """
    last = attempts[-1]
    if last["state"] != "failed":
        return last["state"], last["cause"]
    own = (book.read_json(str(folder / "state.json")) or {}).get("state")
    outcomes = book.ranked(book.attempt_dir(str(folder), last["number"]), "outcome").values()
    refused = any(o.get("exit_code") == EXIT_REFUSED for o in outcomes)
    earlier = {"finished": "done", "stopped": "stopped"}.get(own or "")
    if earlier is None or len(attempts) == 1 or not (refused or earlier == "done"):
        return last["state"], last["cause"]
    why = (last["cause"] or {}).get("message") or "no reason is known"
    told = _cause(
        "refused" if refused else "unchanged",
        f"attempt {last['number']} {'was refused' if refused else 'ended before it changed anything'}: {why}",
    )
    return earlier, told


def _last_step(folder: Path, numbers: list[int]) -> int | None:
    if not numbers:
        return None
    beats = book.ranked(book.attempt_dir(str(folder), numbers[-1]), "alive")
    steps = [b["step"] for b in beats.values() if isinstance(b.get("step"), int)]
    return max(steps) if steps else None


def _attempt(folder: Path, number: int, newest: bool, backend: Any, job_state: Any) -> dict[str, Any]:
    """One attempt: its record, or for one that nobody closed what files and scheduler tell together."""
    where = Path(book.attempt_dir(str(folder), number))
    record = book.read_json(str(where / "attempt.json")) or {}
    state, cause = record.get("state"), record.get("cause")
    ended = record.get("ended")
    scheduler = book.read_json(str(where / "scheduler.json"))
    job = record.get("job")
    if state is None or (scheduler is None and newest and backend is not None and job_state is not None and job):
        found = job_state(job) if job_state is not None and job and backend is not None else None
        if found is not None and found.state not in LIVE:
            scheduler = _remember(where, found, backend)
        if state is None:
            # Asking takes a moment, in which the job may have closed the attempt and ended.
            record = book.read_json(str(where / "attempt.json")) or record
            state, cause, ended = record.get("state"), record.get("cause"), record.get("ended")
        if state is None:
            if found is not None and found.state == "running" and newest:
                state = "running"
            elif not record:
                state, cause = _ours(where)
            else:
                state, cause = _unclosed(where, record, found, scheduler, newest)
    decision = record.get("decision") or {}
    meant_to_go_on = newest and state in ("stopped", "failed") and decision.get("action") in GOES_ON
    if meant_to_go_on and (scheduler or {}).get("state") == "cancelled":
        state, cause = "cancelled", _cancelled(state, cause)  # nobody brings it back
    ranks = book.ranked(str(where), "outcome")
    count: dict[str, int] = {}
    for outcome in ranks.values():
        count[str(outcome.get("status"))] = count.get(str(outcome.get("status")), 0) + 1
    account = (scheduler or {}).get("accounting") or {}
    started = record.get("started")
    until = ended or _end(where, scheduler) or (time.time() if state == "running" else None)
    gpus = record.get("gpus") or 0
    return {
        "number": number,
        "state": state,
        "cause": cause,
        "job": job,
        "nodes": record.get("nodes") or [],
        "ranks": record.get("world"),
        "outcomes": count,
        "started": started,
        "ended": ended,
        "step_from": record.get("step_from"),
        "step_to": record.get("step_to"),
        "next": decision.get("action"),
        "why": decision.get("why"),
        "final": bool(decision.get("final")),
        "gpu_hours": round((until - started) / 3600 * gpus, 5) if started and until else None,
        "energy_j": int(account["ConsumedEnergyRaw"])
        if str(account.get("ConsumedEnergyRaw", "")).isdigit() and int(account["ConsumedEnergyRaw"]) > 0
        else None,
    }


def _ours(where: Path) -> tuple[str, dict[str, Any] | None]:
    """An attempt that no launcher recorded: the trainer was started by hand."""
    outcomes, alive = book.ranked(str(where), "outcome"), book.ranked(str(where), "alive")
    if outcomes:
        return book.diagnose(str(where))
    fresh = [b for b in alive.values() if time.time() - (book.seconds(b.get("time")) or 0) < 120]
    return ("running", None) if fresh else book.diagnose(str(where))


def _unclosed(
    where: Path, record: dict[str, Any], job: Job | None, scheduler: dict[str, Any] | None, newest: bool
) -> tuple[str, dict[str, Any] | None]:
    """The batch shell never closed this attempt: it was killed. The scheduler says by what."""
    state, cause = book.diagnose(str(where), record.get("world"))
    kind = (scheduler or {}).get("state")
    if state == "stopped" and kind == "cancelled":
        # Ranks that were quick enough saved between the cancellation and the kill: the run is whole, but nobody brings it back.
        return "cancelled", _cancelled(state, cause)
    if state in ("done", "stopped"):
        return state, cause
    if kind and kind != "running":
        told = _scheduler_cause(
            Job(
                **{
                    **_EMPTY,
                    "id": str(record.get("job")),
                    "state": kind,
                    "raw": (scheduler or {}).get("raw", ""),
                    "nodes": (scheduler or {}).get("nodes"),
                }
            ),
            (scheduler or {}).get("failed_nodes"),
        )
        if told is not None:
            primary = cause is not None and cause["kind"] in (
                "exception",
                "out-of-memory",
                "hang",
                "gpu-fault",
                "gpu-error",
            )
            if told["kind"] == "cancelled":
                return "cancelled", told
            if not primary:
                if told["kind"] == "node-failure" and cause is not None:
                    told = {**told, "rank": _rank_on(where, told["node"]), "step": cause.get("step")}
                return "failed", told
        return "failed", cause
    if job is not None and job.state == "pending":
        # The same job waits again: the scheduler took it off its nodes.
        if cause is None or cause["kind"] in ("lost", "terminated", "launch", "communication", "signal"):
            cause = _cause(
                "node-failure",
                "the scheduler took the job off its nodes and queued it again (node failure or preemption)",
                step=(cause or {}).get("step"),
            )
        return "failed", cause
    if job is None and cause is not None and cause["kind"] in ("lost", "terminated", "launch"):
        cause = {**cause, "message": cause["message"] + "; the scheduler does not know the job any more"}
    return "failed", cause


_EMPTY: dict[str, Any] = {
    "id": "",
    "state": "",
    "reason": None,
    "nodes": None,
    "started": None,
    "ended": None,
    "exit_code": None,
    "raw": "",
}


def _rank_on(where: Path, node: str | None) -> int | None:
    ranks = sorted(r for r, p in book.ranked(str(where), "place").items() if node and p.get("node") == node)
    return ranks[0] if ranks else None


def _cause(
    kind: str, message: str, *, rank: int | None = None, node: str | None = None, step: int | None = None
) -> dict[str, Any]:
    return {"rank": rank, "node": node, "kind": kind, "message": message, "step": step}


def _cancelled(state: str, cause: dict[str, Any] | None) -> dict[str, Any]:
    """The scheduler cancelled the job; what its ranks had reached by themselves (``state``, ``cause``) is told too."""
    step = (cause or {}).get("step")
    saved = f"; every rank had saved step {step}" if state == "stopped" and step is not None else ""
    return _cause("cancelled", f"the job was cancelled{saved}", step=step)


def _scheduler_cause(job: Job, failed: list[str] | None) -> dict[str, Any] | None:
    node = failed[0] if failed else None
    match job.state:
        case "node-fail":
            return _cause(
                "node-failure",
                f"lost node {', '.join(failed or []) or '(unnamed)'} (the scheduler says {job.raw or 'NODE_FAIL'})",
                node=node,
            )
        case "timeout":
            return _cause(
                "time-limit", "the time limit was reached before the run had saved and stopped; ask for more --grace"
            )
        case "cancelled":
            return _cancelled("", None)
        case "out-of-memory":
            return _cause("out-of-memory", "the node's memory limit was exceeded (the scheduler says OUT_OF_MEMORY)")
        case "preempted":
            return _cause("preempted", "the job was preempted")
    return None


def _remember(where: Path, job: Job, backend: Any) -> dict[str, Any]:
    """Keep what the scheduler says about a job that ended: it forgets within minutes where there is no accounting."""
    value = {
        "job": job.id,
        "state": job.state,
        "raw": job.raw,
        "nodes": job.nodes,
        "ended": job.ended,
        "exit_code": job.exit_code,
        "failed_nodes": backend.failed_nodes(job.nodes) if job.state in ("node-fail",) else [],
        "accounting": job.accounting or backend.accounting(job.id) or {},
    }
    book.write_json(str(where / "scheduler.json"), value)
    return value


def _end(where: Path, scheduler: dict[str, Any] | None) -> float | None:
    stamps = [
        book.seconds(o.get("ended"))
        for o in (*book.ranked(str(where), "outcome").values(), *book.ranked(str(where), "exit").values())
    ]
    known = [s for s in stamps if s]
    if known:
        return max(known)
    return book.seconds((scheduler or {}).get("ended"))


def _energy(attempts: list[dict[str, Any]]) -> float | None:
    joules = [a["energy_j"] for a in attempts if a["energy_j"]]
    return round(sum(joules) / 3.6e6, 4) if joules else None


def _log_line(base: Path, job: str) -> str:
    for path in sorted((base / "logs").glob(f"job*{re.sub(r'[^0-9_]', '', job) or '*'}*.out")):
        lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
        if lines:
            return lines[-1][:300]
    return "no log was written"


# ---- logs


def log_files(folder: Path, attempt: int | None, ranks: list[int] | None) -> list[Path]:
    """Logs of an attempt (the newest unless told): those of the ranks, else the launcher's, else the batch shell's."""
    numbers = book.attempt_numbers(str(folder))
    if attempt is not None and attempt not in numbers:
        raise UserError(
            f"there is no attempt {attempt}",
            where=str(folder),
            fix=f"attempts: {', '.join(map(str, numbers)) or 'none yet'}",
        )
    if numbers:
        where = Path(book.attempt_dir(str(folder), attempt if attempt is not None else numbers[-1]))
        found = {
            int(m.group(1)): p for p in where.glob("rank-*.log") if (m := re.fullmatch(r"rank-(\d+)\.log", p.name))
        }
        if ranks is not None:
            gone = [r for r in ranks if r not in found]
            if gone and found:
                raise UserError(f"rank {gone[0]} has no log", where=str(where), fix=f"ranks: 0 to {max(found)}")
            return [found[r] for r in ranks if r in found]
        if found:
            return [found[min(found)]]
        other = [p for p in (where / "launcher.log", where / "preflight.log") if p.is_file() and p.stat().st_size]
        if other:
            return other
    return sorted((folder / "logs").glob("*.out"), key=lambda p: p.stat().st_mtime)[-1:]


# ---- stop


def ask_to_stop(run: Path, reason: str) -> None:
    """Write ``RUN/stop``: why, when, who, and the attempt that it was asked of. Whole or not at all: a job may take it away now."""
    asked = book.attempt_numbers(str(run))
    try:
        who = f"{getpass.getuser()}@{socket.gethostname()}"
    except (OSError, KeyError):  # a container's user that has no name
        who = f"{os.getuid()}@{socket.gethostname()}"
    when = time.strftime("%Y-%m-%dT%H:%M:%S")
    beside = run / f".stop.{os.getpid()}.tmp"
    beside.write_text(f"{reason} {when} by {who} of attempt {asked[-1] if asked else 'none yet'}\n")
    os.replace(beside, run / "stop")


def stop(folder: Path, *, cancel: bool, reason: str = "user") -> dict[str, Any]:
    """Ask a run to save and stop (the stop file, and the signal where the scheduler passes one), or cancel its jobs."""
    manifest = manifest_of(folder)
    before = status_of(folder)
    runs = [folder / f"{i:03d}" for i in range(len(manifest["array"]))] if manifest.get("array") else [folder]
    if before["state"] not in LIVE:
        raise RunFailed(f"the run is {before['state']}: there is nothing to stop", where=str(folder))
    for run in runs:
        ask_to_stop(run, reason)
        if cancel:
            (run / "cancelled").write_text(f"cancelled by its user at {time.strftime('%Y-%m-%dT%H:%M:%S')}\n")
    backend = backends.get(manifest["backend"]) if manifest.get("backend") else None
    live = [j["id"] for j in before["jobs"] if j["state"] in LIVE]
    told = []
    for job in live:
        if backend is None:
            continue
        state = next((j["state"] for j in before["jobs"] if j["id"] == job), None)
        if cancel or state == "pending":
            backend.cancel(job)
            told.append(job)
    return {"run": str(folder), "stop_file": str(runs[0] / "stop"), "cancelled": told, "state": before["state"]}


def as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
