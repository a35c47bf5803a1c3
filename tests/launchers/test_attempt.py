"""Judging an attempt from its files, and deciding what comes next: the logic that runs inside jobs, without a scheduler."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from aifactory_train.launchers.programs import attempt

PROGRAM = Path(attempt.__file__)
POLICY = {
    "resubmit": "chain",
    "unattended": True,
    "links": 0,
    "restarts": {"time": 3, "node": 2, "crash": 1, "preempted": 2},
}


class Run:
    """A run folder with as many attempts as asked for."""

    def __init__(self, path: Path, policy: dict | None = None):
        self.path = path
        (path / "submission").mkdir(parents=True)
        (path / "submission" / "policy.json").write_text(json.dumps({**POLICY, **(policy or {})}))

    def begin(self, **more) -> list[str]:
        argv = ["begin", "--run", str(self.path), "--job", str(more.pop("job", 1)), "--nodes", "a,b", "--world", "4"]
        for key, value in more.items():
            argv += [f"--{key.replace('_', '-')}", str(value)]
        done = subprocess.run([sys.executable, str(PROGRAM), *argv], capture_output=True, text=True, check=True)
        return done.stdout.split(None, 1)

    def folder(self, number: int) -> Path:
        return self.path / "attempts" / f"{number:03d}"

    def put(self, number: int, name: str, **value) -> None:
        self.folder(number).mkdir(parents=True, exist_ok=True)
        (self.folder(number) / name).write_text(json.dumps(value))

    def checkpoint(self, step: int) -> None:
        (self.path / "checkpoints" / f"step-{step}").mkdir(parents=True)
        (self.path / "checkpoints" / f"step-{step}" / "COMPLETE").write_text("{}")

    def close(self, number: int) -> list[str]:
        done = subprocess.run(
            [sys.executable, str(PROGRAM), "close", "--run", str(self.path), "--attempt", str(number), "--rc", "1"],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    def all(self, number: int, status: str, **more) -> None:
        for rank in range(4):
            self.put(
                number,
                f"outcome-{rank}.json",
                rank=rank,
                host="x",
                status=status,
                exit_code=0,
                step=3,
                ended=time.time(),
                **more,
            )

    def record(self, number: int) -> dict:
        return json.loads((self.folder(number) / "attempt.json").read_text())


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run")


def test_it_parses_as_python_3_6():
    """Hosts of compute nodes have old Pythons: no syntax newer than 3.6, nothing but the standard library."""
    import ast

    source = PROGRAM.read_text()
    tree = ast.parse(source, feature_version=(3, 6))
    names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert names <= set(sys.stdlib_module_names)
    assert not any(isinstance(n, (ast.NamedExpr, ast.Match)) for n in ast.walk(tree))


def test_done_and_stopped_and_resumed(run):
    assert run.begin() == ["go", "001\n"]
    run.all(1, "stopped", message="deadline")
    run.checkpoint(3)
    assert run.close(1)[:2] == ["chain", "stopped"]
    assert run.begin(job=2) == ["go", "002\n"]
    assert run.record(2)["step_from"] == 3
    run.all(2, "done")
    assert run.close(2)[:2] == ["end", "done"]
    assert run.begin(job=3)[0] == "end"


def test_a_request_to_stop_is_final_until_resumed(run):
    run.begin()
    (run.path / "stop").write_text("user 12:00\n")
    run.all(1, "stopped")
    assert run.close(1)[:2] == ["end", "stopped"]
    assert run.begin(job=2)[0] == "end"
    (run.path / "submission" / "again").write_text("")
    assert run.begin(job=3)[0] == "go"
    assert not (run.path / "stop").exists()


def test_an_automatic_stop_file_does_not_survive_into_the_next_attempt(run):
    run.begin()
    (run.path / "stop").write_text("time-limit\n")
    run.all(1, "stopped")
    run.checkpoint(3)
    assert run.close(1)[0] == "chain"
    assert run.begin(job=2)[0] == "go" and not (run.path / "stop").exists()


@pytest.mark.parametrize("text", ["user 12:00 by me@here of attempt 1\n", "interrupted from the keyboard\n", ""])
def test_a_request_is_answered_once_and_kept_with_its_attempt(run, text):
    run.begin()
    (run.path / "stop").write_text(text)
    run.all(1, "stopped", message="stopped after step 3: stop file")
    run.checkpoint(3)
    assert run.close(1)[:2] == ["end", "stopped"]
    assert not (run.path / "stop").exists() and (run.folder(1) / "stop-request.txt").read_text() == text
    assert run.begin(job=2)[0] == "end", "a link that was queued before"


def test_the_ranks_word_counts_where_the_file_is_gone_or_was_written_over(run):
    """The warning of the time limit comes while the ranks save because somebody asked them to."""
    run.begin()
    (run.path / "stop").write_text("time-limit\n")
    run.all(1, "stopped", message="stopped after step 3: stop file", stop_request="user 12:00")
    run.checkpoint(3)
    assert run.close(1)[:2] == ["end", "stopped"]
    assert "user 12:00" in run.record(1)["decision"]["why"]


def test_a_stop_file_that_somebody_removed_is_no_time_limit(run):
    run.begin()
    run.all(1, "stopped", message="stopped after step 3: stop file")
    run.checkpoint(3)
    assert run.close(1)[:2] == ["end", "stopped"]


def test_the_time_limits_own_file_goes_on(run):
    run.begin()
    (run.path / "stop").write_text("time-limit\n")
    run.all(1, "stopped", message="stopped after step 3: stop file", stop_request="time-limit")
    run.checkpoint(3)
    assert run.close(1)[0] == "chain" and run.record(1)["decision"]["counted_as"] == "time"


@pytest.mark.parametrize("end", ["killed", "lost node", "preempted"])
def test_nothing_follows_a_stop_whatever_else_happened(run, end):
    run.begin(job=5)
    (run.path / "stop").write_text("user 12:00\n")
    if end == "killed":
        run.put(1, "exit-2.json", rank=2, node="b", exit_code=137, signal=9, terminated=False, ended=time.time())
        assert run.close(1)[0] == "end"
    elif end == "lost node":
        (run.folder(1) / "node-state.txt").write_text("b down*\n")
        run.all(1, "stopped")
        assert run.close(1)[0] == "end"
    else:
        (run.folder(1) / "signal.txt").write_text("TERM 1\n")
        run.all(1, "stopped")
    assert run.begin(job=5, restart=1)[0] == "end"
    assert run.record(1)["decision"]["final"] and not (run.path / "stop").exists()


@pytest.mark.parametrize("reason", ["user 12:00", "time-limit"])
def test_a_stop_before_any_rank_began(run, reason):
    """The batch script starts no ranks where the file is there: that is no failure of the launcher."""
    run.begin()
    run.put(1, "place-0.json", rank=0, node="a", started=1)  # the pre-flight was there
    (run.path / "stop").write_text(reason + "\n")
    action, state, _ = run.close(1)
    assert state == "stopped" and action == ("end" if reason.startswith("user") else "chain")
    assert "before any rank began" in run.record(1)["cause"]["message"]


def test_a_stop_between_two_attempts_ends_every_job_that_is_queued(run):
    run.begin()
    run.all(1, "stopped")
    run.checkpoint(3)
    assert run.close(1)[0] == "chain"
    (run.path / "stop").write_text("user 12:00\n")
    assert run.begin(job=2)[0] == "end" and run.begin(job=3)[0] == "end"
    assert len(attempt.attempt_numbers(str(run.path))) == 1


def test_a_resumption_is_newer_than_a_request_and_a_later_request_newer_still(run):
    import os

    run.begin()
    (run.path / "stop").write_text("user 12:00\n")
    again = run.path / "submission" / "again"
    again.write_text("")
    os.utime(run.path / "stop", (1e9, 1e9))
    os.utime(again, (1e9 + 1, 1e9 + 1))
    assert run.begin(job=2)[0] == "go" and not (run.path / "stop").exists()
    run.all(2, "stopped")
    run.checkpoint(3)
    again.write_text("")
    (run.path / "stop").write_text("user 12:05\n")
    os.utime(again, (1e9, 1e9))
    assert run.begin(job=3) == ["end", "a stop was asked for: user 12:05\n"], "asked while the job waited"
    again.write_text("")
    os.utime(again, (4e9, 4e9))
    assert run.begin(job=4)[0] == "go"


def test_a_second_script_on_the_same_machine_does_nothing(run):
    """Two `job.sh` of one folder started by hand: the second one must neither close the first one's attempt nor take its request."""
    shell = subprocess.Popen(["sleep", "60"])
    try:
        assert run.begin(job="local:1", shell=shell.pid) == ["go", "001\n"]
        before = (run.folder(1) / "attempt.json").read_text()
        (run.path / "stop").write_text("user 12:00\n")
        verdict, why = run.begin(job="local:2", shell=shell.pid + 1)
        assert verdict == "end" and f"attempt 001 is at work on this machine (process {shell.pid})" in why
        assert (run.folder(1) / "attempt.json").read_text() == before and (run.path / "stop").exists()
    finally:
        shell.kill()
        shell.wait()
    (run.path / "stop").unlink()
    run.put(1, "alive-0.json", rank=0, host="x", step=4, time=1)
    run.put(1, "exit-0.json", rank=0, exit_code=137, signal=9, terminated=False, ended=1.0)
    assert run.begin(job="local:3", shell=1) == ["go", "002\n"], "it is gone by now"


