"""The controller configuration of a site's twin, from its profile: a real slurmctld that judges our scripts with
``sbatch --test-only`` and runs nothing.

Script and twin come from one profile, so a pass proves that they are consistent, not that the site agrees. What the
twin cannot know: QoS and association limits (our own rules cover them), options newer than the local Slurm, job-submit
plug-ins.

Placeholders that the boot script fills: ``@DIR@ @USER@ @PORT@``.
"""

from __future__ import annotations

import re

from aifactory_train.core.errors import UserError
from aifactory_train.sites import slurm_time
from aifactory_train.sites.profiles import System

HEAD = """\
# Twin of {name}, generated from its profile by aifactory-train: a controller without daemons on nodes.
ClusterName=twin
SlurmctldHost=localhost
SlurmctldPort=@PORT@
SlurmUser=@USER@
SlurmdUser=@USER@
AuthType=auth/none
CredType=cred/none
StateSaveLocation=@DIR@/state
SlurmctldPidFile=@DIR@/run/slurmctld.pid
SlurmctldLogFile=@DIR@/log/slurmctld.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
PlugStackConfig=/dev/null
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
# A request above a partition's limit is refused instead of left pending.
EnforcePartLimits=ALL
ReturnToService=2
SlurmdTimeout=0
# Powered-down cloud nodes count as available although no daemon exists.
ResumeProgram=/bin/true
SuspendProgram=/bin/true
SuspendTime=60
ResumeTimeout=60
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
GresTypes=gpu
PrivateData=cloud
MaxArraySize=4096
"""

#: Nodes of a twin where the profile does not say how many there are.
UNKNOWN_NODES = 16
#: Shape of a node where the profile does not say; large enough that no request fails for it.
UNKNOWN_CORES, UNKNOWN_GPUS, UNKNOWN_MEMORY_GIB = 256, 8, 2048


def config(system: System) -> str:
    """``slurm.conf`` (with placeholders) of the system's twin. Raises UserError for a system without Slurm."""
    if system.scheduler.kind != "slurm":
        raise UserError(
            f"{system.name} has no Slurm, so no twin",
            where=f"{system.id}: scheduler.kind",
            fix="its script is checked against the directives' grammar",
        )
    lines = [HEAD.format(name=system.name)]
    count = node_count(system)
    lines.append(_node_line(system, count))
    partitions = system.partitions or {"unnamed": None}
    default = system.default_partition or next(iter(partitions))
    for key, part in partitions.items():
        # "default" is a keyword of slurm.conf; a partition that is never named can be called anything here.
        words = [
            f"PartitionName={'unnamed' if key.lower() == 'default' else key}",
            f"Nodes={_names(count)}",
            f"Default={'YES' if key == default else 'NO'}",
            "State=UP",
        ]
        if part is not None:
            limits = [n for n in (part.max_nodes, part.nodes) if n is not None]
            if limits:
                words.append(f"MaxNodes={min(limits)}")
            if part.min_nodes is not None:
                words.append(f"MinNodes={part.min_nodes}")
            words.append(f"MaxTime={slurm_time(part.max_time) if part.max_time else 'INFINITE'}")
            if part.default_time is not None:
                words.append(f"DefaultTime={slurm_time(part.default_time)}")
            if part.shared is False:
                words.append("OverSubscribe=EXCLUSIVE")
        lines.append(" ".join(words))
    return "\n".join(lines) + "\n"


