"""Following a run: state, attempts and causes from the run folder, completed by what the scheduler still knows.

Works without accounting: what the scheduler said about a job that ended is kept in ``attempts/NNN/scheduler.json`` the
first time somebody asks, and outcome files tell the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import EXIT_REFUSED, RunFailed, UserError, did_you_mean
from aifactory_train.core.files import misfit
from aifactory_train.launchers import backends
from aifactory_train.launchers.attempts import GOES_ON, LIVE, attempt_status, cause_of, scheduler_cause
from aifactory_train.launchers.backends import Backend, Job
from aifactory_train.launchers.logs import last_line
from aifactory_train.launchers.programs import attempt as book
from aifactory_train.launchers.runs import jobs_of


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
    path = folder / "submission" / "manifest.json"
    manifest = book.read_json(str(path)) or {}
    if wrong := misfit(manifest, {"backend?": str, "array?": list}):
        raise UserError(f"is damaged: {wrong}", where=str(path), fix="put it back, or launch the run anew")
    return manifest


def status_of(folder: Path, *, ask: bool = True) -> dict[str, Any]:
    """``{run, state, cause, attempts[], jobs[], step, backend, site, ...}``.

    state: new | pending | running | stopped | done | failed | cancelled. cause: None or {rank, node, kind, message,
    step}; of a run that is done or stopped all the same, it names the attempt that was refused afterwards.
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


class _Asked:
    """Answers of the scheduler about the jobs of a run, each asked for once; nothing where nobody is to be asked."""

    def __init__(self, backend: Backend | None, ended: Callable[[], bool]):
        self.backend, self.ended = backend, ended
        self.known: dict[str, Job | None] = {}

    def __call__(self, job: str) -> Job | None:
        if self.backend is not None and job not in self.known:
            try:
                self.known[job] = self.backend.query(job)
            except RunFailed:  # no answer
                if not self.ended():
                    raise
                self.known[job] = None  # nothing hangs on it: the files tell how the run ended
        return self.known.get(job)

    def live(self, jobs: list[str]) -> list[str]:
        return [job for job in jobs if (found := self(job)) is not None and found.state in LIVE]


def _one_status(
    folder: Path, base: Path, manifest: dict[str, Any], ask: bool, jobs_now: Callable[[], list[str]]
) -> dict[str, Any]:
    backend_name = manifest.get("backend")
    backend = backends.get(backend_name) if backend_name else None
    # A folder without a file is a number that somebody is just claiming.
    numbers = [n for n in book.attempt_numbers(str(folder)) if _files(Path(book.attempt_dir(str(folder), n)))]
    asked = _Asked(
        backend if ask and backend is not None and backend.followed else None,
        lambda: bool(numbers and (_record(folder, numbers[-1]).get("decision") or {}).get("final")),
    )
    # An attempt that was refused because another one is at work says nothing about the run.
    counted = [n for n in numbers if not book.occupied(_record(folder, n))] or numbers
    attempts = [attempt_status(folder, n, n == counted[-1], asked.backend, asked) for n in numbers]
    final = [a for a in attempts if a["number"] in counted]
    reached = _reached(folder, final) if final else ("new", None)
    jobs = jobs_now()  # after the attempts: a job is closed before its successor is submitted
    alive = asked.live(jobs)
    state, cause, newest = _state(base, reached, final, jobs, asked, alive)
    if ask and not alive:
        state, cause = _stopped_between(folder, final, state, cause)
    marker = folder / "cancelled"
    if marker.exists() and state not in ("done", "running", "pending"):
        state = "cancelled"
        cause = cause_of("cancelled", marker.read_text(errors="replace").strip() or "cancelled by its user")
    return {
        "run": str(folder),
        "state": state,
        "cause": cause,
        "attempts": attempts,
        "jobs": [{"id": j, "state": found.state if (found := asked.known.get(j)) else None} for j in jobs],
        "pending_reason": newest.reason if newest is not None and newest.state == "pending" else None,
        "step": book.latest_checkpoint(str(folder)),
        "last_step": _last_step(folder, counted),
        "backend": backend_name,
        "site": manifest.get("site"),
        "gpu_hours": round(sum(a["gpu_hours"] or 0.0 for a in attempts), 4),
        "energy_kwh": _energy(attempts),
    }


