"""What the machine we stand on says about itself, and how that differs from its profile.

Slurm is asked with ``sinfo`` and ``scontrol`` (no accounting needed), devices with ``nvidia-smi`` or ``rocm-smi``, the
CPU with ``lscpu``. Devices and CPU are compared inside a job only: a login node is not a compute node.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, field
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.sites.detection import (
    NVIDIA_QUERY,
    Device,
    match_sku,
    parse_lscpu,
    parse_nvidia_smi,
    parse_rocm_smi,
    run_tool,
)
from aifactory_train.sites.fields import compact_time
from aifactory_train.sites.paths import dig
from aifactory_train.sites.system import System

SINFO = ["sinfo", "-h", "-e", "-o", "%R|%D|%c|%X|%Y|%Z|%m|%l|%L|%G|%f|%s"]


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of one partition that are alike (one line of sinfo)."""

    partition: str
    nodes: int
    cpus: int
    sockets: int
    cores_per_socket: int
    threads: int
    memory_mib: int
    max_time: int | None  # seconds
    default_time: int | None
    gpus: int
    gpu_type: str | None
    features: tuple[str, ...]

    @property
    def cores(self) -> int:
        return self.sockets * self.cores_per_socket


@dataclass
class Observation:
    """Everything read here. ``evidence`` maps a fact's path to the command that showed it."""

    version: str | None = None
    cluster: str | None = None
    groups: list[NodeGroup] = field(default_factory=list)
    partitions: dict[str, dict[str, str]] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    node: dict[str, str] = field(default_factory=dict)
    cpu: dict[str, Any] = field(default_factory=dict)
    devices: list[Device] = field(default_factory=list)
    in_job: bool = False
    machine: str | None = None
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Difference:
    """One fact that the machine tells otherwise. ``observed`` is None where the profile's entry does not exist
    there.
    """

    path: str
    profile: Any
    observed: Any
    evidence: str
    kind: str  # differs | new | gone

    @property
    def correction(self) -> Any:
        """The value as a profile writes it (times as text)."""
        if self.observed is not None and self.path.rsplit(".", 1)[-1] in ("max_time", "default_time"):
            return compact_time(self.observed)
        return self.observed


# -- parsers
# -----------------------------------------------------------------------------------------------------------------


def _number(text: str) -> int:
    found = re.match(r"\d+", text.strip())
    return int(found.group()) if found else 0


def slurm_seconds(text: str) -> int | None:
    """Seconds of a Slurm time limit; None for infinite, n/a or NONE. Slurm leaves days, hours or minutes out."""
    text = text.strip()
    if text.lower() in ("infinite", "n/a", "none", "unlimited", ""):
        return None
    found = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not found:
        raise ValueError(f"'{text}' is not a time as Slurm prints it")
    days, hours, minutes, seconds = (int(g or 0) for g in found.groups())
    return days * 86400 + hours * 3600 + minutes * 60 + seconds


def parse_gres(text: str) -> tuple[int, str | None]:
    """(number of GPUs, their type or None) from a GRES string such as ``gpu:a100:4(S:0-1),nvme:1``."""
    count, kind = 0, None
    plain = re.sub(r"\([^)]*\)", "", text)
    for item in plain.split(","):
        parts = item.strip().split(":")
        if parts[0] != "gpu":
            continue
        if len(parts) == 3:
            kind, count = parts[1], count + _number(parts[2])
        elif len(parts) == 2:
            count += _number(parts[1]) if parts[1][:1].isdigit() else 1
        else:
            count += 1
    return count, kind


def parse_sinfo(text: str) -> list[NodeGroup]:
    """Groups of alike nodes from ``sinfo -h -e -o '%R|%D|%c|%X|%Y|%Z|%m|%l|%L|%G|%f|%s'``."""
    groups = []
    for line in text.splitlines():
        cells = line.strip().split("|")
        if len(cells) < 12:
            continue
        name, nodes, cpus, sockets, cores, threads, memory, limit, default, gres, features, _ = cells[:12]
        gpus, kind = parse_gres(gres)
        groups.append(
            NodeGroup(
                partition=name.rstrip("*"),
                nodes=_number(nodes),
                cpus=_number(cpus),
                sockets=_number(sockets),
                cores_per_socket=_number(cores),
                threads=_number(threads),
                memory_mib=_number(memory),
                max_time=slurm_seconds(limit),
                default_time=slurm_seconds(default),
                gpus=gpus,
                gpu_type=kind,
                features=tuple(f for f in features.split(",") if f and f != "(null)"),
            )
        )
    return groups


