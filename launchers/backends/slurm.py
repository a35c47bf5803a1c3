"""Slurm: directives and srun options from the shape, and the few commands that submit, ask and cancel."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.launchers.backends import Job
from aifactory_train.launchers.backends.commands import ask
from aifactory_train.launchers.submission import Line, Submission, quoted
from aifactory_train.sites import slurm_time
from aifactory_train.sites.schema import Container

PROGRAMS = ("sbatch", "squeue", "scontrol", "scancel")

#: Variables of the submitting shell that Slurm's commands need to find their cluster; all other SLURM_* and SBATCH_* are dropped.
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_TIME_FORMAT", "SLURM_JWT", "SLURM_CONF_SERVER")

#: Seconds to wait after each time that the controller did not answer a question.
ANSWER_PAUSES_S = (0.5, 2.0, 0.0)

STATES = {
    "PENDING": "pending", "REQUEUED": "pending", "REQUEUE_HOLD": "pending", "REQUEUE_FED": "pending", "SPECIAL_EXIT": "pending",
    "CONFIGURING": "pending", "RESV_DEL_HOLD": "pending", "SUSPENDED": "running", "STOPPED": "running",
    "RUNNING": "running", "COMPLETING": "running", "SIGNALING": "running", "STAGE_OUT": "running",
    "COMPLETED": "done", "FAILED": "failed", "BOOT_FAIL": "node-fail", "LAUNCH_FAILED": "failed", "RECONFIG_FAIL": "failed",
    "CANCELLED": "cancelled", "REVOKED": "cancelled", "TIMEOUT": "timeout", "DEADLINE": "timeout",
    "NODE_FAIL": "node-fail", "OUT_OF_MEMORY": "out-of-memory", "PREEMPTED": "preempted",
}  # fmt: skip


def directives(sub: Submission) -> list[Line]:
    """All ``#SBATCH`` lines: literal, before the first command, one option each."""
    shape, system, request = sub.shape, sub.system, sub.request
    out: list[Line] = []

    def put(text: str, why: str, fact: str | None = None) -> None:
        out.append(sub.line(f"#SBATCH {text}", why, fact))

    def given(name: str, text: str) -> None:
        value = shape.reason(name)
        put(text, value.why, value.fact)

    put(f"--job-name={sub.name}", "the run's name")
    if shape.account:
        given("account", f"--account={shape.account}")
    if shape.partition:
        given("partition", f"--partition={shape.partition}")
    if shape.qos:
        given("qos", f"--qos={shape.qos}")
    reservation = request.reservation or system.user.reservation
    if reservation:
        put(f"--reservation={reservation}", "you asked for it")
    if shape.constraint:
        given("constraint", f"--constraint={shape.constraint}")
    given("nodes", f"--nodes={shape.nodes}")
    put(f"--ntasks-per-node={shape.tasks_per_node}", _tasks_why(shape.style), shape.reason("style").fact)
    kind = system.request.gpus
    typed = f"{system.request.gres_type}:" if system.request.gres_type else ""
    if shape.gpus_per_node:
        if kind == "gres":
            put(
                f"--gres={system.request.gres_name or 'gpu'}:{typed}{shape.gpus_per_node}",
                shape.reason("gpus_per_node").why,
                "request.gpus",
            )
        elif kind == "gpus":
            put(
                f"--gpus={typed}{shape.gpus_per_node * shape.nodes}",
                "GPUs of the whole job, as this site asks for them",
                "request.gpus",
            )
            if shape.nodes > 1:
                put(f"--gpus-per-node={typed}{shape.gpus_per_node}", "spread evenly over the nodes", "request.gpus")
        elif kind != "none":
            put(
                f"--gpus-per-node={typed}{shape.gpus_per_node}",
                shape.reason("gpus_per_node").why,
                "request.gpus" if kind else None,
            )
    if shape.cpus_per_task:
        given("cpus_per_task", f"--cpus-per-task={shape.cpus_per_task}")
    if shape.memory:
        given("memory", f"--{shape.memory[0]}={shape.memory[1]}G")
    if shape.exclusive:
        given("exclusive", "--exclusive")
    given("time_s", f"--time={slurm_time(shape.time_s)}")
    from aifactory_train.launchers.shape import lead

    put(
        f"--signal=B:{system.policy.signal}@{lead(shape)}",
        "a warning to the batch shell in time for the last save; Slurm may send it up to 60 s early",
        "policy.signal",
    )
    how = request.resubmit or system.policy.resubmit
    if system.policy.requeue == "forbidden":
        put("--no-requeue", "the site forbids requeueing", "policy.requeue")
    elif how in ("requeue", "chain", "resubmit"):
        put(
            "--requeue",
            "a job that lost a node is queued again by the scheduler",
            "policy.requeue" if system.policy.requeue else None,
        )
    else:
        put("--no-requeue", "you asked for no automatic restart")
    put("--open-mode=append", "a requeued job keeps the log of its earlier runs")
    put(
        f"--output={directive_path(sub.run_dir / 'logs' / ('job-%A_%a.out' if request.array else 'job-%j.out'))}",
        "log of the batch shell; the folder is made before submission, or the job would die without a word",
    )
    put(
        f"--export={system.policy.export}",
        "the job's environment comes from this script alone"
        if system.policy.export == "NONE"
        else "the site wants the submitting environment",
        "policy.export",
    )
    excluded = [*system.user.exclude_nodes, *request.exclude]
    if excluded:
        put(f"--exclude={','.join(excluded)}", "nodes that you excluded")
    if request.array:
        put(f"--array=0-{request.tasks - 1}", "one task for each combination of --array")
    if request.chain:
        put("--dependency=singleton", "links of the chain run one at a time, whatever becomes of the one before")
    if system.user.mail:
        put(f"--mail-user={system.user.mail}", "from your site file (user.mail)")
        put("--mail-type=END,FAIL", "from your site file (user.mail)")
    part = system.partitions.get(shape.partition_key) if shape.partition_key else None
    qos = system.qos.get(shape.qos) if shape.qos else None
    for flags, fact in (
        (system.request.flags, "request.flags"),
        (part.flags if part else [], f"partitions.{shape.partition_key}.flags"),
        (qos.flags if qos else [], f"qos.{shape.qos}.flags"),
    ):
        for flag in flags:
            put(flag, "every GPU job here needs it", fact)
    for flag in request.extra_flags:
        put(flag, "you asked for it with --directive")
    return out


