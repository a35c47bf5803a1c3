"""Faults in profiles, found by machine: schema, provenance, arithmetic, limits, links, dates. Each has a name.

``check_room`` looks at a whole folder (``factories.yaml``, ``gpus.yaml``, ``systems/``), ``check_system`` at one profile.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aifactory_train.errors import UserError, did_you_mean
from aifactory_train.sites import profiles
from aifactory_train.sites.index import READINESS_WORDS
from aifactory_train.sites.profiles import System, covering, dig, fact_leaves, line_of, read_yaml, resolve
from aifactory_train.sites.schema import FACT_SECTIONS, FactEntry, Gpu, Profile, Source

#: Every fault that can be found, with what it means. `aifactory sites check --list` prints it.
FAULTS = {
    "yaml": "the file is not valid YAML, or a key is written twice",
    "schema": "an unknown key, a missing key or a value of the wrong kind",
    "file-name": "the file is not called <id>.yaml",
    "duplicate-name": "an id, name or alias is used by two systems",
    "no-source": "a fact has no entry in facts:",
    "unknown-source": "facts: or a note names a source that is not defined",
    "unused-fact": "facts: names a path that holds no value",
    "undated": "a source is undated and does not say when it was retrieved",
    "future-date": "a source is dated in the future",
    "expired": "the profile's expiry has passed: read its sources again",
    "recalled": "a remembered value where only GPU constants may be remembered",
    "not-usable-fact": "a machine that nobody can use yet states facts instead of notes",
    "missing-list": "missing: does not name exactly the core facts that are not known",
    "status-reason": "a machine is not usable and does not say why",
    "maintainer": "the maintainer line is empty",
    "private": "an account, user path or code stands in a profile",
    "arch": "the architecture does not fit the vendor or the GPU",
    "gpu-constants": "constants contradict each other (no bf16 before sm_80, fnuz fp8 on gfx942 only, ...)",
    "cores": "cores per GPU times GPUs exceed the usable cores, or usable cores exceed the cores",
    "memory": "memory asked for or usable exceeds what the node has",
    "limits": "limits out of order (default over maximum, minimum over maximum, more nodes than there are)",
    "qos": "a partition names a QoS that is not defined",
    "default-partition": "default_partition is not one of the partitions, or is not given",
    "scheduler": "the request's form does not fit the scheduler",
    "isa": "the environment is built for another instruction set than the nodes",
    "binding": "binding masks or NUMA domains do not fit the GPUs, the cores or the reserved cores",
    "network": "NICs times speed is not the node's bandwidth",
    "container": "a GPU flag for the other vendor",
    "environment": "a variable is set and is to be avoided",
    "account": "suffix, pattern and example of the account do not fit",
    "example": "the example values break the profile's own rules",
    "members": "not exactly 19 factories and 13 antennas",
    "country": "a member's country has no name",
    "sector": "an unknown sector, or none without a reason",
    "link": "a link, system or announced system does not exist or has another status",
    "no-reason": "a member without a usable system gives no reason",
    "orphan": "a system belongs to no member",
    "readiness": "readiness.yaml names no system, no known level, or gives no date and evidence",
    "index": "index.json was built from other files",
}

NOT_OWNED = ("generic-slurm",)


@dataclass(frozen=True)
class Place:
    """A key of a file; the line is looked up when it is printed, because most places are never printed."""

    path: Path | None
    keys: tuple[Any, ...]

    def __str__(self) -> str:
        if self.path is None:
            return ".".join(str(k) for k in self.keys)
        line = line_of(self.path, self.keys)
        return f"{self.path.name}:{line}" if line else self.path.name


@dataclass(frozen=True)
class Fault:
    """One fault. ``severity`` is error or warning; ``where`` is file:line."""

    name: str
    place: Place | str
    what: str
    fix: str | None = None
    severity: str = "error"

    @property
    def where(self) -> str:
        return str(self.place)

    def as_dict(self) -> dict[str, str | None]:
        return {"name": self.name, "where": self.where, "what": self.what, "fix": self.fix, "severity": self.severity}


@dataclass
class Report:
    faults: list[Fault]
    systems: int = 0
    complete: int = 0
    numeric_facts: int = 0
    numeric_covered: int = 0
    facts: int = 0
    covered: int = 0

    @property
    def ok(self) -> bool:
        return not any(f.severity == "error" for f in self.faults)


def _at(path: Path | None, *keys: Any) -> Place:
    return Place(path, keys)


def _keys(dotted: str) -> list[Any]:
    return [int(k) if k.isdigit() else k for k in dotted.split(".")]


# -- one profile -------------------------------------------------------------------------------------------------------------


def check_system(path: Path, report: Report, today: datetime.date | None = None) -> System | None:
    """Append the faults of one profile file to ``report``; returns the system where it could be read."""
    today = today or datetime.date.today()
    faults = report.faults
    try:
        raw = read_yaml(path)
    except UserError as error:
        faults.append(Fault("yaml", error.where or path.name, error.what, error.fix))
        return None
    try:
        system = resolve(raw, path)
    except UserError as error:
        name = "arch" if "architecture name" in error.what else "schema"
        faults.append(Fault(name, error.where or path.name, error.what, error.fix))
        return None
    report.systems += 1
    faults.extend(_identity(system, path, today))
    faults.extend(_provenance(system, raw, path, report, today))
    faults.extend(_private(raw, path))
    if not system.usable:
        stated = [s for s in FACT_SECTIONS if raw.get(s)]
        if stated:
            faults.append(
                Fault(
                    "not-usable-fact",
                    _at(path, stated[0]),
                    f"{system.id} is {system.status} but states {', '.join(stated)}",
                    "what is announced goes into notes",
                )
            )
        return system
    report.complete += system.complete
    for rule in (_gpu, _node, _limits, _scheduler, _launch, _access):
        faults.extend(rule(system, path))
    return system


def _identity(system: System, path: Path, today: datetime.date) -> Iterator[Fault]:
    if path.stem != system.id:
        yield Fault(
            "file-name", _at(path, "id"), f"the profile '{system.id}' lies in {path.name}", f"name it {system.id}.yaml"
        )
    if not system.maintainer.strip():
        yield Fault(
            "maintainer", _at(path, "maintainer"), "the maintainer line is empty", "name a person, team or 'nobody yet'"
        )
    if system.expires < today:
        yield Fault(
            "expired", _at(path, "expires"), f"expired on {system.expires}", "read its sources again and set a new date"
        )
    if not system.usable and not (system.status_reason or "").strip():
        yield Fault(
            "status-reason", _at(path, "status"), f"{system.status}, but no status_reason", "say why, in a few words"
        )
    if system.usable:
        want, have = set(system.core_missing()), {m for m in system.missing if "." not in m}
        if want != have:
            lacking, surplus = sorted(want - have), sorted(have - want)
            told = [f"not listed: {', '.join(lacking)}"] if lacking else []
            told += [f"listed but known: {', '.join(surplus)}"] if surplus else []
            yield Fault("missing-list", _at(path, "missing"), "; ".join(told), f"missing: {sorted(want)}")
        for dotted in (m for m in system.missing if "." in m):
            try:
                value = dig(system, dotted)
            except (KeyError, ValueError):
                yield Fault("missing-list", _at(path, "missing"), f"'{dotted}' is no path of the schema")
                continue
            if value not in (None, [], {}):
                yield Fault("missing-list", _at(path, "missing"), f"'{dotted}' is listed but holds a value")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _provenance(
    system: System, raw: dict[str, Any], path: Path, report: Report, today: datetime.date
) -> Iterator[Fault]:
    shared = profiles.shared_sources()
    known = {**shared, **system.sources}
    table = {p: entry for entry in system.facts for p in entry.at}
    # Durations are written as text ("48h") and are numbers all the same: the resolved value decides.
    for dotted, _ in fact_leaves(raw):
        value = dig(system, dotted)
        numeric = _is_number(value) or (isinstance(value, list) and any(_is_number(v) for v in value))
        report.facts += 1
        report.numeric_facts += numeric
        entry = covering(dotted, table)
        if entry is None:
            yield Fault(
                "no-source", _at(path, *_keys(dotted)), f"{dotted} has no source", "add its path to an entry of facts:"
            )
            continue
        source = known.get(entry.source)
        if source is None:
            continue  # reported once below
        report.covered += 1
        report.numeric_covered += bool(numeric and source.date and entry.confidence)
        if entry.confidence == "recalled" and not dotted.startswith("gpu."):
            yield Fault(
                "recalled",
                _at(path, *_keys(dotted)),
                f"{dotted} is remembered; only GPU constants may be",
                "leave it out, list it under missing:, put it into a note",
            )
    for i, fact in enumerate(system.facts):
        if fact.source not in known:
            yield Fault(
                "unknown-source",
                _at(path, "facts", i),
                f"the source '{fact.source}' is not defined{did_you_mean(fact.source, known)}",
                "define it under sources:, or use one of sources.yaml",
            )
        for dotted in fact.at:
            try:
                value = dig(system, dotted)
            except (KeyError, ValueError):
                value = None
            if value in (None, [], {}):
                yield Fault("unused-fact", _at(path, "facts", i), f"facts names '{dotted}', which holds no value")
    for i, note in enumerate(system.notes):
        if note.source not in known:
            yield Fault(
                "unknown-source",
                _at(path, "notes", i),
                f"the source '{note.source}' is not defined{did_you_mean(note.source, known)}",
            )
    for name, source in system.sources.items():
        yield from _dated(name, source, path, today)
        if name in shared:
            yield Fault("unknown-source", _at(path, "sources", name), f"'{name}' is defined in sources.yaml already")


def _dated(name: str, source: Source, path: Path, today: datetime.date) -> Iterator[Fault]:
    if source.date == "n.d." and not source.retrieved:
        yield Fault(
            "undated",
            _at(path, "sources", name),
            f"the source '{name}' has no date",
            "add retrieved: <day you read it>",
        )
    for value in (source.date, source.retrieved):
        if value and value != "n.d." and value > today.isoformat()[: len(value)]:
            yield Fault(
                "future-date", _at(path, "sources", name), f"the source '{name}' is dated {value}, today is {today}"
            )


#: What must not stand in a profile: somebody's home, a secret, a command.
_PRIVATE = (
    (re.compile(r"/(?:home|users|u)/(?!\{|\$|<)[a-z][a-z0-9._-]+", re.I), "a user's path"),
    (re.compile(r"\$\(|`|;\s*(?:rm|export|source|bash)\b|&&\s|\|\s*(?:sh|bash)\b"), "code"),
    (re.compile(r"(?:hf|ghp|sk)_[A-Za-z0-9]{16,}|BEGIN [A-Z ]*PRIVATE KEY"), "a secret"),
)


def _private(raw: dict[str, Any], path: Path) -> Iterator[Fault]:
    for section in FACT_SECTIONS:
        for dotted, value in profiles.leaves(raw.get(section) or {}, section):
            if dotted.endswith(("notes", "note", "login_notes")) or "avoid." in dotted:
                continue  # prose
            for text in value if isinstance(value, list) else [value]:
                for pattern, what in _PRIVATE:
                    if isinstance(text, str) and not dotted.startswith("detect.") and pattern.search(text):
                        yield Fault(
                            "private",
                            _at(path, *_keys(dotted)),
                            f"{dotted} holds {what}: {text!r}",
                            "it belongs into an overlay",
                        )


# -- rules of one usable system ----------------------------------------------------------------------------------------------


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
    yield from gpu_faults(system.gpu, _at(path, "gpu"))
    if system.gpu.sku:
        arch = profiles.gpu_catalogue()[system.gpu.sku].get("arch")
        if arch and system.gpu.arch and arch != system.gpu.arch:
            yield Fault(
                "arch",
                _at(path, "gpu", "arch"),
                f"{system.gpu.sku} is {arch}, not {system.gpu.arch}",
                "leave arch out: it follows from the SKU",
            )


def _node(system: System, path: Path) -> Iterator[Fault]:
    node, request = system.node, system.request
    usable = node.cores_usable or node.cores
    if node.cores and node.cores_usable and node.cores_usable > node.cores:
        yield Fault(
            "cores", _at(path, "node", "cores_usable"), f"{node.cores_usable} of {node.cores} cores cannot be usable"
        )
    if (
        node.cores
        and node.cores_usable
        and node.cores_reserved
        and node.cores - len(node.cores_reserved) != node.cores_usable
    ):
        yield Fault(
            "cores",
            _at(path, "node", "cores_reserved"),
            f"{node.cores} cores less {len(node.cores_reserved)} reserved are not {node.cores_usable}",
        )
    if request.cpus_per_gpu and node.gpus and usable and request.cpus_per_gpu * node.gpus > usable:
        yield Fault(
            "cores",
            _at(path, "request", "cpus_per_gpu"),
            f"{request.cpus_per_gpu} cores per GPU x {node.gpus} GPUs are more than the {usable} usable cores",
            f"at most {usable // node.gpus}",
        )
    if node.memory_gib and node.memory_usable_gib and node.memory_usable_gib > node.memory_gib:
        yield Fault(
            "memory",
            _at(path, "node", "memory_usable_gib"),
            f"{node.memory_usable_gib} GiB usable of {node.memory_gib}",
        )
    room = node.memory_usable_gib or node.memory_gib
    if request.memory_gib and room:
        asked = request.memory_gib * (node.gpus or 1 if request.memory == "mem-per-gpu" else 1)
        if asked > room:
            yield Fault(
                "memory", _at(path, "request", "memory_gib"), f"{asked:g} GiB are asked for, a node has {room:g}"
            )
    if request.memory in ("mem", "mem-per-gpu") and request.memory_gib is None:
        yield Fault(
            "memory",
            _at(path, "request", "memory"),
            f"memory is asked for with --{request.memory} but no amount is given",
        )
    if node.gpu_numa and node.gpus and len(node.gpu_numa) != node.gpus:
        yield Fault("binding", _at(path, "node", "gpu_numa"), f"{len(node.gpu_numa)} NUMA domains for {node.gpus} GPUs")
    if node.gpu_numa and node.numa_domains and max(node.gpu_numa) >= node.numa_domains:
        yield Fault("binding", _at(path, "node", "gpu_numa"), f"domain {max(node.gpu_numa)} of {node.numa_domains}")
    net = system.interconnect
    if (
        net.node_gbit_s
        and net.nics_per_node
        and net.nic_gbit_s
        and net.node_gbit_s != net.nics_per_node * net.nic_gbit_s
    ):
        yield Fault(
            "network",
            _at(path, "interconnect"),
            f"{net.nics_per_node} x {net.nic_gbit_s:g} is not {net.node_gbit_s:g} Gbit/s",
        )
    if net.hcas and net.nics_per_node and len(net.hcas) != net.nics_per_node:
        yield Fault("network", _at(path, "interconnect", "hcas"), f"{len(net.hcas)} HCAs for {net.nics_per_node} NICs")
    if (
        net.in_node.pair_gb_s
        and net.in_node.slowest_pair_gb_s
        and net.in_node.slowest_pair_gb_s > net.in_node.pair_gb_s
    ):
        yield Fault(
            "network", _at(path, "interconnect", "in_node"), "the slowest pair is faster than a pair of neighbours"
        )
    wheels = system.software.wheels_isa
    if wheels and node.isa and wheels != node.isa:
        yield Fault(
            "isa", _at(path, "software", "wheels_isa"), f"environments for {wheels} do not run on {node.isa} nodes"
        )
    vendor = system.gpu.vendor
    for i, box in enumerate(system.software.containers):
        if (box.gpu_flag == "--rocm" and vendor == "nvidia") or (box.gpu_flag == "--nv" and vendor == "amd"):
            yield Fault("container", _at(path, "software", "containers", i), f"{box.gpu_flag} on {vendor} GPUs")


def _limits(system: System, path: Path) -> Iterator[Fault]:
    for name, part in system.partitions.items():
        where = _at(path, "partitions", name)
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
            elif system.qos[qos].max_time and part.max_time and system.qos[qos].max_time > part.max_time:
                yield Fault("limits", where, f"QoS {qos} allows longer jobs than its partition {name}")
    for name, q in system.qos.items():
        if q.min_nodes and q.max_nodes and q.min_nodes > q.max_nodes:
            yield Fault(
                "limits", _at(path, "qos", name), f"{name}: min_nodes {q.min_nodes} exceeds max_nodes {q.max_nodes}"
            )
        if q.max_nodes and system.node.count and q.max_nodes > system.node.count:
            yield Fault(
                "limits", _at(path, "qos", name), f"{name}: {q.max_nodes} nodes, the machine has {system.node.count}"
            )
    if system.partitions and system.default_partition not in system.partitions:
        told = (
            f"'{system.default_partition}' is not one of the partitions"
            if system.default_partition
            else "no default_partition"
        )
        yield Fault("default-partition", _at(path, "default_partition"), told, f"one of {', '.join(system.partitions)}")


_FORMS = {
    "slurm": ("gpus-per-node", "gres", "gpus", "none"),
    "pbspro": ("pbs-select", "none"),
    "torque": ("torque-nodes", "none"),
    "kubernetes": ("kubernetes",),
    "none": ("none",),
}


def _scheduler(system: System, path: Path) -> Iterator[Fault]:
    kind, form = system.scheduler.kind, system.request.gpus
    if kind and form and form not in _FORMS[kind]:
        yield Fault(
            "scheduler",
            _at(path, "request", "gpus"),
            f"'{form}' is not how {kind} takes GPUs",
            f"one of {', '.join(_FORMS[kind])}",
        )
    if system.request.gres_type and form not in ("gres", "gpus-per-node", "gpus"):
        yield Fault("scheduler", _at(path, "request", "gres_type"), f"gres_type without a GRES request ({form})")
    flavour = system.scheduler.flavour
    if (
        kind
        and flavour
        and flavour not in {"slurm": ("slurmd", "psslurm"), "torque": ("moab",), "kubernetes": ("kueue",)}.get(kind, ())
    ):
        yield Fault("scheduler", _at(path, "scheduler", "flavour"), f"{flavour} is not a flavour of {kind}")
    if form == "pbs-select" and not system.request.pbs_select:
        yield Fault("scheduler", _at(path, "request"), "pbs-select needs the chunk's resources (pbs_select)")


def masks(cpu_bind: str | None) -> list[int]:
    """The CPU masks of ``mask_cpu:0x..,0x..`` as integers; empty for other forms."""
    if not cpu_bind or "mask_cpu" not in cpu_bind:
        return []
    return [int(m, 16) for m in re.findall(r"0x([0-9a-fA-F]+)", cpu_bind)]


def _launch(system: System, path: Path) -> Iterator[Fault]:
    node = system.node
    found = masks(system.launch.cpu_bind)
    where = _at(path, "launch", "cpu_bind")
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
            yield Fault(
                "environment", _at(path, "environment", "set", variable), f"{variable} is set and to be avoided"
            )
    head = system.launch.head_address
    if head.strategy == "suffix" and not head.suffix:
        yield Fault("schema", _at(path, "launch", "head_address"), "the strategy 'suffix' needs a suffix")
    if head.strategy == "interface" and not head.interface:
        yield Fault("schema", _at(path, "launch", "head_address"), "the strategy 'interface' needs an interface")


def _access(system: System, path: Path) -> Iterator[Fault]:
    access, example = system.access, system.access.example
    where = _at(path, "access", "example")
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


# -- the whole room -----------------------------------------------------------------------------------------------------------


def check_room(room: Path | None = None, today: datetime.date | None = None) -> Report:
    """All faults of a folder with ``factories.yaml`` and ``systems/`` (default: the shipped one)."""
    today = today or datetime.date.today()
    room = room or profiles.ROOM
    report = Report(faults=[])
    systems: dict[str, System] = {}
    names: dict[str, str] = {}
    for path in sorted((room / "systems").glob("*.yaml")):
        system = check_system(path, report, today)
        if system is None:
            continue
        for name in (system.id, system.name, *system.aliases):
            other = names.setdefault(name.lower(), path.name)
            if other != path.name:
                report.faults.append(Fault("duplicate-name", _at(path, "id"), f"'{name}' is also used by {other}"))
        systems[path.stem] = system
    report.faults.extend(guarded(room / "gpus.yaml", lambda path: check_catalogue(path, today)))
    report.faults.extend(guarded(room / "sources.yaml", lambda path: _shared(path, today)))
    report.faults.extend(guarded(room / "readiness.yaml", lambda path: check_readiness(path, systems, today)))
    report.faults.extend(guarded(room / "factories.yaml", lambda path: check_members(path, systems, today)))
    if room == profiles.ROOM:
        report.faults.extend(index_fresh())
    return report


def guarded(path: Path, rule: Callable[[Path], Iterator[Fault]]) -> list[Fault]:
    """The faults that ``rule`` finds; a file of another shape than the rule expects is one fault, not a crash."""
    try:
        return list(rule(path))
    except UserError as error:
        return [Fault("schema", error.where or path.name, error.what, error.fix)]
    except (ValidationError, TypeError, KeyError, AttributeError, ValueError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        return [Fault("schema", path.name, f"not of the shape that its first lines describe: {first}")]


def check_catalogue(path: Path, today: datetime.date) -> Iterator[Fault]:
    """Faults of ``gpus.yaml``."""
    try:
        raw = read_yaml(path)
        skus = profiles.gpu_catalogue() if path == profiles.GPUS else profiles.merge_catalogue(raw)
    except UserError as error:
        yield Fault("yaml", error.where or path.name, error.what, error.fix)
        return
    sources = raw.get("sources", {})
    for name, entry in sources.items():
        yield from _dated(name, Source(**entry), path, today)
    for sku, entry in skus.items():
        try:
            gpu = Gpu(sku=sku, **entry)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            name = "arch" if "arch" in fault["loc"] else "schema"
            yield Fault(name, _at(path, "gpus", sku), f"{'.'.join(str(k) for k in fault['loc'])}: {fault['msg']}")
            continue
        yield from gpu_faults(gpu, _at(path, "gpus", sku))
    for i, item in enumerate(raw.get("facts", [])):
        fact = FactEntry(**item)
        if fact.source not in sources:
            yield Fault("unknown-source", _at(path, "facts", i), f"the source '{fact.source}' is not defined")
        for dotted in fact.at:
            sku, _, field = dotted.partition(".")
            if sku not in skus or (field and field.split(".")[0] not in skus[sku]):
                yield Fault("unused-fact", _at(path, "facts", i), f"facts names '{dotted}', which holds no value")


def _shared(path: Path, today: datetime.date) -> Iterator[Fault]:
    try:
        raw = read_yaml(path)
    except UserError as error:
        yield Fault("yaml", error.where or path.name, error.what, error.fix)
        return
    for name, entry in raw.items():
        try:
            source = Source(**entry)
        except (ValidationError, TypeError) as error:
            yield Fault("schema", f"{path.name}: {name}", str(error).splitlines()[0])
            continue
        for fault in _dated(name, source, path, today):
            yield Fault(fault.name, f"{path.name}:{line_of(path, (name,))}", fault.what, fault.fix)


def check_readiness(path: Path, systems: dict[str, System], today: datetime.date) -> Iterator[Fault]:
    """Faults of ``readiness.yaml``."""
    if not path.is_file():
        return
    try:
        raw = read_yaml(path)
    except UserError as error:
        yield Fault("yaml", error.where or path.name, error.what, error.fix)
        return
    for name, entry in ((raw or {}).get("systems") or {}).items():
        where = _at(path, "systems", name)
        if name not in systems:
            yield Fault("readiness", where, f"no profile '{name}'{did_you_mean(name, systems)}")
        entry = entry if isinstance(entry, dict) else {}
        if entry.get("level") not in READINESS_WORDS:
            yield Fault(
                "readiness",
                where,
                f"{name}: '{entry.get('level')}' is no level",
                f"one of {', '.join(READINESS_WORDS)}",
            )
        if not entry.get("evidence") or not entry.get("date"):
            yield Fault(
                "readiness",
                where,
                f"{name}: a date and evidence are needed",
                "date: 2026-11-22, evidence: what was run",
            )
        elif str(entry["date"]) > today.isoformat():
            yield Fault("readiness", where, f"{name}: dated {entry['date']}, today is {today}")


_MEMBER_KEYS = {
    "id", "name", "kind", "country", "host", "wave", "sectors", "sectors_reason", "focus", "links", "systems", "announced",
    "unsuitable", "reason",
}  # fmt: skip


def check_members(path: Path, systems: dict[str, System], today: datetime.date) -> Iterator[Fault]:
    """Faults of ``factories.yaml``, given the systems by file name."""
    try:
        raw = read_yaml(path)
    except UserError as error:
        yield Fault("yaml", error.where or path.name, error.what, error.fix)
        return
    for name, entry in raw.get("sources", {}).items():
        yield from _dated(name, Source(**entry), path, today)
    for key, fact in raw.get("facts", {}).items():
        if fact.get("source") not in raw.get("sources", {}):
            yield Fault("unknown-source", _at(path, "facts", key), f"the source '{fact.get('source')}' is not defined")
    for needed in ("sectors", "host", "wave", "links"):
        if needed not in raw.get("facts", {}):
            yield Fault("no-source", path.name, f"{needed} of the members has no source", "add it to facts:")
    members = raw.get("members", [])
    kinds = [m.get("kind") for m in members]
    if (kinds.count("factory"), kinds.count("antenna"), len(members)) != (19, 13, 32):
        yield Fault(
            "members",
            path.name,
            f"{kinds.count('factory')} factories and {kinds.count('antenna')} antennas, not 19 and 13",
        )
    by_id = {m.get("id"): m for m in members}
    if len(by_id) != len(members):
        yield Fault("duplicate-name", path.name, "two members have the same id")
    owned: set[str] = set()
    for i, m in enumerate(members):
        where = _at(path, "members", i)
        for key in set(m) - _MEMBER_KEYS:
            yield Fault("schema", where, f"unknown key '{key}'{did_you_mean(key, _MEMBER_KEYS)}")
        for key in ("id", "name", "kind", "country", "host", "wave", "sectors", "systems"):
            if key not in m:
                yield Fault("schema", where, f"the key '{key}' is missing")
        if m.get("country") not in raw.get("countries", {}):
            yield Fault("country", where, f"{m.get('id')}: '{m.get('country')}' is not in countries")
        for sector in m.get("sectors") or []:
            if sector not in raw.get("sector_names", {}):
                yield Fault(
                    "sector",
                    where,
                    f"{m.get('id')}: unknown sector '{sector}'{did_you_mean(sector, raw.get('sector_names', {}))}",
                )
        if not m.get("sectors") and not m.get("sectors_reason"):
            yield Fault("sector", where, f"{m.get('id')} has no sectors and no sectors_reason")
        for link in m.get("links") or []:
            if link not in by_id or by_id[link].get("kind") != "factory":
                yield Fault(
                    "link", where, f"{m.get('id')} links to '{link}'{did_you_mean(link, by_id)}, which is no factory"
                )
        if m.get("kind") == "antenna" and not m.get("links"):
            yield Fault("link", where, f"the antenna {m.get('id')} names no factory")
        for key, status in (("systems", "usable"), ("announced", "announced"), ("unsuitable", "unsuitable")):
            for system in m.get(key) or []:
                owned.add(system)
                if system not in systems:
                    yield Fault("link", where, f"{m.get('id')}: no profile '{system}'{did_you_mean(system, systems)}")
                elif systems[system].status != status:
                    yield Fault(
                        "link", where, f"{m.get('id')}: {system} is {systems[system].status}, listed under {key}"
                    )
        if not m.get("systems") and not m.get("reason"):
            yield Fault("no-reason", where, f"{m.get('id')} has no usable system and gives no reason")
    for system in systems:
        if system not in owned and system not in NOT_OWNED:
            yield Fault(
                "orphan", f"{system}.yaml", f"{system} belongs to no factory or antenna", "list it in factories.yaml"
            )


def index_fresh() -> Iterator[Fault]:
    """A fault where ``index.json`` is missing or was built from other files."""
    import json

    from aifactory_train.sites import index

    if not index.INDEX.is_file():
        yield Fault("index", "index.json", "there is no index", "aifactory sites check --write-index")
    elif json.loads(index.INDEX.read_text(encoding="utf-8")).get("digest") != index.digest():
        yield Fault("index", "index.json", "built from other files", "aifactory sites check --write-index")


def check_file(path: Path, today: datetime.date | None = None) -> Report:
    """The faults of one profile, shipped or a user's own."""
    report = Report(faults=[])
    check_system(path, report, today)
    return report


__all__ = ["FAULTS", "Fault", "Profile", "Report", "check_file", "check_room", "check_system", "gpu_faults", "masks"]
