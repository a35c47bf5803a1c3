"""What ``status`` makes of a run folder, alone and with a scheduler that answers late, otherwise, or not at all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from aifactory_train.core.errors import RunFailed
from aifactory_train.launchers import backends
from aifactory_train.launchers.backends import Backend, Job, slurm
from aifactory_train.launchers.follow import status_of
from aifactory_train.launchers.stopping import stop


def unclosed(folder: Path, *, ranks: str, scheduler: str | None, world: int = 2) -> Path:
    """A run whose only attempt the batch shell could not close; the scheduler's last word was kept."""
    attempt = folder / "attempts" / "001"
    attempt.mkdir(parents=True)
    (folder / "submission").mkdir()
    (folder / "submission" / "manifest.json").write_text(json.dumps({"backend": "slurm", "site": "lab"}))
    record = {"number": 1, "job": "18", "world": world, "nodes": ["g1"], "started": 100.0, "gpus": 2}
    (attempt / "attempt.json").write_text(json.dumps(record))
    for rank in range(world):
        outcome = {"rank": rank, "status": ranks, "step": 3, "ended": 160.0, "message": "stopped by SIGTERM"}
        (attempt / f"outcome-{rank}.json").write_text(json.dumps(outcome))
    if scheduler:
        reported = {"job": "18", "state": scheduler, "raw": scheduler.upper(), "nodes": ["g1"]}
        (attempt / "scheduler.json").write_text(json.dumps(reported))
    return folder


@pytest.mark.parametrize(
    ("ranks", "scheduler", "state"),
    [
        ("stopped", "cancelled", "cancelled"),  # quick ranks save between the cancellation and the kill
        ("stopped", "timeout", "stopped"),
        ("stopped", None, "stopped"),
        ("done", "cancelled", "done"),  # nothing was left to cancel
    ],
)
def test_an_attempt_that_nobody_closed(tmp_path, ranks, scheduler, state):
    found = status_of(unclosed(tmp_path / "run", ranks=ranks, scheduler=scheduler), ask=False)
    assert found["state"] == state, found
    if state == "cancelled":
        assert found["cause"]["kind"] == "cancelled" and found["cause"]["step"] == 3
        assert "had saved step 3" in found["cause"]["message"]
    elif state == "done":
        assert found["cause"] is None


# ---- a run that was finished before


def refused_afterwards(folder: Path, *, own: str, code: int, before: str = "done") -> Path:
    """A run that a launcher started, and a later attempt that ended with ``code``; ``own`` is what the trainer's
    state.json says.
    """
    unclosed(folder, ranks=before, scheduler="done")
    (folder / "state.json").write_text(json.dumps({"state": own, "step": 3}))
    later = folder / "attempts" / "002"
    later.mkdir()
    for rank in range(2):
        message = "data.train: other rows than the run was trained on"
        outcome = {"rank": rank, "status": "failed", "exit_code": code, "step": 0, "ended": 200.0}
        (later / f"outcome-{rank}.json").write_text(
            json.dumps({**outcome, "exception": "UserError", "message": message})
        )
    return folder


@pytest.mark.parametrize(
    ("own", "code", "before", "state", "kind"),
    [
        ("finished", 2, "done", "done", "refused"),
        ("finished", 1, "done", "done", "unchanged"),  # lost before it had begun to go on
        ("stopped", 2, "stopped", "stopped", "refused"),
        ("stopped", 1, "stopped", "failed", "exception"),
        ("failed", 1, "done", "failed", "exception"),  # it went on, and broke what there was
        ("running", 2, "done", "failed", "exception"),
    ],
)
def test_what_was_reached_outlives_a_refusal(tmp_path, own, code, before, state, kind):
    run = refused_afterwards(tmp_path / "run", own=own, code=code, before=before)
    found = status_of(run, ask=False)
    assert (found["state"], found["cause"]["kind"]) == (state, kind), found
    assert "other rows" in found["cause"]["message"]
    if kind in ("refused", "unchanged"):
        assert "attempt 2 " in found["cause"]["message"]
    assert found["attempts"][1]["state"] == "failed"


def test_status_of_a_finished_run_names_the_refusal(tmp_path, cli):
    run = refused_afterwards(tmp_path / "run", own="finished", code=2)
    code, out, _ = cli("status", run, "--offline")
    assert code == 0 and out.splitlines()[0].endswith(": done") and "attempt 2 was refused: " in out


# ---- moments in which a job and its files do not say the same yet


class Scheduler(Backend):
    """A backend: the states of jobs, and what happens while it is asked."""

    def __init__(self, **states: str):
        self.states, self.meanwhile = states, lambda: None

    def query(self, job: str) -> Job | None:
        self.meanwhile()
        state = self.states.get(f"job{job}")
        if state == "silent":
            raise RunFailed("the controller does not answer")
        return Job(id=job, state=state) if state else None

    def submit(self, run_dir: Path, *, test_only: bool = False) -> str:
        raise AssertionError("nothing is submitted here")

    def cancel(self, job: str) -> None:
        raise AssertionError("nothing is cancelled here")


