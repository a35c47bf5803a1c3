"""What became of one attempt: its record, or, where nobody closed it, what its files and the scheduler tell
together.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aifactory_train.launchers.backends import Backend, Job
from aifactory_train.launchers.programs import attempt as book

LIVE = ("pending", "running")
#: What an attempt decided where the run goes on by itself.
GOES_ON = ("requeue", "requeued", "chain", "next-link")
#: Causes that a rank names of itself; a scheduler that took the job away afterwards is not why it failed.
OWN_FAULTS = ("exception", "out-of-memory", "hang", "gpu-fault", "gpu-error")


def attempt_status(
    folder: Path, number: int, newest: bool, backend: Backend | None, ask: Callable[[str], Job | None]
) -> dict[str, Any]:
    """One attempt: its record, or for one that nobody closed what files and scheduler tell together."""
    where = Path(book.attempt_dir(str(folder), number))
    record = book.read_json(str(where / "attempt.json")) or {}
    state, cause = record.get("state"), record.get("cause")
    ended = record.get("ended")
    scheduler = book.read_json(str(where / "scheduler.json"))
    job = record.get("job")
    if state is None or (scheduler is None and newest and backend is not None and job):
        found = ask(job) if job and backend is not None else None
        if found is not None and backend is not None and found.state not in LIVE:
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
        # Ranks that were quick enough saved between the cancellation and the kill: the run is whole, but nobody brings
        # it back.
        return "cancelled", _cancelled(state, cause)
    if state in ("done", "stopped"):
        return state, cause
    if kind and kind != "running":
        return _ended_by_scheduler(where, cause, kind, scheduler or {})
    if job is not None and job.state == "pending":
        # The same job waits again: the scheduler took it off its nodes.
        if cause is None or cause["kind"] in ("lost", "terminated", "launch", "communication", "signal"):
            cause = cause_of(
                "node-failure",
                "the scheduler took the job off its nodes and queued it again (node failure or preemption)",
                step=(cause or {}).get("step"),
            )
        return "failed", cause
    if job is None and cause is not None and cause["kind"] in ("lost", "terminated", "launch"):
        cause = {**cause, "message": cause["message"] + "; the scheduler does not know the job any more"}
    return "failed", cause


def _ended_by_scheduler(
    where: Path, cause: dict[str, Any] | None, kind: str, scheduler: dict[str, Any]
) -> tuple[str, dict[str, Any] | None]:
    """The scheduler ended the job: its word is the cause, unless a rank had failed of itself before."""
    reported = scheduler_cause(kind, scheduler.get("raw", ""), scheduler.get("failed_nodes"))
    if reported is None:
        return "failed", cause
    if reported["kind"] == "cancelled":
        return "cancelled", reported
    if cause is not None and cause["kind"] in OWN_FAULTS:
        return "failed", cause
    if reported["kind"] == "node-failure" and cause is not None:
        reported = {**reported, "rank": _rank_on(where, reported["node"]), "step": cause.get("step")}
    return "failed", reported


def _rank_on(where: Path, node: str | None) -> int | None:
    ranks = sorted(r for r, p in book.ranked(str(where), "place").items() if node and p.get("node") == node)
    return ranks[0] if ranks else None


def cause_of(kind: str, message: str, *, node: str | None = None, step: int | None = None) -> dict[str, Any]:
    return {"rank": None, "node": node, "kind": kind, "message": message, "step": step}


def _cancelled(state: str, cause: dict[str, Any] | None) -> dict[str, Any]:
    """The scheduler cancelled the job; what its ranks had reached by themselves (``state``, ``cause``) is said too."""
    step = (cause or {}).get("step")
    saved = f"; every rank had saved step {step}" if state == "stopped" and step is not None else ""
    return cause_of("cancelled", f"the job was cancelled{saved}", step=step)


def scheduler_cause(state: str, raw: str, failed: list[str] | None) -> dict[str, Any] | None:
    """What a job's last state with its scheduler says of why it ended; None where it says nothing."""
    node = failed[0] if failed else None
    match state:
        case "node-fail":
            return cause_of(
                "node-failure",
                f"lost node {', '.join(failed or []) or '(unnamed)'} (the scheduler says {raw or 'NODE_FAIL'})",
                node=node,
            )
        case "timeout":
            return cause_of(
                "time-limit", "the time limit was reached before the run had saved and stopped; ask for more --grace"
            )
        case "cancelled":
            return _cancelled("", None)
        case "out-of-memory":
            return cause_of("out-of-memory", "the node's memory limit was exceeded (the scheduler says OUT_OF_MEMORY)")
        case "preempted":
            return cause_of("preempted", "the job was preempted")
    return None


def _remember(where: Path, job: Job, backend: Backend) -> dict[str, Any]:
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
