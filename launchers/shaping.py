"""Request + site → the shape of the job.

It is arithmetic only; whether it is allowed is decided in :mod:`aifactory_train.launchers.checks`, which can therefore
name every broken rule at once.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from aifactory_train.core.errors import did_you_mean
from aifactory_train.launchers import backends
from aifactory_train.launchers.backends import Backend
from aifactory_train.launchers.request import LaunchRequest, Refusal
from aifactory_train.launchers.shape import JobShape, Value
from aifactory_train.sites.profiles import System

DEFAULT_TIME_S = 4 * 3600
#: An acceptance ends within ten minutes; the rest is for the start of the job and its software.
ACCEPT_TIME_S = 20 * 60


def backend_of(request: LaunchRequest, system: System) -> Backend:
    """The backend asked for, else the one of the site's scheduler."""
    if request.backend is None:
        return backends.of_scheduler(system.scheduler.kind or "none")
    found = backends.find(request.backend)
    if found is None:
        names = list(backends.known())
        raise Refusal(
            "backend-known",
            f"no backend '{request.backend}'{did_you_mean(request.backend, names)}",
            where="--backend",
            fix=f"one of {', '.join(names)}",
        )
    return found


def visible_gpus() -> int:
    """GPUs that a process started here would see: the devices' files, narrowed by CUDA_/HIP_/ROCR_VISIBLE_DEVICES."""

    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        value = os.environ.get(variable)
        if value is not None:
            return len([d for d in value.split(",") if d.strip() not in ("", "-1", "NoDevFiles")])
    found = 0
    if Path("/proc/driver/nvidia/gpus").is_dir():
        found = sum(1 for _ in Path("/proc/driver/nvidia/gpus").iterdir())
    if not found and Path("/dev").is_dir():
        found = sum(1 for p in Path("/dev").glob("nvidia[0-9]*") if re.fullmatch(r"nvidia\d+", p.name))
    if not found and Path("/sys/class/kfd/kfd/topology/nodes").is_dir():
        for node in Path("/sys/class/kfd/kfd/topology/nodes").iterdir():
            try:
                found += int("simd_count 0" not in (node / "properties").read_text())
            except OSError:
                continue
    return found


