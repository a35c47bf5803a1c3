"""The options of Slurm's commands from a job's shape: ``#SBATCH`` directives, and those of the srun that starts a
step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from aifactory_train.launchers.shape import JobShape, lead
from aifactory_train.launchers.submission import Line, Submission, quoted
from aifactory_train.sites import slurm_time
from aifactory_train.sites.schema import Container

#: An option, why it is there, and the fact of the profile that it rests on.
Option = tuple[str, str, str | None]


def directives(sub: Submission) -> list[Line]:
    """All ``#SBATCH`` lines: literal, before the first command, one option each."""
    parts = (_who_and_where, _resources, _time_and_restarts, _output, _further)
    return [sub.line(f"#SBATCH {text}", why, fact) for part in parts for text, why, fact in part(sub)]


def _given(shape: JobShape, name: str, text: str) -> Option:
    value = shape.reason(name)
    return text, value.why, value.fact


def _who_and_where(sub: Submission) -> Iterator[Option]:
    shape = sub.shape
    yield f"--job-name={sub.name}", "the run's name", None
    if shape.account:
        yield _given(shape, "account", f"--account={shape.account}")
    if shape.partition:
        yield _given(shape, "partition", f"--partition={shape.partition}")
    if shape.qos:
        yield _given(shape, "qos", f"--qos={shape.qos}")
    reservation = sub.request.reservation or sub.system.user.reservation
    if reservation:
        yield f"--reservation={reservation}", "you asked for it", None
    if shape.constraint:
        yield _given(shape, "constraint", f"--constraint={shape.constraint}")


def _resources(sub: Submission) -> Iterator[Option]:
    shape = sub.shape
    yield _given(shape, "nodes", f"--nodes={shape.nodes}")
    yield f"--ntasks-per-node={shape.tasks_per_node}", _tasks_why(shape.style), shape.reason("style").fact
    if shape.gpus_per_node:
        yield from _gpus(sub)
    if shape.cpus_per_task:
        yield _given(shape, "cpus_per_task", f"--cpus-per-task={shape.cpus_per_task}")
    if shape.memory:
        yield _given(shape, "memory", f"--{shape.memory[0]}={shape.memory[1]}G")
    if shape.exclusive:
        yield _given(shape, "exclusive", "--exclusive")


def _gpus(sub: Submission) -> Iterator[Option]:
    """GPUs in the form that the site takes."""
    shape, asked = sub.shape, sub.system.request
    kind, why = asked.gpus, shape.reason("gpus_per_node").why
    typed = f"{asked.gres_type}:" if asked.gres_type else ""
    if kind == "gres":
        yield f"--gres={asked.gres_name or 'gpu'}:{typed}{shape.gpus_per_node}", why, "request.gpus"
    elif kind == "gpus":
        total = shape.gpus_per_node * shape.nodes
        yield f"--gpus={typed}{total}", "GPUs of the whole job, as this site asks for them", "request.gpus"
        if shape.nodes > 1:
            yield f"--gpus-per-node={typed}{shape.gpus_per_node}", "spread evenly over the nodes", "request.gpus"
    elif kind != "none":
        yield f"--gpus-per-node={typed}{shape.gpus_per_node}", why, "request.gpus" if kind else None


def _time_and_restarts(sub: Submission) -> Iterator[Option]:
    shape, policy = sub.shape, sub.system.policy
    yield _given(shape, "time_s", f"--time={slurm_time(shape.time_s)}")
    yield (
        f"--signal=B:{policy.signal}@{lead(shape)}",
        "a warning to the batch shell in time for the last save; Slurm may send it up to 60 s early",
        "policy.signal",
    )
    how = sub.request.resubmit or policy.resubmit
    if policy.requeue == "forbidden":
        yield "--no-requeue", "the site forbids requeueing", "policy.requeue"
    elif how in ("requeue", "chain", "resubmit"):
        fact = "policy.requeue" if policy.requeue else None
        yield "--requeue", "a job that lost a node is queued again by the scheduler", fact
    else:
        yield "--no-requeue", "you asked for no automatic restart", None


def _output(sub: Submission) -> Iterator[Option]:
    yield "--open-mode=append", "a requeued job keeps the log of its earlier runs", None
    log = sub.run_dir / "logs" / ("job-%A_%a.out" if sub.request.array else "job-%j.out")
    yield (
        f"--output={directive_path(log)}",
        "log of the batch shell; the folder is made before submission, or the job would die without a word",
        None,
    )
    export = sub.system.policy.export
    yield (
        f"--export={export}",
        "the job's environment comes from this script alone"
        if export == "NONE"
        else "the site wants the submitting environment",
        "policy.export",
    )