def test_of_many_scripts_at_once_one_begins(run):
    import os

    argv = [sys.executable, str(PROGRAM), "begin", "--run", str(run.path), "--world", "1", "--shell"]
    shells = [subprocess.Popen(["sleep", "60"]) for _ in range(8)]
    try:
        started = [
            subprocess.Popen([*argv, str(s.pid), "--job", str(s.pid)], stdout=subprocess.PIPE, text=True)
            for s in shells
        ]
        said = [p.communicate()[0].split(None, 1) for p in started]
    finally:
        for shell in shells:
            shell.kill()
            shell.wait()
    assert sorted(word for word, _ in said) == ["end"] * 7 + ["go"], said
    assert os.listdir(run.path / "attempts") == ["001"]


@pytest.mark.parametrize("asked", [False, True])
def test_an_attempt_that_was_refused_beside_another_one_decides_nothing(run, asked):
    """On two machines nobody can look at the other: the trainer finds out, and its refusal is not the end of the other's chain."""
    run.begin(job=1)
    for rank in range(4):
        run.put(1, f"alive-{rank}.json", rank=rank, host="x", step=1, time=1)
    assert run.begin(job=2) == ["go", "002\n"]
    if asked:
        (run.path / "stop").write_text("user 12:00\n")
    live = {"exception": "RunIsLive", "message": "a run is live here (process 7 on a)", "exit_code": 2}
    for rank in range(4):
        run.put(2, f"outcome-{rank}.json", rank=rank, status="failed", ended=1.0, **live)
    assert run.close(2)[0] == "end" and not run.record(2)["decision"]["final"]
    assert run.record(2)["cause"]["kind"] == "occupied" and (run.path / "stop").exists() is asked
    run.all(1, "stopped")
    run.checkpoint(3)
    assert run.close(1)[0] == ("end" if asked else "chain")
    assert run.begin(job=3)[0] == ("end" if asked else "go")
    if not asked:
        run.all(3, "stopped")
        assert run.close(3)[0] == "chain", "the refused one is no attempt that saved nothing"


