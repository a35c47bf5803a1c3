"""A check that hangs, crashes or raises fails with its reason, and the next ones run; what is written, and what a job
makes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aifactory_train import cli
from aifactory_train.acceptance import page, running
from aifactory_train.acceptance.checks import BY_NAME, CHECKS, LIMIT_S, QUICK_LIMIT_S, AcceptanceCheck
from aifactory_train.acceptance.running import Acceptance
from aifactory_train.launchers.programs import attempt

LAB = """
import ctypes, os, signal, subprocess, sys, time
from aifactory_train.acceptance.report import NotHere

def machine(report):
    report.figures |= {"host": {"name": "<here>", "isa": "x86_64"}, "versions": {}, "runtime": {}, "gpus": []}

def good(report):
    report.figures["speed"] = 2.34567
    report.said.append("as it should be")

def hangs(report):
    subprocess.Popen([sys.executable, "-c", f"import time; time.sleep(60) # {report.work}"])
    report.begin("the third part")
    time.sleep(60)

def segfault(report):
    report.begin("a kernel")
    ctypes.string_at(0)

def vanishes(report):
    os._exit(0)

def killed(report):
    report.expect(False, "already wrong")
    report.begin("too much memory")
    os.kill(os.getpid(), signal.SIGKILL)

def raises(report):
    raise RuntimeError("<script>alert(1)</script>")

def parts(report):
    with report.part("one"):
        raise ValueError("first")
    with report.part("two"):
        raise NotHere("no such thing")
    with report.part("three"):
        report.figures["reached"] = float("nan")

def elsewhere(report):
    raise NotHere("needs a package")