def _tasks_why(style: str) -> str:
    return "one task a node: torchrun starts the ranks" if style == "torchrun" else "one task for each rank"


def directive_path(path: Path) -> str:
    """A path as a directive's value: in double quotes where it holds blanks (quotes and ``%`` were refused before)."""
    text = str(path)
    return f'"{text}"' if re.search(r"\s", text) else text


def srun_options(sub: Submission, container: Container | None, mounts: list[str]) -> list[Line]:
    shape, system = sub.shape, sub.system
    out: list[Line] = []

    def put(text: str, why: str, fact: str | None = None) -> None:
        out.append(sub.line(quoted(text), why, fact))

    put(f"--nodes={shape.nodes}", "all nodes of the job")
    put(f"--ntasks={shape.nodes * shape.tasks_per_node}", "all tasks of the job")
    put(f"--ntasks-per-node={shape.tasks_per_node}", _tasks_why(shape.style))
    if shape.cpus_per_task and system.launch.repeat_cpus_per_task:
        put(
            f"--cpus-per-task={shape.cpus_per_task}",
            "srun does not inherit it since Slurm 22.05",
            "launch.repeat_cpus_per_task",
        )
    put("--kill-on-bad-exit=1", "one failed task ends the step at once")
    put(
        "--wait=60",
        "a task that ends early without an error ends the step after a minute; the site's own WaitTime never applies",
    )
    bind = system.launch.cpu_bind if shape.style == "srun" else system.launch.cpu_bind_node
    fact = "launch.cpu_bind" if shape.style == "srun" else "launch.cpu_bind_node"
    if bind and _whole(sub):
        put(f"--cpu-bind={bind}", "cores next to each GPU", fact)
    gpu_bind = system.launch.gpu_bind or "none"
    if shape.gpus_per_node and system.request.gpus != "none":
        put(
            f"--gpu-bind={gpu_bind}",
            "every task sees all GPUs of its node: peer-to-peer needs that, LOCAL_RANK chooses",
            "launch.gpu_bind" if system.launch.gpu_bind else None,
        )
    if system.launch.mpi_type:
        put(f"--mpi={system.launch.mpi_type}", "process-management interface of the site", "launch.mpi_type")
    for flag in system.launch.srun_flags:
        put(flag, "the site's own way of starting GPU steps", "launch.srun_flags")
    if container is not None and container.runtime == "enroot-pyxis":
        pairs = ",".join(m if ":" in m else f"{m}:{m}" for m in mounts)
        put(f"--container-image={container.image}", "the image that holds torch, through pyxis", "software.containers")
        put(f"--container-mounts={pairs}", "folders that the ranks need", "software.containers")
    elif container is not None and container.runtime == "cscs-ce":
        image = container.image or ""
        edf = image if image.endswith(".toml") else str(sub.run_dir / "submission" / "environment.toml")
        put(f"--environment={edf}", "the image that holds torch, through the Container Engine", "software.containers")
    return out


def _whole(sub: Submission) -> bool:
    """A binding mask names the cores of a whole node: it fits only jobs that have all of it."""
    return sub.shape.gpus_per_node == sub.system.node.gpus and sub.shape.ranks_per_node == sub.shape.gpus_per_node


# ---- talking to Slurm


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


def submit(run_dir: Path, *, test_only: bool = False) -> str:
    """Job id. The script is given by its absolute path; options come from the script alone."""
    argv = ["sbatch", "--parsable", *(["--test-only"] if test_only else []), str(run_dir / "submission" / "job.sh")]
    done = _run(*argv)
    if done.returncode != 0:
        raise RunFailed(
            "sbatch refused the script: " + " ".join(done.stderr.split()).replace("sbatch: error: ", ""),
            where=str(run_dir / "submission" / "job.sh"),
            fix="the site may have changed its limits: 'aifactory sites probe' compares the profile with the machine",
        )
    return done.stdout.strip().split(";")[0]


def query(job: str) -> Job | None:
    """The job from ``scontrol`` (while it is remembered), else from ``sacct``; None where neither knows it.

    Raises :class:`RunFailed` where the controller does not answer and there is no accounting: that says nothing about the job.
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
    account = accounting(job)
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


def _none(value: str | None) -> str | None:
    return None if value in (None, "", "None", "(null)", "Unknown", "N/A") else value


def _fields(line: str) -> dict[str, str]:
    out: dict[str, str] = {}
    for word in re.split(r"\s+(?=[A-Z][A-Za-z/:_]*=)", line):
        key, _, value = word.partition("=")
        out.setdefault(key, value.strip())
    return out


def accounting(job: str) -> dict[str, str] | None:
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


def failed_nodes(nodes: str | None) -> list[str]:
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


def cancel(job: str) -> None:
    done = _run("scancel", job)
    if done.returncode != 0:
        raise RunFailed(f"scancel {job}: {' '.join(done.stderr.split())}")


def warn(job: str, signal: str) -> bool:
    """Send the warning signal to the batch shell, which passes the stop on. Best effort: the stop file decides."""
    return _run("scancel", "--batch", f"--signal={signal}", job).returncode == 0