def test_another_jobs_look_at_an_open_attempt_leaves_the_request_where_it_is(run):
    """The attempt may be at work on another machine: it must hear that it is to stop."""
    run.begin(job=1)
    (run.path / "stop").write_text("user 12:00\n")
    assert run.begin(job=2)[0] == "end" and (run.path / "stop").exists()
    run.all(1, "stopped", message="stopped after step 3: stop file", stop_request="user 12:00")
    assert run.close(1)[:2] == ["end", "stopped"] and not (run.path / "stop").exists()


@pytest.mark.parametrize(("resubmit", "action"), [("requeue", "requeue"), ("chain", "chain"), ("none", "end")])
def test_the_sites_way_is_followed(tmp_path, resubmit, action):
    run = Run(tmp_path / "run", {"resubmit": resubmit})
    run.begin()
    run.all(1, "stopped")
    run.checkpoint(3)
    assert run.close(1)[0] == action


def test_crash_goes_to_a_fresh_job_even_where_requeue_is_the_way(tmp_path):
    run = Run(tmp_path / "run", {"resubmit": "requeue"})
    run.begin()
    run.put(1, "exit-2.json", rank=2, node="b", exit_code=137, signal=9, terminated=False, ended=time.time())
    assert run.close(1)[0] == "chain"