def _state(
    base: Path,
    reached: tuple[str, dict[str, Any] | None],
    attempts: list[dict[str, Any]],
    jobs: list[str],
    asked: _Asked,
    alive: list[str],
) -> tuple[str, dict[str, Any] | None, Job | None]:
    """State and cause of a run from what its attempts reached and from its jobs, and the job that tells why it
    waits.
    """
    state, cause = reached
    newest = asked(jobs[-1]) if jobs else None
    if state != "running" and alive and not (attempts and attempts[-1].get("final")):
        newest = asked(alive[0])
        if newest is not None and (not attempts or newest.state == "pending"):
            state = newest.state
        elif attempts and attempts[-1]["next"] in GOES_ON:
            state = "pending"  # between two attempts: this job hands over, or the next one is about to begin
    elif not attempts and jobs and newest is None and asked.backend is not None:
        state = "failed"
        cause = cause_of("launch", "the scheduler does not know the job any more, and no attempt was begun")
    elif not attempts and newest is not None and newest.state not in LIVE:
        state = "cancelled" if newest.state == "cancelled" else "failed"
        cause = scheduler_cause(newest.state, newest.raw, None) or cause_of(
            "launch", f"the job ended ({newest.raw}) before the first attempt: {last_line(base, jobs[-1])}"
        )
    return state, cause, newest


def _stopped_between(
    folder: Path, attempts: list[dict[str, Any]], state: str, cause: dict[str, Any] | None
) -> tuple[str, dict[str, Any] | None]:
    """Asked between two attempts or before the first: the job that saw it began none, and nothing else will."""
    pending = book.pending_stop(str(folder))
    final = bool(attempts and attempts[-1]["final"])  # what was asked after that changed nothing any more
    if not book.by_a_person(pending) or final or state not in ("new", "stopped", "failed"):
        return state, cause
    before = f"; before that: {cause['message']}" if cause and attempts else ""
    return "stopped", cause_of("stopped", f"asked to stop ({(pending or 'stop file')[:80]}){before}")


def _record(folder: Path, number: int) -> dict[str, Any]:
    """The book's word on an attempt; nothing where no launcher began it."""
    return book.read_json(str(Path(book.attempt_dir(str(folder), number)) / "attempt.json")) or {}


def _files(where: Path) -> list[Path]:
    """What lies in an attempt's folder, but for files that are just being written."""
    return [p for p in where.glob("*") if not p.name.startswith(".") and p.suffix != ".tmp"]


def _reached(folder: Path, attempts: list[dict[str, Any]]) -> tuple[str, dict[str, Any] | None]:
    """State and cause of the last attempt, unless it changed nothing of what the run had reached before it.

    The trainer's own word is ``state.json``: it says "running" from the first thing that an attempt does to a run, and
    "failed" where that fails. Where it still says "finished", or says "stopped" while the ranks were refused (exit code
    2), the run is what it was.
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
    reported = cause_of(
        "refused" if refused else "unchanged",
        f"attempt {last['number']} {'was refused' if refused else 'ended before it changed anything'}: {why}",
    )
    return earlier, reported


def _last_step(folder: Path, numbers: list[int]) -> int | None:
    if not numbers:
        return None
    beats = book.ranked(book.attempt_dir(str(folder), numbers[-1]), "alive")
    steps = [b["step"] for b in beats.values() if isinstance(b.get("step"), int)]
    return max(steps) if steps else None


def _energy(attempts: list[dict[str, Any]]) -> float | None:
    joules = [a["energy_j"] for a in attempts if a["energy_j"]]
    return round(sum(joules) / 3.6e6, 4) if joules else None
