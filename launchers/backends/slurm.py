"""Slurm: what it can do, and the few commands that submit, ask and cancel."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.launchers.backends.base import Backend, Job, register
from aifactory_train.launchers.backends.commands import ask, succeeded
from aifactory_train.launchers.backends.slurm_options import directives, srun_options
from aifactory_train.launchers.submission import Line, Submission
from aifactory_train.sites.schema import Container

#: Variables of the submitting shell that Slurm's commands need to find their cluster; all other SLURM_* and SBATCH_*
#: are dropped.
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT", "SLURM_JWT", "SLURM_CONF_SERVER")

#: Seconds to wait after each time that the controller did not answer a question.
ANSWER_PAUSES_S = (0.5, 2.0, 0.0)

STATES = {
    "PENDING": "pending",
    "REQUEUED": "pending",
    "REQUEUE_HOLD": "pending",
    "REQUEUE_FED": "pending",
    "SPECIAL_EXIT": "pending",
    "CONFIGURING": "pending",
    "RESV_DEL_HOLD": "pending",
    "SUSPENDED": "running",
    "STOPPED": "running",
    "RUNNING": "running",
    "COMPLETING": "running",
    "SIGNALING": "running",
    "STAGE_OUT": "running",
    "COMPLETED": "done",
    "FAILED": "failed",
    "BOOT_FAIL": "node-fail",
    "LAUNCH_FAILED": "failed",
    "RECONFIG_FAIL": "failed",
    "CANCELLED": "cancelled",
    "REVOKED": "cancelled",
    "TIMEOUT": "timeout",
    "DEADLINE": "timeout",
    "NODE_FAIL": "node-fail",
    "OUT_OF_MEMORY": "out-of-memory",
    "PREEMPTED": "preempted",
}

#: What srun or sbatch would read as an option and the batch script never sets itself.
SCRUBBED = (
    "SLURM_CPU_BIND", "SLURM_CPU_BIND_LIST", "SLURM_CPU_BIND_TYPE", "SLURM_CPU_BIND_VERBOSE", "SLURM_MEM_BIND",
    "SLURM_MEM_BIND_LIST", "SLURM_MEM_BIND_TYPE", "SLURM_GPU_BIND", "SLURM_GPUS_PER_TASK", "SLURM_NTASKS_PER_GPU",
    "SLURM_WAIT", "SLURM_KILL_BAD_EXIT", "SLURM_IMMEDIATE", "SLURM_OVERLAP", "SLURM_EXACT", "SLURM_WHOLE",
    "SLURM_STDOUTMODE", "SLURM_STDERRMODE", "SLURM_STDINMODE", "SLURM_LABELIO", "SLURM_MPI_TYPE", "SLURM_TIMELIMIT",
    "SLURM_WORKING_DIR", "SLURM_NO_KILL", "SLURM_HINT", "SLURM_DISTRIBUTION", "SLURM_CONSTRAINT", "SLURM_RESERVATION",
    "SLURM_MULTI_PROG", "SLURM_PROLOG", "SLURM_EPILOG", "SLURM_TASK_PROLOG", "SLURM_TASK_EPILOG", "SLURM_THREADS",
    "SBATCH_EXPORT", "PMI_RANK", "PMI_SIZE", "PMIX_RANK", "PMIX_NAMESPACE",
)  # fmt: skip


def clean_environment() -> tuple[dict[str, str], list[str]]:
    """(environment for Slurm's commands, names that were dropped): inherited SBATCH_* would override the script."""
    env, dropped = {}, []
    for name, value in os.environ.items():
        if (
            name.startswith(
                ("SBATCH_", "SLURM_", "SRUN_", "SALLOC_", "PMI_", "PMIX_", "SQUEUE_", "SINFO_", "SCONTROL_")
            )
            and name not in KEPT
        ):
            dropped.append(name)
        else:
            env[name] = value
    return env, sorted(dropped)


def _run(*argv: str, timeout: int = 60) -> subprocess.CompletedProcess[str]:
    env, _ = clean_environment()
    return ask(*argv, timeout=timeout, env=env)


def _none(value: str | None) -> str | None:
    return None if value in (None, "", "None", "(null)", "Unknown", "N/A") else value


def _fields(line: str) -> dict[str, str]:
    out: dict[str, str] = {}
    for word in re.split(r"\s+(?=[A-Z][A-Za-z/:_]*=)", line):
        key, _, value = word.partition("=")
        out.setdefault(key, value.strip())
    return out


@register
class Slurm(Backend):
    """sbatch takes the script, srun starts its steps; a warning signal and requeueing are Slurm's own."""

    name = "slurm"
    title = "Slurm"
    schedulers = ("slurm",)
    programs = ("sbatch", "squeue", "scontrol", "scancel")
    styles = ("torchrun", "srun")
    requeue = True
    preflight = True
    one_core = True
    template = "slurm.sh.j2"
    job_id = "$SLURM_JOB_ID"
    node_rank = '"${SLURM_NODEID}"'
    node_address = "scontrol show node \"$SLURMD_NODENAME\" --oneliner | sed -n 's/.* NodeAddr=\\([^ ]*\\).*/\\1/p'"
    scrubbed = SCRUBBED

    def directives(self, sub: Submission) -> list[Line]:
        return directives(sub)

    def step_options(self, sub: Submission, container: Container | None, mounts: list[str]) -> list[Line]:
        return srun_options(sub, container, mounts)

    def submit(self, run_dir: Path, *, test_only: bool = False) -> str:
        """Job id. The script is given by its absolute path; options come from the script alone."""
        argv = ["sbatch", "--parsable", *(["--test-only"] if test_only else []), str(run_dir / "submission" / "job.sh")]
        done = _run(*argv)
        if done.returncode != 0:
            raise RunFailed(
                "sbatch refused the script: " + " ".join(done.stderr.split()).replace("sbatch: error: ", ""),
                where=str(run_dir / "submission" / "job.sh"),
                fix="the site may have changed its limits: 'aifactory sites probe' compares the profile with the "
                "machine",
            )
        return done.stdout.strip().split(";")[0]

    def query(self, job: str) -> Job | None:
        """The job from ``scontrol`` (while it is remembered), else from ``sacct``; None where neither knows it.

        Raises :class:`RunFailed` where the controller does not answer and there is no accounting: that says nothing
        about the job.
        """
        for pause in ANSWER_PAUSES_S:
            done = _run("scontrol", "show", "job", job, "--oneliner")
            silent = done.returncode != 0 and "invalid job id" not in done.stderr.lower()
            if not silent:
                break
            time.sleep(pause)
        if done.returncode == 0 and done.stdout.strip():
            fields = _fields(done.stdout.strip().splitlines()[-1])
            state = fields.get("JobState", "")
            return Job(
                id=job,
                state=STATES.get(state, state.lower()),
                reason=_none(fields.get("Reason")),
                nodes=_none(fields.get("NodeList")),
                started=_none(fields.get("StartTime")),
                ended=_none(fields.get("EndTime")),
                exit_code=fields.get("ExitCode"),
                raw=state,
            )
        account = self.accounting(job)
        if not account and silent:
            raise RunFailed(
                f"Slurm does not tell about job {job}: {' '.join(done.stderr.split())[:300]}",
                fix="ask again later; 'aifactory status --offline' looks at the files alone",
            )
        if not account:
            return None
        state = account["State"].split()[0].rstrip("+")
        return Job(
            id=job,
            state=STATES.get(state, state.lower()),
            nodes=account.get("NodeList"),
            started=account.get("Start"),
            ended=account.get("End"),
            exit_code=account.get("ExitCode"),
            raw=account["State"],
            accounting=account,
        )

    def jobs_of(self, run_dir: Path) -> list[str] | None:
        script = str(run_dir / "submission" / self.script_file)
        done = _run("squeue", "--me", "--noheader", "--states=all", "--format=%A|%o")
        succeeded(done, "squeue does not tell which jobs are yours")
        found = {
            line.partition("|")[0].strip()
            for line in done.stdout.splitlines()
            if line.partition("|")[2].strip() == script
        }
        return sorted(found, key=lambda job: int(job) if job.isdigit() else 0)

    def accounting(self, job: str) -> dict[str, str] | None:
        """The job's line of ``sacct``, or None where there is no accounting or no such job."""
        names = "JobIDRaw,State,ExitCode,ElapsedRaw,AllocTRES,ConsumedEnergyRaw,NodeList,Start,End"
        try:
            done = _run(
                "sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={job}", f"--format={names}", timeout=20
            )
        except UserError:
            return None
        if done.returncode != 0 or not done.stdout.strip():
            return None
        return dict(zip(names.split(","), done.stdout.strip().splitlines()[-1].split("|"), strict=False))

    def failed_nodes(self, nodes: str | None) -> list[str]:
        """Nodes of a list that the controller sees as down or failing now."""
        if not nodes:
            return []
        done = _run("sinfo", "--noheader", "--Node", f"--nodes={nodes}", "--format=%N %T")
        bad = {
            line.split()[0]
            for line in done.stdout.splitlines()
            if re.search(r" (down|fail|unknown)", line) or line.endswith("*")
        }
        return sorted(bad)

    def cancel(self, job: str) -> None:
        succeeded(_run("scancel", job), f"scancel {job}")