def test_no_person_no_restart(tmp_path):
    run = Run(tmp_path / "run", {"unattended": False})
    run.begin()
    run.all(1, "stopped")
    run.checkpoint(3)
    assert run.close(1)[0] == "end"
    assert "person" in run.record(1)["decision"]["why"]


def test_counters_are_separate_and_limits_hold(run):
    for number in range(1, 4):
        assert run.begin(job=number)[0] == "go"
        run.all(number, "stopped")
        run.checkpoint(number)
        assert run.close(number)[0] == "chain"
    run.begin(job=4)
    run.all(4, "stopped")
    run.checkpoint(9)
    assert run.close(4)[0] == "end"
    assert "the limit is 3" in run.record(4)["decision"]["why"]
    assert attempt.counters(str(run.path)) == {"time": 3, "node": 0, "crash": 0, "preempted": 0}


def test_no_progress_twice_ends_the_run(run):
    run.begin()
    run.all(1, "stopped")
    assert run.close(1)[0] == "chain", "once may be bad luck"
    run.begin(job=2)
    run.all(2, "stopped")
    assert run.close(2)[0] == "end"
    assert "no new checkpoint" in run.record(2)["decision"]["why"]


def test_the_same_crash_at_the_same_step_ends_the_run(tmp_path):
    run = Run(tmp_path / "run", {"restarts": {"crash": 9, "time": 9, "node": 9, "preempted": 9}})
    for number in (1, 2):
        run.begin(job=number)
        run.checkpoint(number)
        run.put(number, "alive-1.json", rank=1, host="x", step=7, time=time.time())
        run.put(number, "exit-1.json", rank=1, node="a", exit_code=139, signal=11, terminated=False, ended=time.time())
        action = run.close(number)[0]
    assert action == "end" and "twice at step 7" in run.record(2)["decision"]["why"]


def test_bad_nodes_are_excluded_from_then_on(tmp_path):
    run = Run(tmp_path / "run", {"exclude": ["z"]})
    for number, node in ((1, "a"), (2, "b")):
        run.begin(job=number)
        (run.folder(number) / "node-state.txt").write_text(f"{node} down*\n")
        reported = run.close(number)
    assert reported[0] == "chain" and set(reported[2].split(",")) == {"a", "b", "z"}
    assert run.record(2)["decision"]["counted_as"] == "node"


def test_down_nodes_of_other_jobs_are_not_blamed(run):
    run.begin()
    (run.folder(1) / "node-state.txt").write_text("c down*\na idle\n")
    run.all(1, "done")
    assert run.close(1)[:2] == ["end", "done"]


def test_interrupted_attempt_is_closed_by_the_next(run):
    run.begin(job=5)
    run.put(1, "alive-0.json", rank=0, host="x", step=4, time=time.time())
    (run.folder(1) / "signal.txt").write_text("TERM 1\n")
    assert run.begin(job=5, restart=1, node_state="b down*")[0] == "go"
    record = run.record(1)
    assert record["state"] == "failed" and record["cause"]["kind"] == "node-failure" and record["cause"]["node"] == "b"
    assert record["decision"]["action"] == "requeued"