def shape_of(request: LaunchRequest, system: System) -> JobShape:
    """The job's shape; raises :class:`Refusal` only for what cannot even be put into numbers."""
    backend = backend_of(request, system)
    why: dict[str, Value] = {}
    why["backend"] = (
        Value(backend.name, "you asked for it with --backend")
        if request.backend
        else Value(backend.name, f"the scheduler of {system.name}", "scheduler.kind")
    )
    style = _style(request, system, backend, why)
    nodes = request.nodes
    why["nodes"] = Value(nodes, "you asked for it with --nodes" if nodes != 1 else "one node unless you ask for more")
    if not backend.batch:
        return _local(request, system, backend, style, why)

    gpus = _gpus(request, system, why)
    ranks = _ranks(request, gpus, why)
    tasks = 1 if style == "torchrun" else ranks
    per_rank = _cpus_per_rank(system, gpus, ranks, why)
    per_task = per_rank * (ranks // max(tasks, 1)) if per_rank else None  # no process: the checks refuse it
    partition_key, partition, qos = _placement(request, system, why)
    constraint = _constraint(request, system, partition_key, why)
    whole = bool(system.node.gpus) and gpus == system.node.gpus
    exclusive = bool(system.request.exclusive) and whole
    if exclusive:
        why["exclusive"] = Value(True, "whole nodes are asked for as such here", "request.exclusive")
    account = request.account or system.user.account
    why["account"] = Value(account, "you asked for it with --account" if request.account else "from your overlay", None)
    time_s = _time(request, system, partition_key, qos, why)
    return JobShape(
        backend=backend.name,
        style=style,
        nodes=nodes,
        gpus_per_node=gpus,
        ranks_per_node=ranks,
        tasks_per_node=tasks,
        cpus_per_task=per_task,
        cpus_per_rank=max(1, per_rank // _threads(system)) if per_rank else None,
        memory=_memory(system, gpus, why),
        time_s=time_s,
        grace_s=_grace(request, time_s, why),
        partition=partition,
        partition_key=partition_key,
        qos=qos,
        constraint=constraint,
        account=account,
        exclusive=exclusive,
        why=why,
    )


def _ranks(request: LaunchRequest, gpus: int, why: dict[str, Value]) -> int:
    if request.accept is not None:
        why["ranks_per_node"] = Value(1, "an acceptance is one process, which starts its ranks itself")
        return 1
    ranks = request.nproc if request.nproc is not None else max(gpus, 1)
    why["ranks_per_node"] = Value(ranks, "you asked for it with --nproc" if request.nproc else "one process per GPU")
    return ranks


def _gpus(request: LaunchRequest, system: System, why: dict[str, Value]) -> int:
    gpus = request.gpus_per_node
    if gpus is None:
        gpus = system.node.gpus or 1
        why["gpus_per_node"] = (
            Value(gpus, f"a whole node of {system.name}", "node.gpus")
            if system.node.gpus
            else Value(gpus, "one, because the profile does not say how many GPUs a node has")
        )
    else:
        why["gpus_per_node"] = Value(gpus, "you asked for it with --gpus-per-node")
    return gpus


def _constraint(request: LaunchRequest, system: System, partition_key: str | None, why: dict[str, Value]) -> str | None:
    part = system.partitions.get(partition_key) if partition_key else None
    constraint = request.constraint or system.user.constraint or (part.constraint if part else None)
    if constraint:
        why["constraint"] = (
            Value(constraint, "you asked for it")
            if request.constraint or system.user.constraint
            else Value(constraint, "selects the nodes of this kind", f"partitions.{partition_key}.constraint")
        )
    return constraint


def _style(request: LaunchRequest, system: System, backend: Backend, why: dict[str, Value]) -> str:
    allowed = backend.styles
    if request.style is not None:
        if request.style not in allowed:
            raise Refusal(
                "style-supported",
                f"'{request.style}' is no way to start processes with backend {backend.name}",
                where="--style",
                fix=f"one of {', '.join(allowed)}",
            )
        why["style"] = Value(request.style, "you asked for it with --style")
        return request.style
    stated = system.launch.style
    if request.accept is not None:
        # The one process gets the whole node: masks of one task a GPU would leave it a part.
        why["style"] = Value(allowed[0], "an acceptance is one process with the whole node")
        return allowed[0]
    if stated in allowed:
        why["style"] = Value(stated, f"how processes are started at {system.name}", "launch.style")
        return str(stated)
    why["style"] = Value(allowed[0], "the profile names no style; this one needs least of a site")
    return allowed[0]


def _local(request: LaunchRequest, system: System, backend: Backend, style: str, why: dict[str, Value]) -> JobShape:
    gpus = visible_gpus()
    if request.gpus_per_node is not None:
        gpus = request.gpus_per_node
        why["gpus_per_node"] = Value(gpus, "you asked for it with --gpus-per-node")
    else:
        why["gpus_per_node"] = Value(gpus, "GPUs visible here")
    if request.accept is not None:
        ranks = _ranks(request, gpus, why)
    else:
        ranks = request.nproc if request.nproc is not None else max(gpus, 1)
        why["ranks_per_node"] = Value(
            ranks,
            "you asked for it with --nproc"
            if request.nproc is not None
            else "one process per visible GPU"
            if gpus
            else "no GPU is visible: one process on the CPU",
        )
    return JobShape(
        backend=backend.name,
        style=style,
        nodes=request.nodes,
        gpus_per_node=gpus,
        ranks_per_node=ranks,
        tasks_per_node=ranks,
        time_s=request.time_s or 0,
        grace_s=_grace(request, request.time_s, why) if request.time_s else 0,
        why=why,
    )


def _threads(system: System) -> int:
    """CPUs of the scheduler that make one core: hardware threads, where it counts those."""
    return (system.node.threads_per_core or 1) if system.request.cpus_are == "threads" else 1


def _cpus_per_rank(system: System, gpus: int, ranks: int, why: dict[str, Value]) -> int | None:
    """CPUs for one rank, as the scheduler counts: what the site asks per GPU, else an even share of a node's usable
    cores.
    """
    per_gpu = system.request.cpus_per_gpu
    fact = "request.cpus_per_gpu"
    reason = f"the site's number of {system.request.cpus_are} per GPU"
    if per_gpu is None:
        cores = system.node.cores_usable or system.node.cores
        if cores is None or not system.node.gpus:
            why["cpus_per_task"] = Value(None, "not published: the site's default per task applies")
            return None
        per_gpu = max(1, cores // system.node.gpus) * _threads(system)
        fact = "node.cores_usable" if system.node.cores_usable else "node.cores"
        reason = "an even share of a node's cores for each GPU"
    total = per_gpu * max(gpus, 1)
    value = max(1, total // max(ranks, 1))
    why["cpus_per_task"] = Value(value, reason, fact)
    return value


def _memory(system: System, gpus: int, why: dict[str, Value]) -> tuple[str, int] | None:
    kind, size = system.request.memory, system.request.memory_gib
    if kind in (None, "none") or size is None:
        why["memory"] = Value(
            None,
            "the site gives memory with the node; asking would be refused or waste it"
            if kind == "none"
            else "no memory request is published: the site's default applies",
            "request.memory" if kind else None,
        )
        return None
    if kind == "mem":
        share = size * gpus / system.node.gpus if system.node.gpus else size
        why["memory"] = Value(int(share), "memory of a node, in proportion to its GPUs", "request.memory_gib")
        return ("mem", int(share))
    why["memory"] = Value(int(size), "memory for each GPU", "request.memory_gib")
    return ("mem-per-gpu", int(size))


def _placement(
    request: LaunchRequest, system: System, why: dict[str, Value]
) -> tuple[str | None, str | None, str | None]:
    """(key in the profile, name for the scheduler, QoS). Unknown names are kept: the checks refuse them by rule."""
    asked = request.partition or system.user.partition
    key = asked or system.default_partition
    if key is None and len(system.partitions) == 1:
        key = next(iter(system.partitions))
    part = system.partitions.get(key) if key else None
    name = None if part is not None and part.implicit else key
    if key:
        why["partition"] = (
            Value(key, "you asked for it")
            if asked
            else Value(
                key,
                "the profile's default partition",
                "default_partition" if system.default_partition else "partitions",
            )
        )
    qos = request.qos or system.user.qos
    if qos:
        why["qos"] = Value(qos, "you asked for it")
    elif part is not None and part.qos_equals_partition:
        qos = key
        why["qos"] = Value(qos, "partition and QoS carry the same name here", f"partitions.{key}.qos_equals_partition")
    elif part is not None and part.qos:
        qos = part.qos[0]
        why["qos"] = Value(qos, "the QoS that goes with this partition", f"partitions.{key}.qos")
    return key, name, qos


def _time(request: LaunchRequest, system: System, partition: str | None, qos: str | None, why: dict[str, Value]) -> int:
    if request.time_s is not None:
        why["time_s"] = Value(request.time_s, "you asked for it with --time")
        return request.time_s
    limit = None
    if partition in system.partitions and (qos is None or qos in system.qos or not system.qos):
        part = system.partitions[partition]
        limits = [v for v in (part.max_time, system.qos[qos].max_time if qos in system.qos else None) if v]
        limit = min(limits) if limits else None
    default = DEFAULT_TIME_S if request.accept is None else ACCEPT_TIME_S
    if limit is not None and limit < default:
        why["time_s"] = Value(
            limit, "the longest that this partition and QoS allow", f"partitions.{partition}.max_time"
        )
        return limit
    why["time_s"] = Value(default, "default of aifactory-train; ask for another with --time")
    return default


def _grace(request: LaunchRequest, time_s: int, why: dict[str, Value]) -> int:
    """Seconds kept for the last save: 5 minutes, or a tenth of a shorter job, never under 15 s."""
    if request.grace_s is not None:
        why["grace_s"] = Value(request.grace_s, "you asked for it with --grace")
        return request.grace_s
    value = max(15, min(300, time_s // 10))
    why["grace_s"] = Value(value, "time to save before the limit: 5 minutes, or a tenth of a short job")
    return value
