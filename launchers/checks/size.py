"""Rules on how much a job asks for: nodes, GPUs, processes, cores, memory, and the options that say so."""

from __future__ import annotations

from collections.abc import Iterator

from aifactory_train.launchers.checks.rules import Context, Finding, batch_rule, refuse, rule, warn
from aifactory_train.sites.schema import Partition

#: Scheduler options that the launcher writes itself.
WRITTEN_BY_US = {
    *("--nodes", "--ntasks", "--ntasks-per-node", "--time", "--account", "--partition", "--qos", "--output", "--error"),
    *("--export", "--signal", "--job-name", "--gres", "--gpus", "--gpus-per-node", "--cpus-per-task", "--array"),
    *("--dependency", "--requeue", "--no-requeue", "--open-mode", "--wrap", "--chdir", "--get-user-env", "--parsable"),
    *("--test-only", "--uid", "--gid", "--export-file", "--prefer"),
}


@rule
def nodes_positive(c: Context) -> Iterator[Finding]:
    """At least one node, one process."""
    if c.shape.nodes < 1:
        yield refuse(f"{c.shape.nodes} nodes", fix="ask for 1 or more", where="--nodes")
    if c.shape.ranks_per_node < 1:
        yield refuse(f"{c.shape.ranks_per_node} processes per node", fix="ask for 1 or more", where="--nproc")


@rule
def nodes_one_here(c: Context) -> Iterator[Finding]:
    """This machine is one node."""
    if not c.batch and c.shape.nodes > 1:
        yield refuse(
            f"{c.shape.nodes} nodes on this machine",
            fix="--nproc for several processes here, or --site for a cluster",
            where="--nodes",
        )


@batch_rule
def nodes_startable(c: Context) -> Iterator[Finding]:
    """Several nodes only where the script can start ranks on each."""
    if c.shape.nodes > 1 and not c.backend.spans(c.shape.style):
        others = [style for style in c.backend.styles if c.backend.spans(style)]
        yield refuse(
            f"{c.shape.nodes} nodes: a script for {c.backend.title} starts '{c.shape.style}' on one node only",
            fix=" or ".join([*(f"--style {style}" for style in others), "--nodes 1"]),
            where="--nodes",
        )


@batch_rule
def nodes_over_partition(c: Context) -> Iterator[Finding]:
    """No more nodes than the partition admits."""
    part, key = c.part, c.shape.partition_key
    if part is None:
        return
    others = [(k, p) for k, p in c.system.partitions.items() if k != key]
    wide = [k for k, p in others if _room(c, p) >= c.shape.nodes >= (p.min_nodes or 1) and p.state != "down"]
    for limit, path in ((part.max_nodes, "max_nodes"), (part.nodes, "nodes")):
        if limit is not None and c.shape.nodes > limit:
            yield refuse(
                f"{c.shape.nodes} nodes, '{key}' of {c.system.name} {'admits' if path == 'max_nodes' else 'has'} "
                f"{limit}",
                c.fact(f"partitions.{key}.{path}"),
                f"--nodes {limit} or fewer{_or_partition(wide)}{_or_correct(c, f'partitions.{key}.{path}')}",
                "--nodes",
            )
            return


def _or_correct(c: Context, path: str) -> str:
    """The way out where a limit rests on what users wrote: the site may admit more by now."""
    found = c.system.provenance(path)
    if found is None or found.confidence not in ("documented-user", "derived"):
        return ""
    return f"; where the site admits it all the same, correct {path} in your site file"


def _room(c: Context, part: Partition) -> int:
    """Nodes that a partition is known to admit; one that is for large jobs may take the machine."""
    return part.max_nodes or part.nodes or ((c.system.node.count or 0) if part.min_nodes else 0)


def _or_partition(keys: list[str]) -> str:
    return f", or --partition {keys[0]}" if keys else ""


@batch_rule
def nodes_over_qos(c: Context) -> Iterator[Finding]:
    """No more nodes than the QoS admits (Slurm's own test does not look at this)."""
    if c.qos is not None and c.qos.max_nodes is not None and c.shape.nodes > c.qos.max_nodes:
        path = f"qos.{c.shape.qos}.max_nodes"
        yield refuse(
            f"{c.shape.nodes} nodes, QoS '{c.shape.qos}' admits {c.qos.max_nodes}",
            c.fact(path),
            f"--nodes {c.qos.max_nodes} or fewer, or {_other_qos(c)}{_or_correct(c, path)}",
            "--nodes",
        )