FILES = {
    "first to raise is the cause": (
        {"outcome-0": {"status": "failed", "exception": "RuntimeError", "message": "[gloo] Connection closed by peer", "ended": 9.0}, "outcome-1": {"status": "failed", "exception": "ValueError", "message": "bad row", "ended": 10.0}},
        (1, "exception"),
    ),
    "a killed rank beats those that lost it": (
        {"outcome-0": {"status": "failed", "exception": "DistBackendError", "message": "NCCL error", "ended": 11.0}, "exit-1": {"exit_code": 137, "signal": 9, "terminated": False, "ended": 10.0}},
        (1, "signal"),
    ),
    "a rank that was told to end is no cause": (
        {"exit-0": {"exit_code": 143, "signal": 15, "terminated": True, "ended": 9.0}, "outcome-1": {"status": "failed", "exception": "KeyError", "message": "x", "ended": 10.0}},
        (1, "exception"),
    ),
    "the silent rank hung": (
        {"outcome-0": {"status": "failed", "exception": "RuntimeError", "message": "Timed out waiting 60000ms for recv", "ended": 10.0, "step": 5}, "alive-1": {"step": 4, "time": 3.0}},
        (1, "hang"),
    ),
    "the trainer's own watchdog knows who hung": (
        {"outcome-0": {"status": "failed", "exception": "TimeoutError", "message": "timed out waiting for other ranks", "ended": 9.0}, "outcome-1": {"status": "failed", "exception": "Hang", "message": "no progress for 60 s", "ended": 10.0}},
        (1, "hang"),
    ),
    "memory is named": (
        {"outcome-0": {"status": "failed", "exception": "torch.OutOfMemoryError", "message": "CUDA out of memory", "ended": 9.0}, "outcome-1": {"status": "failed", "exception": "RuntimeError", "message": "NCCL timeout", "ended": 10.0}},
        (0, "out-of-memory"),
    ),
    "an exit without a word": ({"exit-0": {"exit_code": 9, "signal": None, "terminated": False, "ended": 9.0}, "outcome-1": {"status": "failed", "exception": "RuntimeError", "message": "connection reset", "ended": 9.5}}, (0, "exit")),
    "an end with 0 before the work was done": ({"exit-0": {"exit_code": 0, "signal": None, "terminated": False, "ended": 9.0}, "outcome-1": {"status": "failed", "exception": "RuntimeError", "message": "connection reset", "ended": 9.5}}, (0, "exit")),
    "a rank that vanished": ({"alive-0": {"step": 3, "time": 2.0}, "outcome-1": {"status": "failed", "exception": "RuntimeError", "message": "Connection reset by peer", "ended": 9.5}}, (0, "lost")),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES, ids=[c.replace(" ", "-") for c in FILES])
def test_true_cause(tmp_path, case):
    files, (rank, kind) = FILES[case]
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    state, cause = attempt.diagnose(str(tmp_path), 2)
    assert state == "failed" and (cause["rank"], cause["kind"]) == (rank, kind), cause


#: What is printed before a process is aborted -> the kind of the cause.
PRINTED = [
    ("[rank1]:[E1130 ProcessGroupNCCL.cpp:2068] Process group watchdog thread terminated with exception: CUDA error: uncorrectable ECC error encountered", "gpu-fault"),
    ("Memory access fault by GPU node-4 (Agent handle: 0x55) on address 0x7f00. Reason: Page not present or supervisor privilege.", "gpu-error"),
    (":0:rocdevice.cpp:2726: Callback: Queue 0x7f aborting with error : HSA_STATUS_ERROR_EXCEPTION: a hardware exception. code: 0x1016", "gpu-fault"),
    ("[rank1]:[E1130 ProcessGroupNCCL.cpp:683] [Rank 1] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12)", "communication"),
    ("  what():  [/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9", "communication"),
    ("free(): invalid pointer", "signal"),
]  # fmt: skip


@pytest.mark.parametrize("text, kind", PRINTED)
def test_what_was_printed_before_an_abort_is_read(tmp_path, text, kind):
    """No exception passes where a driver, or NCCL's own thread, ends the process."""
    (tmp_path / "exit-0.json").write_text(json.dumps({"exit_code": 134, "signal": 6, "ended": 9.0}))
    (tmp_path / "rank-0.log").write_text(f"step 3\n{text}\nFatal Python error: Aborted\n")
    state, cause = attempt.diagnose(str(tmp_path), 1)
    assert (
        state == "failed"
        and cause["kind"] == kind
        and (" ".join(text.split()) in cause["message"]) is (kind != "signal")
    ), cause


def test_ranks_that_nccl_ended_are_no_cause_where_one_is_silent(tmp_path):
    """Three ranks waited until NCCL ended them; the fourth, which they waited for, had to be killed."""
    for rank in (0, 2, 3):
        (tmp_path / f"exit-{rank}.json").write_text(json.dumps({"exit_code": 134, "signal": 6, "ended": 9.0 + rank}))
        (tmp_path / f"rank-{rank}.log").write_text(PRINTED[3][0])
    (tmp_path / "exit-1.json").write_text(json.dumps({"exit_code": 137, "signal": 9, "terminated": True, "ended": 20}))
    cause = attempt.diagnose(str(tmp_path), 4)[1]
    assert (cause["rank"], cause["kind"]) == (1, "hang") and "gave up waiting" in cause["message"]