def _further(sub: Submission) -> Iterator[Option]:
    shape, system, request = sub.shape, sub.system, sub.request
    excluded = [*system.user.exclude_nodes, *request.exclude]
    if excluded:
        yield f"--exclude={','.join(excluded)}", "nodes that you excluded", None
    if request.array:
        yield f"--array=0-{request.tasks - 1}", "one task for each combination of --array", None
    if request.chain:
        why = "links of the chain run one at a time, whatever becomes of the one before"
        yield "--dependency=singleton", why, None
    if system.user.mail:
        yield f"--mail-user={system.user.mail}", "from your site file (user.mail)", None
        yield "--mail-type=END,FAIL", "from your site file (user.mail)", None
    part = system.partitions.get(shape.partition_key) if shape.partition_key else None
    qos = system.qos.get(shape.qos) if shape.qos else None
    for flags, fact in (
        (system.request.flags, "request.flags"),
        (part.flags if part else [], f"partitions.{shape.partition_key}.flags"),
        (qos.flags if qos else [], f"qos.{shape.qos}.flags"),
    ):
        for flag in flags:
            yield flag, "every GPU job here needs it", fact
    for flag in request.extra_flags:
        yield flag, "you asked for it with --directive", None


def _tasks_why(style: str) -> str:
    return "one task a node: torchrun starts the ranks" if style == "torchrun" else "one task for each rank"


def directive_path(path: Path) -> str:
    """A path as a directive's value: in double quotes where it holds blanks (quotes and ``%`` were refused before)."""
    text = str(path)
    return f'"{text}"' if re.search(r"\s", text) else text


def srun_options(sub: Submission, container: Container | None, mounts: list[str]) -> list[Line]:
    """The words behind ``srun`` for a step on all nodes of the job."""
    found = (*_step(sub), *_binding(sub), *_container(sub, container, mounts))
    return [sub.line(quoted(text), why, fact) for text, why, fact in found]


def _step(sub: Submission) -> Iterator[Option]:
    shape = sub.shape
    yield f"--nodes={shape.nodes}", "all nodes of the job", None
    yield f"--ntasks={shape.nodes * shape.tasks_per_node}", "all tasks of the job", None
    yield f"--ntasks-per-node={shape.tasks_per_node}", _tasks_why(shape.style), None
    if shape.cpus_per_task and sub.system.launch.repeat_cpus_per_task:
        why = "srun does not inherit it since Slurm 22.05"
        yield f"--cpus-per-task={shape.cpus_per_task}", why, "launch.repeat_cpus_per_task"
    yield "--kill-on-bad-exit=1", "one failed task ends the step at once", None
    yield (
        "--wait=60",
        "a task that ends early without an error ends the step after a minute; the site's own WaitTime never applies",
        None,
    )


def _binding(sub: Submission) -> Iterator[Option]:
    shape, launch = sub.shape, sub.system.launch
    bind = launch.cpu_bind if shape.style == "srun" else launch.cpu_bind_node
    fact = "launch.cpu_bind" if shape.style == "srun" else "launch.cpu_bind_node"
    if bind and _whole(sub):
        yield f"--cpu-bind={bind}", "cores next to each GPU", fact
    if shape.gpus_per_node and sub.system.request.gpus != "none":
        yield (
            f"--gpu-bind={launch.gpu_bind or 'none'}",
            "every task sees all GPUs of its node: peer-to-peer needs that, LOCAL_RANK chooses",
            "launch.gpu_bind" if launch.gpu_bind else None,
        )
    if launch.mpi_type:
        yield f"--mpi={launch.mpi_type}", "process-management interface of the site", "launch.mpi_type"
    for flag in launch.srun_flags:
        yield flag, "the site's own way of starting GPU steps", "launch.srun_flags"


def _container(sub: Submission, container: Container | None, mounts: list[str]) -> Iterator[Option]:
    """Of the runtimes that srun itself drives."""
    if container is not None and container.runtime == "enroot-pyxis":
        pairs = ",".join(m if ":" in m else f"{m}:{m}" for m in mounts)
        fact = "software.containers"
        yield f"--container-image={container.image}", "the image that holds torch, through pyxis", fact
        yield f"--container-mounts={pairs}", "folders that the ranks need", fact
    elif container is not None and container.runtime == "cscs-ce":
        image = container.image or ""
        edf = image if image.endswith(".toml") else str(sub.run_dir / "submission" / "environment.toml")
        yield f"--environment={edf}", "the image that holds torch, through the Container Engine", "software.containers"


def _whole(sub: Submission) -> bool:
    """A binding mask names the cores of a whole node: it fits only jobs that have all of it."""
    return sub.shape.gpus_per_node == sub.system.node.gpus and sub.shape.ranks_per_node == sub.shape.gpus_per_node