def node_count(system: System) -> int:
    """Nodes of the twin: the machine's, and at least what the largest partition admits."""
    stated = [n for p in system.partitions.values() for n in (p.max_nodes, p.nodes, p.min_nodes) if n is not None]
    limits = [q.max_nodes for q in system.qos.values() if q.max_nodes is not None]
    every = [*system.partitions.values(), *system.qos.values()]
    limits += [limit.max_gpus // (system.node.gpus or 1) for limit in every if limit.max_gpus]
    # A partition without a published limit must not be limited by the size of another one.
    return max([system.node.count or UNKNOWN_NODES, *stated, *limits])


def _names(count: int) -> str:
    return f"n[00001-{count:05d}]"


def _node_line(system: System, count: int) -> str:
    node = system.node
    threads = node.threads_per_core or 1
    cores = node.cores or node.cores_usable or UNKNOWN_CORES
    sockets = node.sockets or 1
    if cores % sockets:
        sockets = 1
    reserved = list(node.cores_reserved)
    if node.cores_usable is not None and node.cores is not None and len(reserved) != node.cores - node.cores_usable:
        # The profile gives the number only; which cores they are does not matter to a request.
        reserved = list(range(node.cores - node.cores_usable))
    memory = node.memory_usable_gib or node.memory_gib or UNKNOWN_MEMORY_GIB
    words = [
        f"NodeName={_names(count)}",
        "NodeHostname=localhost",
        "NodeAddr=127.0.0.1",
        f"Port=[{30000}-{30000 + count - 1}]" if count > 1 else "Port=30000",
        f"CPUs={cores * threads}",
        "Boards=1",
        f"SocketsPerBoard={sockets}",
        f"CoresPerSocket={cores // sockets}",
        f"ThreadsPerCore={threads}",
        f"RealMemory={int(memory * 1024)}",
    ]
    if reserved:
        # CPUSpecList is honoured without a registered slurmd, CoreSpecCount is not.
        words.append("CPUSpecList=" + ",".join(str(core * threads + t) for core in reserved for t in range(threads)))
    if system.request.gpus != "none":
        kind = f"{system.request.gres_type}:" if system.request.gres_type else ""
        words.append(f"Gres=gpu:{kind}{node.gpus or UNKNOWN_GPUS}")
    features = sorted(
        set(node.features)
        | {f for p in system.partitions.values() if p.constraint for f in re.findall(r"[A-Za-z0-9_.-]+", p.constraint)}
        | {f for flag in system.request.flags for f in _constraint(flag)}
        | {f for p in system.partitions.values() for flag in p.flags for f in _constraint(flag)}
    )
    if features:
        words.append(f"Feature={','.join(features)}")
    words.append("State=CLOUD")
    return " ".join(words)


def _constraint(flag: str) -> list[str]:
    name, _, value = flag.partition("=")
    return re.findall(r"[A-Za-z0-9_.-]+", value) if name in ("--constraint", "-C") else []


# ---- corruptions


def corruptions(script: str, system: System) -> dict[str, str]:
    """Ten faults of a script that its scheduler must refuse: name -> the script with that fault.

    Directives are changed, never added twice: Slurm takes the last of two.
    """
    over = node_count(system) + 1
    node = system.node
    cores = (node.cores_usable or node.cores or UNKNOWN_CORES) * (node.threads_per_core or 1)
    gpus = node.gpus or UNKNOWN_GPUS
    memory = int((node.memory_usable_gib or node.memory_gib or UNKNOWN_MEMORY_GIB) * 1024) + 1024
    times = [p.max_time for p in system.partitions.values()]
    # A partition without a known limit takes any time in the twin.
    long = 0 if None in times else max([t for t in times if t], default=0)
    kind = system.request.gres_type or "gpu"
    out = {
        "partition that does not exist": with_option(script, "--partition", "nosuchpartition"),
        "more nodes than there are": with_option(script, "--nodes", str(over)),
        "more cores per task than a node has": with_option(script, "--cpus-per-task", str(cores + 1)),
        "more tasks per node than it has cores": with_option(
            with_option(script, "--ntasks-per-node", str(cores + 1)), "--cpus-per-task", "1"
        ),
        "more GPUs than a node has": with_option(
            without(script, "--gpus-per-node", "--gpus", "--gres"), "--gres", f"gpu:{gpus + 1}"
        ),
        "GPU type that does not exist": with_option(
            without(script, "--gpus-per-node", "--gpus", "--gres"), "--gres", f"gpu:nosuch{kind}:1"
        ),
        "resource that does not exist": with_option(
            without(script, "--gres", "--gpus", "--gpus-per-node"), "--gres", "fpga:1"
        ),
        "more memory than a node has": with_option(
            without(script, "--mem-per-gpu", "--mem-per-cpu"), "--mem", f"{memory}M"
        ),
        "node feature that does not exist": with_option(script, "--constraint", "nosuchfeature"),
        "time that is no time": with_option(script, "--time", "soon"),
        "option that does not exist": with_option(script, "--nosuchoption", "1"),
        "task layout that contradicts itself": with_option(script, "--ntasks", "0"),
    }
    if long:
        out["longer than any partition admits"] = with_option(script, "--time", slurm_time(long + 86400))
    else:
        del out["task layout that contradicts itself"]
    return out


def with_option(script: str, option: str, value: str) -> str:
    """The script with that directive set (replaced where it is there, else put behind the first directive)."""
    line = f"#SBATCH {option}={value}"
    pattern = re.compile(rf"^#SBATCH {re.escape(option)}(=.*)?$", re.M)
    if pattern.search(script):
        return pattern.sub(lambda _: line, script, count=1)
    head, _, tail = script.partition("\n")
    return f"{head}\n{line}\n{tail}"


def without(script: str, *options: str) -> str:
    pattern = re.compile(rf"^#SBATCH ({'|'.join(re.escape(o) for o in options)})(=.*)?\n", re.M)
    return pattern.sub("", script)