"""


def lab(name: str, seconds: int = 10, **more) -> AcceptanceCheck:
    return AcceptanceCheck(name, "a test", f"lab.faults:{name}", seconds, seconds, **more)


@pytest.fixture
def acceptance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Acceptance:
    """On a machine without GPUs, whose checks are those of :data:`LAB` (no torch, so that each takes a moment)."""
    package = tmp_path / "package" / "lab"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "faults.py").write_text(LAB)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'package'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setattr(running, "MACHINE", lab("machine"))
    return Acceptance(tmp_path / "out", quick=True)


def test_whatever_a_check_does_the_next_one_runs(acceptance: Acceptance, monkeypatch) -> None:
    monkeypatch.setattr(AcceptanceCheck, "limit", lambda self, quick, gpu=True: 6 if self.name == "hangs" else 60)
    names = ("hangs", "segfault", "vanishes", "killed", "raises", "parts", "elsewhere", "good")
    found = {result["name"]: result for result in acceptance.run([lab(name) for name in names])}
    assert tuple(found) == names
    assert [found[name]["status"] for name in names] == ["FAIL"] * 6 + ["SKIP", "PASS"]
    why = {name: result["why"] for name, result in found.items()}
    assert why["hangs"] == "did not end within 6 s (in: the third part)"
    assert "SIGSEGV (in: a kernel)" in why["segfault"]
    assert "exit code 0 and no result" in why["vanishes"]
    assert "SIGKILL" in why["killed"] and "out-of-memory killer" in why["killed"] and "already wrong" in why["killed"]
    assert why["raises"] == "start: RuntimeError: <script>alert(1)</script>"
    assert why["parts"] == "one: ValueError: first"
    assert found["parts"]["figures"] | {"seconds_of": 0} == {
        "left_out": {"two": "no such thing"}, "reached": "nan", "seconds_of": 0,
    }  # fmt: skip
    assert why["elsewhere"] == "needs a package" and why["good"] == "as it should be"
    assert found["good"]["figures"] == {"speed": 2.346}
    assert "in hangs" in (acceptance.logs / "hangs.log").read_text()  # its stacks
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(acceptance.scratch).encode() in _bytes(p)]
    assert not left and not acceptance.scratch.exists()
    text = page.render(page.summary(acceptance, None))
    assert "<script>alert" not in text and "&lt;script&gt;alert(1)" in text and "&lt;here&gt;" in text
    assert "src=" not in text and "http://" not in text and "https://" not in text


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_what_is_not_begun_says_why(acceptance: Acceptance) -> None:
    acceptance.machine = {"gpus": []}
    assert "no GPU here: only there" in acceptance.why_not(lab("good", cpu="only there"))
    assert acceptance.why_not(lab("good")) == "" == acceptance.why_not(lab("good", gpus=2))
    assert "--quick" in acceptance.why_not(AcceptanceCheck("slow", "", "lab.faults:good", 10, None))
    acceptance.machine = {"gpus": [{}]}
    assert acceptance.why_not(lab("good", gpus=2)) == "1 GPU here, this needs 2"
    acceptance.limit_s = 0.0
    assert "time of the whole acceptance" in acceptance.why_not(lab("good"))


def test_a_machine_whose_torch_cannot_be_asked_fails(acceptance: Acceptance, monkeypatch) -> None:
    monkeypatch.setattr(running, "MACHINE", lab("raises"))
    found = acceptance.run([lab("good")])
    assert [(r["name"], r["status"]) for r in found] == [("raises", "FAIL"), ("good", "PASS")]


def test_the_end_of_the_job_is_the_end_of_its_check(acceptance: Acceptance, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from aifactory_train.acceptance import running\n"
        "from aifactory_train.acceptance.checks import AcceptanceCheck as C\n"
        "running.MACHINE = C('machine', '', 'lab.faults:machine', 30, 30)\n"
        "running.Acceptance(Path(sys.argv[1])).run([C('hangs', '', 'lab.faults:hangs', 60, 60)])"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    job = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "job")], env=environment)
    end = time.monotonic() + 30
    while not running_here(tmp_path, "time.sleep(60)") and time.monotonic() < end:
        time.sleep(0.05)
    assert running_here(tmp_path, "time.sleep(60)")
    job.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    assert job.poll() is None  # a warning, no more
    job.terminate()
    assert job.wait(timeout=30) == 128 + signal.SIGTERM
    assert not running_here(tmp_path, "") and not list(tmp_path.glob("aifactory-accept-*"))


def running_here(scratch: Path, words: str) -> list[Path]:
    """Processes of checks whose files are below ``scratch``."""
    return [p for p in Path("/proc").glob("[0-9]*/cmdline")
            if f"{scratch}/aifactory-accept-".encode() in _bytes(p) and words.encode() in _bytes(p)]  # fmt: skip


def test_a_check_that_the_whole_time_cuts_did_not_fail(acceptance: Acceptance) -> None:
    acceptance.limit_s = running.LEAST_S + 3
    found = acceptance.run([lab("hangs", seconds=60), lab("good")])
    assert [result["status"] for result in found] == ["SKIP", "SKIP"]
    assert "cut by the time of the whole" in found[0]["why"] and "the third part" in found[0]["why"]


def test_times_add_up() -> None:
    assert sum(check.seconds for check in CHECKS) <= LIMIT_S < 600
    assert sum(check.quick or 0 for check in CHECKS) <= QUICK_LIMIT_S < 180
    assert all(check.limit(quick) == 2 * (check.quick if quick else check.seconds)
               for check in CHECKS for quick in (True, False) if check.quick or not quick)  # fmt: skip
    assert len(BY_NAME) == len(CHECKS) == 17


# ---- the command


def accept(capsys, *argv: object) -> tuple[int, str, str]:
    code = cli.main(["accept", *map(str, argv)])
    said = capsys.readouterr()
    return code, said.out, said.err


def test_bad_input_is_refused(capsys, tmp_path: Path, monkeypatch) -> None:
    code, _, err = accept(capsys, "--check", "curvs", "--out", tmp_path)
    assert code == 2 and "did you mean 'curves'" in err
    code, _, err = accept(capsys, "--site", "nowhere", "--check", "truth", "--out", tmp_path)
    assert code == 2 and "nowhere" in err
    (tmp_path / "file").write_text("")
    code, _, err = accept(capsys, "--check", "truth", "--out", tmp_path / "file")
    assert code == 2 and "file" in err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = accept(capsys, "--out", tmp_path)
    assert code == 2 and "torch is not installed" in err and "launch --accept" in err


def test_the_list_needs_no_torch(capsys, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    code, out, _ = accept(capsys, "--list", "--json")
    assert code == 0 and [row["name"] for row in json.loads(out)] == [check.name for check in CHECKS]


def test_cheap_checks_of_this_machine(capsys, tmp_path: Path) -> None:
    """Really run, each in its own process; compared with a profile that is of another machine."""
    asked = [word for name in ("loss", "truth", "energy") for word in ("--check", name)]
    code, out, err = accept(capsys, *asked, "--site", "jupiter-booster", "--json", "--out", tmp_path)
    assert code == 0, err
    found = json.loads(out)
    assert found == json.loads((tmp_path / "acceptance.json").read_text())
    status = {check["name"]: check["status"] for check in found["checks"]}
    assert status == {"truth": "PASS", "loss": "PASS", "energy": "SKIP"}
    assert all(set(c) == {"name", "status", "seconds", "figures", "why"} for c in found["checks"])
    assert "no GPU" in found["checks"][2]["why"]
    assert found["gpus"] == 0 and found["chip"] is None and found["versions"]["torch"]
    isa = next(row for row in found["facts"] if row["fact"] == "node.isa")
    assert isa["profile"] == "aarch64" and (isa["verdict"] == "confirmed") is (isa["observed"] == "aarch64")
    assert "acceptance" in (tmp_path / "acceptance.html").read_text().lower()


@pytest.mark.parametrize("failing", [False, True])
def test_in_a_job_it_is_an_attempt_like_any_other(failing: bool, capsys, tmp_path: Path, monkeypatch) -> None:
    """The outcome tells ``status`` how it ended, and nothing is tried again."""

    def run(self: Acceptance, checks):
        self.machine = {"host": {"name": "here"}, "gpus": []}
        for check in checks:
            status = "FAIL" if failing and check.name == "loss" else "PASS"
            self.add({"name": check.name, "status": status, "seconds": 1.0, "figures": {}, "why": "because"})
        return self.results

    monkeypatch.setattr(Acceptance, "run", run)
    run_dir = tmp_path / "run"
    (run_dir / "attempts" / "001").mkdir(parents=True)
    code, out, err = accept(capsys, "--out", run_dir / "acceptance", "--run-dir", run_dir, "--attempt", 1, "--stop-at",
                            "1e10", "--check", "truth", "--check", "loss")  # fmt: skip
    assert code == int(failing), err
    state, cause = attempt.diagnose(str(run_dir / "attempts" / "001"), 1)
    assert json.loads((run_dir / "acceptance" / "acceptance.json").read_text())["totals"]["FAIL"] == int(failing)
    if failing:
        assert "1 of 2 checks failed: loss" in err and "Traceback" not in err
        decided = attempt.decide(str(run_dir), 1, state, cause, "", {"restarts": {"crash": 1}, "resubmit": "chain"})
        assert state == "failed" and "loss" in cause["message"] and decided["action"] == "end"
    else:
        assert state == "done" and "2 passed" in out
        assert json.loads((run_dir / "state.json").read_text())["state"] == "finished"


@pytest.mark.slow
def test_the_whole_on_this_machine(capsys, tmp_path: Path) -> None:
    """Every check is made, or says why a machine like this cannot make it."""
    import torch

    code, out, err = accept(capsys, "--json", "--out", tmp_path)
    found = json.loads(out)
    status = {check["name"]: check["status"] for check in found["checks"]}
    assert code == 0 and found["totals"]["FAIL"] == 0, err
    assert list(status) == list(BY_NAME) and all(c["why"] for c in found["checks"] if c["status"] == "SKIP")
    if not torch.cuda.is_available():
        skipped = {name for name, what in status.items() if what == "SKIP"}
        assert {"speed", "energy", "bandwidth"} <= skipped <= {"speed", "energy", "bandwidth", "nf4"}