def test_the_node_of_a_hang_has_the_scheduler_s_name(tmp_path):
    (tmp_path / "hang.json").write_text(json.dumps({"rank": 1, "node": "h1.cluster.example", "message": "no news"}))
    (tmp_path / "place-1.json").write_text(json.dumps({"rank": 1, "node": "n7", "host": "h1.cluster.example"}))
    assert attempt.diagnose(str(tmp_path), 2)[1]["node"] == "n7"


def test_the_step_of_a_killed_rank_is_what_the_others_reached(tmp_path):
    """Its last heartbeat may be older, and two crashes at one step end the restarts."""
    files = {"alive-1": {"step": 3, "time": 2.0}, "exit-1": {"exit_code": 137, "signal": 9, "ended": 10.0}}
    files["outcome-0"] = {"status": "failed", "exception": "DistBackendError", "message": "NCCL error", "step": 5}
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    assert attempt.diagnose(str(tmp_path), 2)[1]["step"] == 5
    (tmp_path / "outcome-0.json").unlink()
    assert attempt.diagnose(str(tmp_path), 2)[1]["step"] == 3


#: Exception, text -> kind of the cause, what it is counted as (None: not started again).
SAID = [
    ("AcceleratorError", "CUDA error: uncorrectable ECC error encountered", "gpu-fault", "node"),
    ("DistBackendError", "NCCL error: unhandled cuda error: uncorrectable NVLink error detected during the execution", "gpu-fault", "node"),
    ("RuntimeError", "CUDA error: unspecified launch failure", "gpu-fault", "node"),
    ("RuntimeError", "GPU has fallen off the bus", "gpu-fault", "node"),
    ("RuntimeError", "NVRM: Xid (PCI:0000:44:00): 79", "gpu-fault", "node"),
    ("RuntimeError", "HSA_STATUS_ERROR_EXCEPTION: An HSAIL operation resulted in a hardware exception", "gpu-fault", "node"),
    ("RuntimeError", "CUDA error: all CUDA-capable devices are busy or unavailable", "gpu-fault", "node"),
    ("AcceleratorError", "CUDA error: an illegal memory access was encountered", "gpu-error", "crash"),
    ("RuntimeError", "Memory access fault by GPU node-4 on address 0x7f", "gpu-error", "crash"),
    ("RuntimeError", "HSA_STATUS_ERROR_OUT_OF_RESOURCES", "gpu-error", "crash"),
    ("AcceleratorError", "CUDA error: out of memory", "out-of-memory", None),
    ("RuntimeError", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "out-of-memory", None),
    ("DistBackendError", "NCCL error: unhandled cuda error: Cuda failure 2 'out of memory'", "out-of-memory", None),
    ("DistBackendError", "NCCL error: remote process exited", "communication", "crash"),
    ("RuntimeError", "[gloo] Connection closed by peer", "communication", "crash"),
    ("ValueError", "the column 'socket peer' is not there", "exception", None),
    ("ValueError", "NCCL_NET names no plug-in", "exception", None),
    ("ValueError", "row 7 speaks of an ECC error", "exception", None),
    ("ConnectionResetError", "Connection reset by peer", "communication", "crash"),
]  # fmt: skip


@pytest.mark.parametrize("exception, text, kind, counted", SAID)
def test_what_an_error_says_decides_what_follows(run, exception, text, kind, counted):
    run.begin()
    run.put(1, "outcome-0.json", rank=0, status="failed", exception=exception, message=text, ended=9.0, host="b")
    (run.folder(1) / "place-0.json").write_text(json.dumps({"rank": 0, "node": "b"}))
    state, cause = attempt.diagnose(str(run.folder(1)), 1)
    assert state == "failed" and cause["kind"] == kind, cause
    policy = {"restarts": {"node": 3, "crash": 1}, "resubmit": "chain"}
    decision = attempt.decide(str(run.path), 1, state, cause, "", policy)
    assert decision["counted_as"] == counted
    assert decision["exclude"] == (["b"] if counted == "node" else [])