def parse_scontrol(text: str) -> list[dict[str, str]]:
    """Records of ``scontrol -o show partition|node``: one line each, ``Key=value`` separated by blanks."""
    records = []
    for line in text.splitlines():
        pairs = re.findall(r"(?:^|\s)([A-Za-z][A-Za-z0-9_:/]*)=((?:(?!\s[A-Za-z][A-Za-z0-9_:/]*=).)*)", line)
        if pairs:
            records.append({k: v.strip() for k, v in pairs})
    return records


def parse_config(text: str) -> dict[str, str]:
    """``scontrol show config`` as a dict."""
    return {m.group(1): m.group(2).strip() for m in re.finditer(r"^(\w+)\s*=\s*(.*)$", text, re.M)}


# -- reading
# -----------------------------------------------------------------------------------------------------------------


def observe() -> Observation:
    """Ask Slurm and the drivers of this machine. What does not answer is named in ``problems``."""
    seen = Observation(in_job="SLURM_JOB_ID" in os.environ or "PBS_JOBID" in os.environ, machine=platform.machine())
    text = run_tool(SINFO)
    if text is None:
        seen.problems.append("sinfo does not answer here: nothing about partitions")
    else:
        seen.groups = parse_sinfo(text)
        config = parse_config(run_tool(["scontrol", "show", "config"]) or "")
        seen.config = config
        seen.version, seen.cluster = config.get("SLURM_VERSION"), config.get("ClusterName")
        for record in parse_scontrol(run_tool(["scontrol", "-o", "show", "partition"]) or ""):
            seen.partitions[record["PartitionName"]] = record
    seen.cpu = parse_lscpu(run_tool(["lscpu"]) or "")
    nvidia = run_tool(["nvidia-smi", f"--query-gpu={NVIDIA_QUERY}", "--format=csv"])
    rocm = run_tool(["rocm-smi", "--showproductname", "--showmeminfo", "vram", "--showdriverversion", "--json"])
    if nvidia:
        seen.devices = parse_nvidia_smi(nvidia)
    elif rocm:
        try:
            seen.devices = parse_rocm_smi(rocm)
        except ValueError as error:
            seen.problems.append(f"rocm-smi: {error}")
    else:
        seen.problems.append("neither nvidia-smi nor rocm-smi answers here: nothing about devices")
    return seen


def node_record(groups: list[NodeGroup], partition: str) -> dict[str, str]:
    """``scontrol show node`` of one GPU node of the partition (reserved cores, architecture)."""
    names = run_tool(["sinfo", "-h", "-N", "-p", partition, "-o", "%N|%G"]) or ""
    for line in names.splitlines():
        name, _, gres = line.strip().partition("|")
        if parse_gres(gres)[0]:
            records = parse_scontrol(run_tool(["scontrol", "-o", "show", "node", name]) or "")
            return records[0] if records else {}
    return {}


# -- comparing
# ---------------------------------------------------------------------------------------------------------------