def _other_qos(c: Context) -> str:
    """``--qos NAME`` of a QoS that goes with the partition and admits the job's nodes and time, else just the
    option.
    """
    for name in c.part.qos if c.part is not None else []:
        q = c.system.qos.get(name)
        if name == c.shape.qos or q is None or q.purpose == "data":
            continue
        size = (q.min_nodes or 1) <= c.shape.nodes <= (q.max_nodes or c.shape.nodes)
        gpus = q.max_gpus is None or c.shape.nodes * c.shape.gpus_per_node <= q.max_gpus
        if size and gpus and (q.max_time is None or c.shape.time_s <= q.max_time):
            return f"--qos {name}"
    return "another --qos"


@batch_rule
def nodes_over_machine(c: Context) -> Iterator[Finding]:
    """No more nodes than the machine has."""
    count = c.system.node.count
    if count is not None and c.shape.nodes > count:
        yield refuse(
            f"{c.shape.nodes} nodes, {c.system.name} has {count} of this kind",
            c.fact("node.count"),
            f"--nodes {count} or fewer",
            "--nodes",
        )


@batch_rule
def nodes_under_minimum(c: Context) -> Iterator[Finding]:
    """At least as many nodes as partition and QoS want."""
    for found, path, flag in c.limits:
        if found.min_nodes is not None and c.shape.nodes < found.min_nodes:
            yield refuse(
                f"{c.shape.nodes} nodes, {path.replace('.', ' ')} is for {found.min_nodes} and more",
                c.fact(f"{path}.min_nodes"),
                f"--nodes {found.min_nodes}, or {_other_qos(c) if flag == '--qos' else f'another {flag}'}"
                f"{_or_correct(c, f'{path}.min_nodes')}",
                "--nodes",
            )


@batch_rule
def gpus_per_node(c: Context) -> Iterator[Finding]:
    """No more GPUs per node than a node has, as the scheduler counts them."""
    has = c.system.node.gpus
    if c.shape.gpus_per_node < 1:
        yield refuse(
            f"{c.shape.gpus_per_node} GPUs per node at a GPU site", fix="ask for 1 or more", where="--gpus-per-node"
        )
    if has is not None and c.shape.gpus_per_node > has:
        counted = f" (counted as {c.system.gpu.counted_as})" if c.system.gpu.counted_as else ""
        yield refuse(
            f"{c.shape.gpus_per_node} GPUs per node, a node of {c.system.name} has {has}{counted}",
            c.fact("node.gpus"),
            f"--gpus-per-node {has} or fewer, on more --nodes",
            "--gpus-per-node",
        )


@batch_rule
def gpus_unknown(c: Context) -> Iterator[Finding]:
    """Said where the number of GPUs per node is not published."""
    if c.system.node.gpus is None and c.request.gpus_per_node is None:
        yield warn(
            f"it is not published how many GPUs a node of {c.system.name} has: asking for {c.shape.gpus_per_node}",
            fix="--gpus-per-node",
        )


@batch_rule
def gpus_over_limit(c: Context) -> Iterator[Finding]:
    """No more GPUs per job than partition and QoS admit."""
    total = c.shape.nodes * c.shape.gpus_per_node
    for found, path, flag in c.limits:
        if found.max_gpus is not None and total > found.max_gpus:
            most = found.max_gpus // max(c.shape.gpus_per_node, 1)
            fewer = f"--nodes {most} or fewer" if most else f"--gpus-per-node {found.max_gpus} or fewer"
            other = f", or {_other_qos(c)}" if flag == "--qos" else ""
            yield refuse(
                f"{total} GPUs, {path.replace('.', ' ')} admits {found.max_gpus} (Slurm's own test does not look at "
                f"this)",
                c.fact(f"{path}.max_gpus"),
                f"{fewer}{other}{_or_correct(c, f'{path}.max_gpus')}",
                "--nodes",
            )


@rule
def ranks_per_gpu(c: Context) -> Iterator[Finding]:
    """At most one process per GPU."""
    if c.shape.gpus_per_node and c.shape.ranks_per_node > c.shape.gpus_per_node:
        yield refuse(
            f"{c.shape.ranks_per_node} processes for {c.shape.gpus_per_node} GPUs of a node",
            fix=f"--nproc {c.shape.gpus_per_node} or fewer",
            where="--nproc",
        )