def test_a_first_cause_that_mentions_nccl_is_not_hidden(tmp_path):
    """Rank 0 lost its peer earlier than rank 1 wrote down why it had gone."""
    for rank, (kind, text, ended) in enumerate(
        [("DistBackendError", "NCCL error: remote process exited", 9.0), ("KeyError", "'NCCL_DEBUG' of peer", 10.0)]
    ):
        value = {"rank": rank, "status": "failed", "exception": kind, "message": text, "ended": ended}
        (tmp_path / f"outcome-{rank}.json").write_text(json.dumps(value))
    assert attempt.diagnose(str(tmp_path), 2)[1]["rank"] == 1


def test_nothing_at_all_is_the_launchers_fault(tmp_path):
    (tmp_path / "launcher.log").write_text("srun: error: Unable to create step\n")
    state, cause = attempt.diagnose(str(tmp_path), 2, rc=1)
    assert state == "failed" and cause["kind"] == "launch" and "Unable to create step" in cause["message"]


entry = st.fixed_dictionaries(
    {},
    optional={
        "status": st.sampled_from(["done", "stopped", "failed", "odd"]),
        "exception": st.one_of(
            st.none(), st.sampled_from(["ValueError", "TimeoutError", "Hang", "x.OutOfMemoryError"])
        ),
        "message": st.one_of(st.none(), st.text("ab: \n", max_size=20)),
        "ended": st.one_of(
            st.none(), st.floats(allow_nan=False), st.text("01-T:", max_size=5), st.just("2026-01-01T00:00:00Z")
        ),
        "time": st.one_of(st.none(), st.floats(0, 1e10)),
        "signal": st.one_of(st.none(), st.integers(0, 200), st.sampled_from(["SIGTERM", "9", "NONE"])),
        "exit_code": st.one_of(st.none(), st.integers(-10, 300)),
        "step": st.one_of(st.none(), st.integers(0, 99)),
        "terminated": st.booleans(),
        "node": st.sampled_from(["a", "b"]),
    },
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.tuples(st.sampled_from(["outcome", "exit", "alive", "place"]), st.integers(0, 3)), entry, max_size=10
    ),
    st.integers(1, 4),
)
def test_any_files_give_a_verdict(tmp_path_factory, files, world):
    """Whatever the ranks left: a state, and a cause that names a rank of the world or says that none is known."""
    folder = tmp_path_factory.mktemp("any")
    for (kind, rank), value in files.items():
        (folder / f"{kind}-{rank}.json").write_text(json.dumps(value))
    state, cause = attempt.diagnose(str(folder), world)
    assert state in ("done", "stopped", "failed")
    outcomes = [v for (k, r), v in files.items() if k == "outcome" and r < world]
    if state == "done":
        assert len(outcomes) >= world and all(o.get("status") == "done" for o in outcomes)
    if cause is not None:
        assert cause["rank"] is None or 0 <= cause["rank"] < world
        assert cause["kind"] and isinstance(cause["message"], str)


def test_torn_files_are_no_error(tmp_path):
    (tmp_path / "outcome-0.json").write_text('{"status": "do')
    (tmp_path / "attempt.json").write_text("")
    assert attempt.diagnose(str(tmp_path), 1)[0] == "failed"


def test_preflight_names_the_bad_node(run):
    run.begin()
    for rank, node in enumerate("aabb"):
        problems = ["3 of 4 GPUs are visible"] if rank == 2 else []
        run.put(
            1, f"preflight-{rank}.json", rank=rank, node=node, ok=not problems, problems=problems, allreduce_gb_s=1.5
        )
    done = subprocess.run(
        [sys.executable, str(PROGRAM), "preflight", "--run", str(run.path), "--attempt", "1"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "3 of 4 GPUs" in done.stderr
    reported = run.close(1)
    assert reported[0] == "chain" and reported[2] == "b"
    assert run.record(1)["cause"]["kind"] == "preflight" and run.record(1)["cause"]["node"] == "b"


def test_preflight_names_the_silent_node(run):
    run.begin()
    for rank in (0, 1):
        run.put(
            1,
            f"preflight-{rank}.json",
            rank=rank,
            node="a",
            ok=False,
            problems=["DistStoreError: Timed out after 90 s waiting for clients"],
        )
    subprocess.run(
        [sys.executable, str(PROGRAM), "preflight", "--run", str(run.path), "--attempt", "1"],
        capture_output=True,
        text=True,
    )
    verdict = json.loads((run.folder(1) / "preflight.json").read_text())
    assert not verdict["ok"] and verdict["missing"] == [2, 3] and verdict["nodes"] == ["b"]