def facts_of(groups: list[NodeGroup], record: dict[str, str]) -> dict[str, tuple[Any, str]]:
    """Node facts (path → value, evidence) of the largest group of alike GPU nodes."""
    gpu_groups = [g for g in groups if g.gpus]
    if not gpu_groups:
        return {}
    group = max(gpu_groups, key=lambda g: g.nodes)
    facts: dict[str, tuple[Any, str]] = {
        "node.gpus": (group.gpus, "sinfo %G"),
        "node.sockets": (group.sockets, "sinfo %X"),
        "node.cores": (group.cores, "sinfo %X x %Y"),
        "node.threads_per_core": (group.threads, "sinfo %Z"),
    }
    memory_mib = group.memory_mib - _number(record.get("MemSpecLimit", "0"))
    facts["node.memory_usable_gib"] = (round(memory_mib / 1024, 1), "sinfo %m")
    if group.gpu_type:
        facts["request.gres_type"] = (group.gpu_type, "sinfo %G")
    reserved = _number(record.get("CoreSpecCount", "0"))
    effective = _number(record.get("CPUEfctv", "0"))
    if effective and group.threads:
        facts["node.cores_usable"] = (effective // group.threads, "scontrol show node CPUEfctv")
    elif reserved:
        facts["node.cores_usable"] = (group.cores - reserved, "scontrol show node CoreSpecCount")
    if record.get("Arch") in ("x86_64", "aarch64"):
        facts["node.isa"] = (record["Arch"], "scontrol show node Arch")
    return facts


def partition_facts(name: str, groups: list[NodeGroup], record: dict[str, str]) -> dict[str, tuple[Any, str]]:
    """Facts of one partition (path → value, evidence); limits that Slurm calls unlimited are left out."""
    base = f"partitions.{name}"
    mine = [g for g in groups if g.partition == name]
    facts: dict[str, tuple[Any, str]] = {f"{base}.nodes": (sum(g.nodes for g in mine), "sinfo %D")}
    limits = {g.max_time for g in mine if g.max_time}
    if limits:
        facts[f"{base}.max_time"] = (max(limits), "sinfo %l")
    defaults = {g.default_time for g in mine if g.default_time}
    if defaults and record.get("DefaultTime", "NONE") != "NONE":
        facts[f"{base}.default_time"] = (max(defaults), "sinfo %L")
    if record.get("MaxNodes", "UNLIMITED").isdigit():
        facts[f"{base}.max_nodes"] = (int(record["MaxNodes"]), "scontrol show partition MaxNodes")
    if record.get("MinNodes", "0").isdigit() and int(record.get("MinNodes", "0")) > 1:
        facts[f"{base}.min_nodes"] = (int(record["MinNodes"]), "scontrol show partition MinNodes")
    if record.get("State") in ("UP", "DOWN"):
        facts[f"{base}.state"] = (record["State"].lower(), "scontrol show partition State")
    over = record.get("OverSubscribe", "")
    if over.startswith("EXCLUSIVE"):
        facts[f"{base}.shared"] = (False, "scontrol show partition OverSubscribe")
    return facts


def memory_rule(seen: Observation, partition: str) -> tuple[str, str] | None:
    """(``mem`` or ``none``, evidence): whether a job must ask for host memory. None where Slurm does not say.

    Where memory is a resource of its own, a job that asks for none gets the default for each CPU or GPU, or all where
    there is no default; a node's share in proportion to its GPUs is then asked for.
    """
    parameters = seen.config.get("SelectTypeParameters", "")
    if not parameters or parameters.upper() in ("NONE", "(NULL)"):
        return None
    if "MEMORY" not in parameters.upper():
        return "none", f"scontrol show config SelectTypeParameters={parameters}"
    for record in (seen.partitions.get(partition, {}), seen.config):
        for key in ("DefMemPerCPU", "DefMemPerGPU", "DefMemPerNode"):
            if record.get(key, "").isdigit() and int(record[key]) > 0:
                return "mem", f"{key}={record[key]}"
    return "mem", f"scontrol show config SelectTypeParameters={parameters}"


def account_rule(seen: Observation) -> tuple[str, str] | None:
    """(``required``, evidence) where Slurm starts no job without an association; None where it does not say or does not
    enforce any.
    """
    enforced = seen.config.get("AccountingStorageEnforce", "").lower()
    if "associations" not in enforced:
        return None
    return "required", f"scontrol show config AccountingStorageEnforce={enforced}"


#: Facts that a probe adds only where the profile already says something about them: they matter for rendering or
#: arithmetic there, and on a shared machine they move with every drained node.
_ONLY_IF_STATED = ("nodes", "default_time", "shared", "sockets", "threads_per_core", "state")


def _same(path: str, profile: Any, observed: Any) -> bool:
    leaf = path.rsplit(".", 1)[-1]
    if leaf == "memory_usable_gib" and isinstance(profile, (int, float)):
        return abs(profile - observed) <= 0.02 * observed
    if leaf == "nodes" and isinstance(profile, int):
        return abs(profile - observed) <= 0.02 * observed
    return profile == observed


def compare(system: System, seen: Observation, record: dict[str, str] | None = None) -> list[Difference]:
    """Where the machine differs from the profile, in the profile's order. Pure but for ``record`` being asked for if
    None.
    """
    found: dict[str, tuple[Any, str]] = {}
    gone: list[Difference] = []
    real = {g.partition for g in seen.groups} | set(seen.partitions)
    chosen: list[NodeGroup] = []
    for name, part in system.partitions.items():
        if part.implicit:
            chosen += [g for g in seen.groups if part.constraint and part.constraint in g.features]
            continue
        if not seen.groups:
            continue
        if name not in real:
            gone.append(Difference(f"partitions.{name}", "defined", None, "sinfo %R", "gone"))
            continue
        chosen += [g for g in seen.groups if g.partition == name]
        found |= partition_facts(name, seen.groups, seen.partitions.get(name, {}))
    if record is None:
        first = next((g.partition for g in chosen if g.gpus), None)
        record = node_record(seen.groups, first) if first else {}
    found |= facts_of(chosen, record)
    if seen.version:
        found["scheduler.version"] = (seen.version, "scontrol show config")
    if seen.in_job:
        found |= _hardware(system, seen)
    elif seen.machine in ("x86_64", "aarch64"):
        found["node.login_isa"] = (seen.machine, "uname -m")
    differences = list(gone)
    for path, (observed, evidence) in found.items():
        profile = _profile_value(system, path)
        if profile is None:
            if path.rsplit(".", 1)[-1] in _ONLY_IF_STATED or path in ("scheduler.version", "node.cores_usable"):
                continue
            if path == "node.login_isa" and system.node.isa == observed:
                continue  # one instruction set throughout: nothing to add
            if path == "node.memory_usable_gib" and _plausible(system.node.memory_gib, observed):
                continue
            if path == "request.gres_type" and system.request.gpus != "gres":
                continue
            differences.append(Difference(path, None, observed, evidence, "new"))
        elif not _same(path, profile, observed):
            differences.append(Difference(path, profile, observed, evidence, "differs"))
    return differences


def _plausible(total: float | None, usable: float) -> bool:
    """Whether a node of ``total`` GiB may show ``usable`` GiB to jobs: a system keeps up to a tenth for itself."""
    return total is not None and 0.9 * total <= usable <= total


def _profile_value(system: System, path: str) -> Any:
    try:
        value = dig(system, path)
    except (KeyError, ValueError):
        return None
    return value


def _hardware(system: System, seen: Observation) -> dict[str, tuple[Any, str]]:
    facts: dict[str, tuple[Any, str]] = {}
    for key in ("isa", "numa_domains"):
        if seen.cpu.get(key):
            facts[f"node.{key}"] = (seen.cpu[key], "lscpu")
    if seen.devices:
        tool = "nvidia-smi" if seen.devices[0].vendor == "nvidia" else "rocm-smi"
        first = seen.devices[0]
        sku = match_sku(first)
        if sku:
            facts["gpu.sku"] = (sku, tool)
        if first.arch:
            facts["gpu.arch"] = (first.arch, tool)
        if first.memory_mib:
            facts["gpu.memory_visible_mib"] = (first.memory_mib, tool)
    return facts


def patch(system: System, differences: list[Difference]) -> dict[str, Any]:
    """The differences as an overlay: save it as ``~/.config/aifactory/sites/<id>.yaml`` or send it to the profile's
    maintainer.
    """
    return {"overlay_for": system.id, "corrections": {d.path: d.correction for d in differences}}


def require_something(seen: Observation) -> None:
    """Refuse where nothing at all could be read."""
    if not seen.groups and not seen.devices and not seen.in_job:
        raise UserError(
            "nothing to compare with: " + "; ".join(seen.problems),
            where="sites probe",
            fix="run it on a login node of the system (Slurm's sinfo on PATH) or inside a job",
        )


__all__ = [
    "Difference",
    "NodeGroup",
    "Observation",
    "compare",
    "facts_of",
    "node_record",
    "observe",
    "parse_config",
    "parse_gres",
    "parse_scontrol",
    "parse_sinfo",
    "patch",
    "slurm_seconds",
]