@batch_rule
def whole_nodes(c: Context) -> Iterator[Finding]:
    """Whole nodes where the partition gives nothing less (and bills for it)."""
    has = c.system.node.gpus
    if c.part is not None and c.part.shared is False and has and c.shape.gpus_per_node < has:
        shared = [key for key, part in c.system.partitions.items() if part.shared]
        yield refuse(
            f"{c.shape.gpus_per_node} of {has} GPUs, '{c.shape.partition_key}' gives whole nodes only and bills for "
            f"them",
            c.fact(f"partitions.{c.shape.partition_key}.shared"),
            f"--gpus-per-node {has}{_or_partition(shared)}",
            "--gpus-per-node",
        )


@batch_rule
def partial_nodes(c: Context) -> Iterator[Finding]:
    """Several nodes only when each is filled, where the site says so."""
    has = c.system.node.gpus
    if c.system.request.partial_multi_node is False and c.shape.nodes > 1 and has and c.shape.gpus_per_node < has:
        yield refuse(
            f"{c.shape.nodes} nodes with {c.shape.gpus_per_node} of {has} GPUs each: {c.system.name} refuses jobs "
            f"that partly fill several nodes",
            c.fact("request.partial_multi_node"),
            f"--gpus-per-node {has}",
            "--gpus-per-node",
        )


@batch_rule
def cores_per_node(c: Context) -> Iterator[Finding]:
    """No more cores per node than jobs can have."""
    usable = c.system.node.cores_usable or c.system.node.cores
    wanted = (c.shape.cpus_per_task or 0) * c.shape.tasks_per_node
    if (
        usable is not None
        and wanted > usable * (c.system.node.threads_per_core or 1)
        and c.shape.gpus_per_node <= (c.system.node.gpus or 1 << 30)
    ):
        yield refuse(
            f"{wanted} cores per node, jobs get {usable} on {c.system.name}",
            c.fact("node.cores_usable") or c.fact("node.cores"),
            "ask for fewer GPUs or processes per node",
            "--nproc",
        )


@batch_rule
def cores_known(c: Context) -> Iterator[Finding]:
    """A task asks for its cores: a scheduler's own default may be one for all ranks of a node."""
    if c.backend.one_core and c.shape.cpus_per_task is None and c.shape.gpus_per_node:
        yield warn(
            f"the cores of a node of {c.system.name} are not published: none are asked for, and "
            f"{c.backend.title} may give the {c.shape.ranks_per_node} rank(s) of a node one core",
            fix="'scontrol show node' tells CPUTot: put request.cpus_per_gpu under corrections: in your site file",
        )


@batch_rule
def cores_per_gpu(c: Context) -> Iterator[Finding]:
    """The fixed ratio of cores to GPUs is kept, where the site rejects anything else."""
    ratio, kind = c.system.request.cpus_per_gpu, c.system.request.cpus_per_gpu_rule
    if ratio is None or kind not in ("exact", "at-most") or not c.shape.cpus_per_task or c.shape.gpus_per_node < 1:
        return
    per_gpu = c.shape.cpus_per_task * c.shape.tasks_per_node / c.shape.gpus_per_node
    if (kind == "exact" and per_gpu != ratio) or per_gpu > ratio:
        yield refuse(
            f"{per_gpu:g} cores per GPU, {c.system.name} needs {'exactly' if kind == 'exact' else 'at most'} {ratio}",
            c.fact("request.cpus_per_gpu"),
            "use as many processes per node as GPUs: leave --nproc out",
            "--nproc",
        )


@batch_rule
def memory_per_node(c: Context) -> Iterator[Finding]:
    """No more host memory than a node gives."""
    usable = c.system.node.memory_usable_gib or c.system.node.memory_gib
    if c.shape.memory is None or usable is None:
        return
    kind, size = c.shape.memory
    total = size if kind == "mem" else size * c.shape.gpus_per_node
    if total > usable and c.shape.gpus_per_node <= (c.system.node.gpus or 1 << 30):
        yield refuse(
            f"{total} GiB per node, jobs get {usable:g} on {c.system.name}",
            c.fact("node.memory_usable_gib"),
            "ask for fewer GPUs per node",
            "--gpus-per-node",
        )


@rule
def directive_never(c: Context) -> Iterator[Finding]:
    """Options that are known to break jobs at the site, or that the launcher itself writes, are not passed."""
    for flag in c.request.extra_flags:
        name = flag.partition("=")[0]
        if name in c.system.request.never or flag in c.system.request.never:
            yield refuse(
                f"{name} breaks jobs at {c.system.name}", c.fact("request.never"), "leave it out", "--directive"
            )
        elif name in WRITTEN_BY_US:
            yield refuse(
                f"{name} is written by the launcher itself",
                fix="use the option of 'aifactory launch'",
                where="--directive",
            )
