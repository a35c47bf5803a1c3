"""Rules of one usable system: arithmetic, limits, and what belongs together."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from aifactory_train.core.errors import did_you_mean
from aifactory_train.sites.catalogue import gpu_catalogue
from aifactory_train.sites.check.faults import Fault, Place, at
from aifactory_train.sites.hardware import Gpu
from aifactory_train.sites.schedulers import SCHEDULERS
from aifactory_train.sites.schema import Partition, Qos
from aifactory_train.sites.system import System

#: Variables that no profile sets: how a process ends after a failed collective is a matter of torch's version and of
#: the launcher, not of the site.
LEFT_TO_TORCH = {
    **dict.fromkeys(
        ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING"),
        "its own way after an error (3) ends the process without ncclCommAbort, which 1 calls and which may hang "
        "(ProcessGroupNCCL.hpp)",
    ),
    **dict.fromkeys(
        ("TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT"),
        "every collective would hold up the host until the device has done it (ProcessGroupNCCL.hpp)",
    ),
}


def gpu_faults(gpu: Gpu, where: Place | str) -> Iterator[Fault]:
    """Faults of GPU constants, in a profile or in the catalogue."""
    arch = gpu.arch
    if arch and gpu.vendor and arch.startswith("sm_") != (gpu.vendor == "nvidia"):
        yield Fault("arch", where, f"{arch} is not an architecture of {gpu.vendor}", "sm_NN is NVIDIA's, gfxNNN AMD's")
    if arch and arch.startswith("sm_") and int(arch[3:]) < 80 and gpu.has_bf16:
        yield Fault("gpu-constants", where, f"{arch} has no bf16", "remove bf16 from peak_tflops")
    if gpu.has_fp8 and arch in ("sm_70", "sm_80", "sm_86", "gfx90a"):
        yield Fault("gpu-constants", where, f"{arch} has no fp8", "remove fp8 from peak_tflops")
    if gpu.has_fp8 and gpu.fp8_format is None:
        yield Fault("gpu-constants", where, "fp8 without its encoding", "fp8_format: ocp or fnuz")
    if gpu.fp8_format and (gpu.fp8_format == "fnuz") != (arch == "gfx942"):
        yield Fault(
            "gpu-constants", where, f"{arch} does not encode fp8 as {gpu.fp8_format}", "fnuz on gfx942, ocp elsewhere"
        )
    if gpu.warp_size and arch and (gpu.warp_size == 64) != arch.startswith("gfx9"):
        yield Fault(
            "gpu-constants", where, f"{arch} does not have {gpu.warp_size} lanes per warp", "64 on gfx9, else 32"
        )
    if gpu.memory_visible_mib and gpu.memory_gib and gpu.memory_visible_mib / 1024 > gpu.memory_gib * 1.01:
        yield Fault("gpu-constants", where, "the driver shows more memory than the GPU has")


def _gpu(system: System, path: Path) -> Iterator[Fault]:
    yield from gpu_faults(system.gpu, at(path, "gpu"))
    if system.gpu.sku:
        arch = gpu_catalogue()[system.gpu.sku].get("arch")
        if arch and system.gpu.arch and arch != system.gpu.arch:
            yield Fault(
                "arch",
                at(path, "gpu", "arch"),
                f"{system.gpu.sku} is {arch}, not {system.gpu.arch}",
                "leave arch out: it follows from the SKU",
            )


def _cores(system: System, path: Path) -> Iterator[Fault]:
    node, request = system.node, system.request
    usable = node.cores_usable or node.cores
    if node.cores and node.cores_usable and node.cores_usable > node.cores:
        yield Fault(
            "cores", at(path, "node", "cores_usable"), f"{node.cores_usable} of {node.cores} cores cannot be usable"
        )
    if (
        node.cores
        and node.cores_usable
        and node.cores_reserved
        and node.cores - len(node.cores_reserved) != node.cores_usable
    ):
        yield Fault(
            "cores",
            at(path, "node", "cores_reserved"),
            f"{node.cores} cores less {len(node.cores_reserved)} reserved are not {node.cores_usable}",
        )
    threads = request.cpus_are == "threads"
    if threads and (node.threads_per_core or 1) < 2:
        yield Fault(
            "cores",
            at(path, "request", "cpus_are"),
            "the scheduler is said to count threads, but node.threads_per_core is not 2 or more",
            "state node.threads_per_core, or cpus_are: cores",
        )
    if (node.threads_per_core or 1) > 1 and request.cpus_per_gpu and "cpus_are" not in request.model_fields_set:
        yield Fault(
            "cores",
            at(path, "request", "cpus_per_gpu"),
            f"cores have {node.threads_per_core} threads here, and it is not said which of them the scheduler counts",
            "request.cpus_are: cores or threads, as a script that is known to fill a node asks for it",
        )
    most = usable * (node.threads_per_core or 1 if threads else 1) if usable else None
    if request.cpus_per_gpu and node.gpus and most and request.cpus_per_gpu * node.gpus > most:
        yield Fault(
            "cores",
            at(path, "request", "cpus_per_gpu"),
            f"{request.cpus_per_gpu} {request.cpus_are} per GPU x {node.gpus} GPUs are more than the {most} usable "
            f"{request.cpus_are}",
            f"at most {most // node.gpus}",
        )
    if node.gpu_numa and node.gpus and len(node.gpu_numa) != node.gpus:
        yield Fault("binding", at(path, "node", "gpu_numa"), f"{len(node.gpu_numa)} NUMA domains for {node.gpus} GPUs")
    if node.gpu_numa and node.numa_domains and max(node.gpu_numa) >= node.numa_domains:
        yield Fault("binding", at(path, "node", "gpu_numa"), f"domain {max(node.gpu_numa)} of {node.numa_domains}")


def _memory(system: System, path: Path) -> Iterator[Fault]:
    node, request = system.node, system.request
    if node.memory_gib and node.memory_usable_gib and node.memory_usable_gib > node.memory_gib:
        yield Fault(
            "memory",
            at(path, "node", "memory_usable_gib"),
            f"{node.memory_usable_gib} GiB usable of {node.memory_gib}",
        )
    room = node.memory_usable_gib or node.memory_gib
    if request.memory_gib and room:
        asked = request.memory_gib * (node.gpus or 1 if request.memory == "mem-per-gpu" else 1)
        if asked > room:
            yield Fault(
                "memory", at(path, "request", "memory_gib"), f"{asked:g} GiB are asked for, a node has {room:g}"
            )
    if request.memory in ("mem", "mem-per-gpu") and request.memory_gib is None:
        yield Fault(
            "memory",
            at(path, "request", "memory"),
            f"memory is asked for with --{request.memory} but no amount is given",
        )


def _network(system: System, path: Path) -> Iterator[Fault]:
    net = system.interconnect
    if (
        net.node_gbit_s
        and net.nics_per_node
        and net.nic_gbit_s
        and net.node_gbit_s != net.nics_per_node * net.nic_gbit_s
    ):
        yield Fault(
            "network",
            at(path, "interconnect"),
            f"{net.nics_per_node} x {net.nic_gbit_s:g} is not {net.node_gbit_s:g} Gbit/s",
        )
    if net.hcas and net.nics_per_node and len(net.hcas) != net.nics_per_node:
        yield Fault("network", at(path, "interconnect", "hcas"), f"{len(net.hcas)} HCAs for {net.nics_per_node} NICs")
    if (
        net.in_node.pair_gb_s
        and net.in_node.slowest_pair_gb_s
        and net.in_node.slowest_pair_gb_s > net.in_node.pair_gb_s
    ):
        yield Fault(
            "network", at(path, "interconnect", "in_node"), "the slowest pair is faster than a pair of neighbours"
        )


def _software(system: System, path: Path) -> Iterator[Fault]:
    wheels, isa = system.software.wheels_isa, system.node.isa
    if wheels and isa and wheels != isa:
        yield Fault("isa", at(path, "software", "wheels_isa"), f"environments for {wheels} do not run on {isa} nodes")
    vendor = system.gpu.vendor
    for i, box in enumerate(system.software.containers):
        if (box.gpu_flag == "--rocm" and vendor == "nvidia") or (box.gpu_flag == "--nv" and vendor == "amd"):
            yield Fault("container", at(path, "software", "containers", i), f"{box.gpu_flag} on {vendor} GPUs")
        if box.image and "." not in box.image.rpartition("/")[2] and "pattern" not in box.model_fields_set:
            yield Fault(
                "container",
                at(path, "software", "containers", i),
                f"{box.image} is a folder, and of several images the last by name would be taken",
                "pattern: which of them holds torch, such as '*-full-*.sif'",
            )


def _limits(system: System, path: Path) -> Iterator[Fault]:
    for name, part in system.partitions.items():
        where = at(path, "partitions", name)
        if part.default_time and part.max_time and part.default_time > part.max_time:
            yield Fault("limits", where, f"{name}: the default time exceeds the maximum")
        if part.min_nodes and part.max_nodes and part.min_nodes > part.max_nodes:
            yield Fault("limits", where, f"{name}: min_nodes {part.min_nodes} exceeds max_nodes {part.max_nodes}")
        if part.max_nodes and part.nodes and part.max_nodes > part.nodes:
            yield Fault("limits", where, f"{name}: a job may take {part.max_nodes} nodes of {part.nodes}")
        if part.nodes and system.node.count and part.nodes > system.node.count:
            yield Fault(
                "limits", where, f"{name}: {part.nodes} nodes in the partition, {system.node.count} in the machine"
            )
        for qos in part.qos:
            if qos not in system.qos:
                yield Fault(
                    "qos", where, f"{name} names the QoS '{qos}'{did_you_mean(qos, system.qos)}, which is not defined"
                )
            elif part.max_time and (system.qos[qos].max_time or 0) > part.max_time:
                yield Fault("limits", where, f"QoS {qos} allows longer jobs than its partition {name}")
    limits: list[tuple[str, Partition | Qos]] = [*system.partitions.items(), *system.qos.items()]
    for name, limit in limits:
        if limit.max_gpus and limit.min_nodes and limit.max_gpus < limit.min_nodes:
            where = at(path, "qos" if name in system.qos else "partitions", name)
            yield Fault("limits", where, f"{name}: {limit.min_nodes} nodes and more, but {limit.max_gpus} GPUs at most")
    for name, q in system.qos.items():
        if q.min_nodes and q.max_nodes and q.min_nodes > q.max_nodes:
            yield Fault(
                "limits", at(path, "qos", name), f"{name}: min_nodes {q.min_nodes} exceeds max_nodes {q.max_nodes}"
            )
        if q.max_nodes and system.node.count and q.max_nodes > system.node.count:
            yield Fault(
                "limits", at(path, "qos", name), f"{name}: {q.max_nodes} nodes, the machine has {system.node.count}"
            )
    if system.partitions and system.default_partition not in system.partitions:
        reported = (
            f"'{system.default_partition}' is not one of the partitions"
            if system.default_partition
            else "no default_partition"
        )
        yield Fault(
            "default-partition", at(path, "default_partition"), reported, f"one of {', '.join(system.partitions)}"
        )


def _scheduler(system: System, path: Path) -> Iterator[Fault]:
    kind, form = system.scheduler.kind, system.request.gpus
    known = SCHEDULERS.get(kind or "")
    if known and form and form not in known.gpu_requests:
        yield Fault(
            "scheduler",
            at(path, "request", "gpus"),
            f"'{form}' is not how {kind} takes GPUs",
            f"one of {', '.join(known.gpu_requests)}",
        )
    if system.request.gres_type and form not in ("gres", "gpus-per-node", "gpus"):
        yield Fault("scheduler", at(path, "request", "gres_type"), f"gres_type without a GRES request ({form})")
    flavour = system.scheduler.flavour
    if known and flavour and flavour not in known.flavours:
        yield Fault("scheduler", at(path, "scheduler", "flavour"), f"{flavour} is not a flavour of {kind}")
    if form == "pbs-select" and not system.request.pbs_select:
        yield Fault(
            "scheduler",
            at(path, "request"),
            "pbs-select needs the chunk's resources",
            "request.pbs_select: what one node is, such as ngpus=4:ncpus=64",
        )


def masks(cpu_bind: str | None) -> list[int]:
    """The CPU masks of ``mask_cpu:0x..,0x..`` as integers; empty for other forms."""
    if not cpu_bind or "mask_cpu" not in cpu_bind:
        return []
    return [int(m, 16) for m in re.findall(r"0x([0-9a-fA-F]+)", cpu_bind)]


def _launch(system: System, path: Path) -> Iterator[Fault]:
    node = system.node
    found = masks(system.launch.cpu_bind)
    where = at(path, "launch", "cpu_bind")
    if found and node.gpus and len(found) != node.gpus:
        yield Fault("binding", where, f"{len(found)} masks for {node.gpus} GPUs")
    for i, mask in enumerate(found):
        cores = {bit for bit in range(mask.bit_length()) if mask >> bit & 1}
        if node.cores and cores and max(cores) >= node.cores * (node.threads_per_core or 1):
            yield Fault("binding", where, f"mask {i} names core {max(cores)} of {node.cores}")
        if cores & set(node.cores_reserved):
            yield Fault("binding", where, f"mask {i} takes reserved cores {sorted(cores & set(node.cores_reserved))}")
        if any(mask & other for other in found[:i]):
            yield Fault("binding", where, f"mask {i} overlaps an earlier one")
        if system.request.cpus_per_gpu and len(cores) != system.request.cpus_per_gpu:
            yield Fault(
                "binding",
                where,
                f"mask {i} holds {len(cores)} cores, {system.request.cpus_per_gpu} are asked for per GPU",
            )
    for variable in system.environment.set:
        if (
            variable in system.environment.avoid
            or f"{variable}={system.environment.set[variable]}" in system.environment.avoid
        ):
            yield Fault("environment", at(path, "environment", "set", variable), f"{variable} is set and to be avoided")
        if variable in LEFT_TO_TORCH:
            why = f"{variable} is left to torch: {LEFT_TO_TORCH[variable]}"
            yield Fault("environment", at(path, "environment", "set", variable), why)
    head = system.launch.head_address
    if head.strategy == "suffix" and not head.suffix:
        yield Fault("schema", at(path, "launch", "head_address"), "the strategy 'suffix' needs a suffix")
    if head.strategy == "interface" and not head.interface:
        yield Fault("schema", at(path, "launch", "head_address"), "the strategy 'interface' needs an interface")


def _access(system: System, path: Path) -> Iterator[Fault]:
    access, example = system.access, system.access.example
    where = at(path, "access", "example")
    account = example.get("account")
    if access.account_suffix and access.account_pattern and account and not account.endswith(access.account_suffix):
        yield Fault("account", where, f"'{account}' does not end in '{access.account_suffix}'")
    if account and access.account_pattern and not re.fullmatch(access.account_pattern, account):
        yield Fault("account", where, f"'{account}' is not of the form {access.account_pattern}")
    if access.account == "required" and not account:
        yield Fault("example", where, "an account is required, the example has none")
    if access.qos in ("required", "project") and not example.get("qos"):
        yield Fault("example", where, "a QoS is required, the example has none")
    if access.qos == "project" and access.qos_pattern and not re.fullmatch(access.qos_pattern, example.get("qos", "")):
        yield Fault("example", where, f"'{example.get('qos')}' is not of the form {access.qos_pattern}")
    partition = example.get("partition")
    if partition and partition not in system.partitions:
        yield Fault("example", where, f"'{partition}' is not one of the partitions")
    qos = example.get("qos")
    if qos and access.qos != "project" and system.qos and qos not in system.qos:
        yield Fault("example", where, f"'{qos}' is not one of the QoS")


#: Each takes a usable system and the path of its file.
RULES = (_gpu, _cores, _memory, _network, _software, _limits, _scheduler, _launch, _access)
