"""This machine: the same script, run by bash in the foreground with its own process group (also for mpirun)."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

from aifactory_train.core.errors import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, UserError
from aifactory_train.launchers.backends.base import Backend, Job, register
from aifactory_train.launchers.programs import attempt


@register
class Local(Backend):
    """The script as a process of this machine."""

    name = "local"
    title = "this machine"
    aliases = ("torchrun",)
    schedulers: ClassVar[tuple[str, ...]] = ("none",)
    programs = ("bash",)
    batch = False
    software = "here"
    arrays = False
    chain = False
    job_id = "local:$$"

    def submit(self, run_dir: Path, *, test_only: bool = False) -> str:
        """Start the script in the background and return ``local:PID``."""
        if test_only:
            return "local"
        return f"local:{self._start(run_dir).pid}"

    def _start(self, run_dir: Path) -> subprocess.Popen[bytes]:
        """The script in a process group of its own, both streams to ``logs/job.out``."""
        (run_dir / "logs").mkdir(exist_ok=True)
        with open(run_dir / "logs" / "job.out", "ab") as log:
            return subprocess.Popen(
                ["bash", str(run_dir / "submission" / "job.sh")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def run(self, run_dir: Path) -> int:
        """Run in the foreground, showing rank 0's log as it grows. Ctrl-C asks for a clean stop, a second one ends at
        once.
        """
        if shutil.which("bash") is None:
            raise UserError("there is no bash on this machine", where="PATH")
        before = attempt.attempt_numbers(str(run_dir))
        log_path = run_dir / "logs" / "job.out"
        begin = log_path.stat().st_size if log_path.exists() else 0
        process = self._start(run_dir)
        (run_dir / "submission" / "jobs").write_text(f"local:{process.pid}\n")
        interrupted = 0
        shown = 0
        while True:
            try:
                status = process.poll()
                shown = self._show(run_dir, before, shown)
                if status is not None:
                    shown = self._show(run_dir, before, shown)
                    break
                time.sleep(0.2)
            except KeyboardInterrupt:
                interrupted += 1
                if interrupted == 1:
                    print("stopping after this step; press Ctrl-C again to end at once", file=sys.stderr)
                    beside = run_dir / f".stop.{os.getpid()}.tmp"
                    beside.write_text("interrupted from the keyboard\n")
                    os.replace(beside, run_dir / "stop")  # whole or not at all: the script may take it away now
                else:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGTERM)
                    if interrupted > 2:
                        with contextlib.suppress(ProcessLookupError):
                            os.killpg(process.pid, signal.SIGKILL)
        with open(log_path, "rb") as log:
            log.seek(begin)
            sys.stderr.write(log.read().decode(errors="replace"))
        return {0: EXIT_DONE, 75: EXIT_STOPPED}.get(status, EXIT_FAILED)

    def _show(self, run_dir: Path, before: list[int], offset: int) -> int:
        """Copy what is new in rank 0's log to standard output."""
        new = [n for n in attempt.attempt_numbers(str(run_dir)) if n not in before]
        if not new:
            return offset
        path = run_dir / "attempts" / f"{new[-1]:03d}" / "rank-0.log"
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                data = file.read()
        except OSError:
            return offset
        sys.stdout.write(data.decode(errors="replace"))
        sys.stdout.flush()
        return offset + len(data)

    def jobs_of(self, run_dir: Path) -> list[str] | None:
        return []  # each is noted down where it is started

    def query(self, job: str) -> Job | None:
        """Whether the script's process still lives; how it ended stands in the run folder."""
        pid = job.partition(":")[2]
        if not pid.isdigit():
            return None
        stat = Path(f"/proc/{pid}/stat")
        try:
            os.kill(int(pid), 0)
            alive = not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"
            if alive and Path(f"/proc/{pid}/cmdline").exists():
                alive = b"job.sh" in Path(f"/proc/{pid}/cmdline").read_bytes()
        except (ProcessLookupError, PermissionError, FileNotFoundError):
            alive = False
        return Job(id=job, state="running", raw="process lives") if alive else None

    def cancel(self, job: str) -> None:
        found = self.query(job)
        if found is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(job.partition(":")[2]), signal.SIGTERM)

    def task_job(self, job: str, task: int) -> str:
        return job  # a process has no tasks