@pytest.fixture
def scheduler(monkeypatch):
    def use(**states: str) -> Scheduler:
        made = Scheduler(**states)
        monkeypatch.setattr(backends, "get", lambda name: made)
        return made

    return use


def closed(folder: Path, state: str, action: str, *, final: bool = False, number: int = 1) -> Path:
    """An attempt of job 18 that its batch shell closed."""
    attempt = folder / "attempts" / f"{number:03d}"
    attempt.mkdir(parents=True, exist_ok=True)
    (folder / "submission").mkdir(exist_ok=True)
    (folder / "submission" / "manifest.json").write_text(json.dumps({"backend": "slurm", "site": "lab"}))
    (folder / "submission" / "jobs").write_text("18\n")
    cause = (
        None if state == "done" else {"rank": None, "node": None, "kind": "stopped", "message": "deadline", "step": 3}
    )
    decision = {"action": action, "why": "restart 1 for 'time'", "final": final, "exclude": []}
    record = {"number": number, "job": "18", "world": 2, "nodes": ["g1"], "started": 100.0, "ended": 160.0, "gpus": 2}
    (attempt / "attempt.json").write_text(json.dumps({**record, "state": state, "cause": cause, "decision": decision}))
    return folder


def test_a_number_that_is_just_being_claimed_is_no_attempt(tmp_path, scheduler):
    run = closed(tmp_path / "run", "stopped", "chain")
    (run / "submission" / "jobs").write_text("18\n19\n")
    (run / "attempts" / "002").mkdir()
    (run / "attempts" / "002" / "attempt.json.77.tmp").write_text("{")
    scheduler(job18="done", job19="running")
    found = status_of(run)
    assert found["state"] == "pending" and len(found["attempts"]) == 1
    first = closed(tmp_path / "first", "stopped", "chain")
    (first / "attempts" / "001" / "attempt.json").unlink()
    scheduler(job18="running")
    found = status_of(first)
    assert found["state"] == "running" and not found["attempts"]


def test_a_job_that_closes_its_attempt_while_the_scheduler_is_asked(tmp_path, scheduler):
    run = unclosed(tmp_path / "run", ranks="failed", scheduler=None)
    made = scheduler(job18="failed")
    made.meanwhile = lambda: closed(run, "failed", "end", final=True)
    (last,) = status_of(run)["attempts"]
    assert last["state"] == "failed" and last["final"] and last["why"]


@pytest.mark.parametrize(("action", "goes_on"), [("requeue", True), ("chain", True), ("end", False)])
def test_between_two_attempts_a_run_waits_and_can_be_stopped(tmp_path, scheduler, action, goes_on):
    """The attempt is closed and its job still runs: it is about to submit itself again."""
    run = closed(tmp_path / "run", "stopped", action)
    scheduler(job18="running")
    assert status_of(run)["state"] == ("pending" if goes_on else "stopped")
    if goes_on:
        stop(run, cancel=False)
        assert (run / "stop").read_text().startswith("user")
    else:
        with pytest.raises(RunFailed, match="nothing to stop"):
            stop(run, cancel=False)
    scheduler(job18="done")  # and nobody followed
    assert status_of(run)["state"] == "stopped"


def test_a_successor_that_is_submitted_while_attempts_are_looked_at(tmp_path, scheduler):
    run = closed(tmp_path / "run", "stopped", "chain")
    made = scheduler(job18="done", job19="pending")
    made.meanwhile = lambda: (run / "submission" / "jobs").write_text("18\n19\n")
    assert status_of(run)["state"] == "pending"


def test_cancelled_after_its_ranks_had_saved_and_before_it_could_go_on(tmp_path, scheduler):
    run = closed(tmp_path / "run", "stopped", "requeue")
    scheduler(job18="cancelled")
    found = status_of(run)
    assert found["state"] == "cancelled" and "had saved step 3" in found["cause"]["message"]


def test_a_scheduler_that_does_not_answer_says_nothing_about_the_run(tmp_path, scheduler):
    run = unclosed(tmp_path / "open", ranks="failed", scheduler=None)
    scheduler(job18="silent")
    with pytest.raises(RunFailed, match="does not answer"):
        status_of(run)
    assert status_of(closed(tmp_path / "closed", "done", "end", final=True))["state"] == "done"


@pytest.mark.parametrize(
    ("said", "answers"),
    [
        ("slurm_load_jobs error: Invalid job id specified", 1),
        ("Unable to contact slurm controller (connect failure)", 3),
    ],
)
def test_slurm_is_asked_again_where_it_does_not_answer(tmp_path, monkeypatch, said, answers):
    program, asked = tmp_path / "bin" / "scontrol", tmp_path / "asked"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho x >> '{asked}'\necho '{said}' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))  # no sacct either
    monkeypatch.setattr(slurm, "ANSWER_PAUSES_S", (0.0, 0.0, 0.0))
    if answers == 1:
        assert backends.get("slurm").query("18") is None
    else:
        with pytest.raises(RunFailed, match="Unable to contact"):
            backends.get("slurm").query("18")
    assert len(asked.read_text().splitlines()) == answers
