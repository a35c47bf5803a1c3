"""The schema of a site profile: typed, strict (an unknown key is an error) and free of policy and code.

A profile is one YAML file in ``systems/``. What nobody has published stays ``None``; ``missing:`` in the profile names the
gaps. Every fact is addressed by a dotted path (``node.gpus``, ``partitions.standard-g.max_time``) and its source stands in
the profile's ``facts:`` list; :mod:`aifactory_train.sites.check` proves that none lacks one.

Units are part of the contract: times are whole **seconds**, memory is **GiB** (vendors print "GB" for the same number),
bandwidths are **GB/s** (1e9 bytes) in one direction unless the name says ``gbit``, compute is dense **TFLOP/s**, power is W.
A *GPU* is what the scheduler and the framework count: on MI250X that is one GCD (half a module).
"""

from __future__ import annotations

import re
from datetime import date as Date
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema, field_validator

from aifactory_train.sites.schedulers import Kind

# -- times -------------------------------------------------------------------------------------------------------------

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(value: Any) -> int:
    """Seconds from ``"48h"``, ``"30m"``, ``"2d"``, ``"1d12h"``, Slurm's ``"2-00:00:00"``/``"24:00:00"``, or an int of seconds.

    >>> parse_duration("1d12h"), parse_duration("2-00:00:00"), parse_duration("00:30:00")
    (129600, 172800, 1800)
    """
    if isinstance(value, bool):
        raise ValueError("a time is needed, such as 48h, 30m or '2-00:00:00'")
    if isinstance(value, int):
        if value <= 0:
            raise ValueError("a time must be positive")
        return value
    text = str(value).strip()
    if re.fullmatch(r"(\d+[dhms])+", text):
        seconds = sum(int(n) * _UNITS[u] for n, u in re.findall(r"(\d+)([dhms])", text))
    else:
        found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)", text)
        if not found:
            raise ValueError(f"'{text}' is not a time; write 48h, 30m, 2d or '2-00:00:00'")
        days, hours, minutes, secs = (int(g or 0) for g in found.groups())
        if minutes > 59 or secs > 59:
            raise ValueError(f"'{text}' has more than 59 minutes or seconds")
        seconds = days * 86400 + hours * 3600 + minutes * 60 + secs
    if seconds <= 0:
        raise ValueError("a time must be positive")
    return seconds


def slurm_time(seconds: int) -> str:
    """``D-HH:MM:SS`` or ``HH:MM:SS``, the form that Slurm and PBS Pro both print and Slurm reads."""
    days, rest = divmod(int(seconds), 86400)
    clock = f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"
    return f"{days}-{clock}" if days else clock


def compact_time(seconds: int) -> str:
    """The shortest form that profiles use: ``2d``, ``12h``, ``90m``, ``45s``."""
    for unit in ("d", "h", "m"):
        if seconds % _UNITS[unit] == 0 and (unit != "d" or seconds >= 2 * _UNITS["d"]):
            return f"{seconds // _UNITS[unit]}{unit}"
    return f"{seconds}s"


_DURATION_SCHEMA = {
    "type": ["string", "integer"],
    "description": "48h, 30m, 2d, 1d12h or '2-00:00:00'; an integer is seconds",
}
Seconds = Annotated[int, BeforeValidator(parse_duration), WithJsonSchema(_DURATION_SCHEMA, mode="validation")]
"""Whole seconds; written as a duration in YAML."""

# A vendor's instruction-set name: sm_80 for NVIDIA, gfx90a for AMD. Mixing the two up is caught here and in `sites check`.
Arch = Annotated[str, Field(pattern=r"^(sm_\d{2,3}|gfx[0-9a-f]{3,4})$")]
Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


def _as_text(value: Any) -> Any:
    """YAML reads 2026-08-20 as a date and 2026 as a number; both are kept as the text that was written."""
    return str(value) if isinstance(value, (int, float, Date)) and not isinstance(value, bool) else value


Text = Annotated[str, BeforeValidator(_as_text), WithJsonSchema({"type": ["string", "number"]}, mode="validation")]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


# -- provenance --------------------------------------------------------------------------------------------------------

Confidence = Literal[
    "documented",  # site documentation or a maintained configuration
    "documented-user",  # a public user repository; unverified until a probe confirms it
    "derived",  # arithmetic or plain reasoning from documented facts
    "certain",  # follows from the GPU model (its architecture)
    "recalled",  # no source at hand: allowed for GPU constants only
    "project",  # our own choice or default, not a fact of the site
    "probed",  # read from the machine by `aifactory sites probe`
    "detected",  # read from this machine just now (system `local`)
    "user",  # from a user's overlay
]


class Source(_Model):
    """Where facts come from. ``date`` is the date of the source, or ``n.d.`` beside ``retrieved``."""

    title: str
    url: str | None = None
    date: Annotated[Text, Field(pattern=r"^(n\.d\.|\d{4}(-\d{2}(-\d{2})?)?)$")]
    retrieved: Annotated[Text, Field(pattern=r"^\d{4}-\d{2}(-\d{2})?$")] | None = None


class FactEntry(_Model):
    """``at`` lists dotted paths (a path covers everything below it; the longest match wins)."""

    at: list[str] = Field(min_length=1)
    source: str
    confidence: Confidence
    note: str | None = None


class Fact(_Model):
    """One value with its provenance, as ``System.provenance`` returns it."""

    path: str
    value: Any
    source_id: str  # its name in the profile, gpus.yaml or sources.yaml
    source: str  # its title
    url: str | None = None
    date: str
    retrieved: str | None = None
    confidence: Confidence
    note: str | None = None


class Note(_Model):
    """A remark with a source: a trap, a contradiction between sources, or what was announced."""

    text: str
    source: str
    confidence: Literal["documented", "documented-user", "derived", "announced", "recalled", "unknown", "project"]


# -- identity ----------------------------------------------------------------------------------------------------------


def _compiled(pattern: str) -> None:
    """Refuse what is no regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"'{pattern}' is not a regular expression: {error}") from None


class Detect(_Model):
    """How to recognise the machine: regular expressions for the full host name, Slurm's ClusterName, environment variables."""

    hostnames: list[str] = []
    cluster_names: list[str] = []
    env: dict[str, str] = {}

    @field_validator("hostnames", "env")
    @classmethod
    def _compiles(cls, patterns: list[str] | dict[str, str]) -> list[str] | dict[str, str]:
        for pattern in patterns.values() if isinstance(patterns, dict) else patterns:
            _compiled(pattern)
        return patterns


class Scheduler(_Model):
    kind: Kind | None = None
    flavour: Literal["slurmd", "psslurm", "moab", "kueue"] | None = None
    version: Text | None = None
    launchers: list[str] = []  # process starters known to exist there (srun, mpiexec); empty = not published
    accounting: bool | None = None  # sacct answers


class Access(_Model):
    """Account and QoS rules. ``example`` holds well-formed, made-up values for dry runs; never anyone's own."""

    account: Literal["required", "optional", "none"] | None = None
    account_pattern: str | None = None  # full-match regular expression of a well-formed account
    account_form: str | None = None  # the same for people, e.g. project_<number>
    account_suffix: str | None = None  # what the account must end in, e.g. @h100
    qos: Literal["required", "optional", "none", "project"] | None = None  # project: the QoS is the project's name
    qos_pattern: str | None = None
    login_hosts: list[str] = []
    login_port: Positive | None = None
    login_notes: str | None = None
    example: dict[str, str] = {}

    @field_validator("account_pattern", "qos_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        if pattern is not None:
            _compiled(pattern)
        return pattern


# -- what can be asked for ---------------------------------------------------------------------------------------------

Purpose = Literal["train", "large", "long", "debug", "interactive", "low-priority", "data"]


class Qos(_Model):
    """Limits of one quality of service. Times in seconds; ``None`` = not published."""

    max_time: Seconds | None = None
    min_nodes: Positive | None = None
    max_nodes: Positive | None = None
    max_gpus: Positive | None = None
    max_running_jobs: Positive | None = None
    purpose: Purpose = "train"
    flags: list[str] = []  # further scheduler flags that this QoS needs, e.g. --reservation=gpudev


class Partition(_Model):
    """One way of being placed on the GPU nodes, keyed by the name that users say.

    ``implicit`` partitions are never named to the scheduler: the constraint, QoS or GPU request selects them.
    """

    implicit: bool = False
    constraint: str | None = None
    qos: list[str] = []  # keys of System.qos that go with this partition, the default first; empty = none is named
    qos_equals_partition: bool = False  # pass --qos=<partition>
    max_time: Seconds | None = None
    default_time: Seconds | None = None
    min_nodes: Positive | None = None
    max_nodes: Positive | None = None
    max_gpus: Positive | None = None  # per job
    max_running_jobs: Positive | None = None
    nodes: Positive | None = None  # nodes in the partition
    state: Literal["up", "down"] | None = None  # down: seen closed; only a job that names a reservation may start there
    shared: bool | None = None  # True: less than a node can be asked for; False: whole nodes only
    purpose: Purpose = "train"
    flags: list[str] = []


class Request(_Model):
    """How GPUs, cores and memory are asked for (per node; the launcher renders the flags)."""

    gpus: Literal["gpus-per-node", "gres", "gpus", "none", "pbs-select", "torque-nodes", "kubernetes"] | None = None
    gres_type: str | None = None  # gpu:<type>:<n>
    gres_name: str | None = None  # the resource as its scheduler names it, where not "gpu" (nvidia.com/gpu)
    node_selector: dict[str, Text] = {}  # Kubernetes: node labels that the job's pods must match
    pbs_select: str | None = None  # chunk resources, e.g. node_type=mi300a
    exclusive: bool | None = None  # pass --exclusive for whole nodes
    cpus_per_gpu: Positive | None = None  # what a task of one GPU asks for (--cpus-per-task), as the scheduler counts
    cpus_are: Literal["cores", "threads"] = "cores"  # what the scheduler counts: threads = hardware threads of a core
    cpus_per_gpu_rule: Literal["exact", "at-most", "usual"] | None = None
    memory: Literal["none", "mem", "mem-per-gpu"] | None = None  # none: do not ask, the site gives it with the node
    memory_gib: PositiveFloat | None = None  # the value for `memory`, per node or per GPU
    partial_multi_node: bool | None = None  # False: several nodes only when each is filled
    flags: list[str] = []  # further directives every GPU job needs, e.g. --hint=nomultithread
    never: list[str] = []  # flags that are known to break jobs there


class Node(_Model):
    """One GPU node **as the scheduler counts it**."""

    count: Positive | None = None
    gpus: Positive | None = None
    cpu: str | None = None
    isa: Literal["x86_64", "aarch64"] | None = None
    login_isa: Literal["x86_64", "aarch64"] | None = None
    sockets: Positive | None = None
    cores: Positive | None = None
    cores_usable: Positive | None = None
    threads_per_core: Positive | None = None
    cores_reserved: list[int] = []  # core numbers that the system keeps (low-noise mode), where published
    memory_gib: PositiveFloat | None = None
    memory_usable_gib: PositiveFloat | None = None  # what a job can ask for
    numa_domains: Positive | None = None  # those with cores: GPU memory that shows as NUMA domains is not counted
    gpu_numa: list[int] = []  # NUMA domain of GPU 0, 1, …
    local_disk_gb: PositiveFloat | None = None
    tmp_in_memory: bool | None = None  # /tmp is RAM-backed
    power_cap_w: PositiveFloat | None = None  # per GPU or per superchip module, where the site caps it
    features: list[str] = []  # node features that -C can name


class HeadAddress(_Model):
    """How the rendezvous address is found, on the head node (see docs/sites.md for the strategies)."""

    strategy: Literal["hostname", "fqdn", "nodeaddr", "suffix", "interface", "command"] = "hostname"
    suffix: str | None = None
    strip_domain: bool = False  # cut the domain before the suffix goes on
    interface: str | None = None
    family: Literal["inet", "inet6"] | None = None  # force an address family
    resolve: bool = False  # turn the name into a numeric address before it is used


class Launch(_Model):
    """Starting processes inside a job."""

    style: Literal["torchrun", "srun", "mpi"] | None = None  # torchrun: one task a node; srun: one task a GPU
    srun_flags: list[str] = []
    cpu_bind: str | None = None  # for one task per GPU, as --cpu-bind takes it (mask_cpu:…)
    cpu_bind_node: str | None = None  # for one task per node
    gpu_bind: str | None = None
    torchrun_numa_binding: str | None = None
    mpi_type: str | None = None  # srun --mpi=
    mpiexec: list[str] = []  # arguments of the site's own mpiexec
    repeat_cpus_per_task: bool = True  # srun does not inherit it since Slurm 22.05
    head_address: HeadAddress = HeadAddress()
    login_shell: bool = False  # the batch script needs '#!/bin/bash -l'
    output_must_be_under: list[str] = []  # compute nodes see no other file system
    output_must_not_be_under: list[str] = []


class Policy(_Model):
    """What the site allows between jobs. ``None`` = not published."""

    export: Literal["NONE", "ALL"] = "NONE"  # sbatch --export=; NONE goes with SLURM_EXPORT_ENV=ALL in the body
    requeue: Literal["allowed", "forbidden"] | None = None
    resubmit: Literal["requeue", "chain", "resubmit"] = "chain"
    signal: Literal["USR1", "USR2", "TERM"] = "USR1"
    preemption: bool | None = None  # jobs can be preempted and requeued
    unattended_submission: Literal["allowed", "human-needed"] | None = None


# -- network, software, storage ----------------------------------------------------------------------------------------


class InNode(_Model):
    """GPU-to-GPU links inside a node, where the node differs from the GPU's data sheet."""

    kind: str | None = None  # nvlink3, nvlink4, infinity-fabric, pcie4 …
    pair_gb_s: PositiveFloat | None = None  # between two neighbours, one direction
    slowest_pair_gb_s: PositiveFloat | None = None
    all_to_all: bool | None = None  # a switch, or every pair directly linked


class Interconnect(_Model):
    fabric: Literal["slingshot-11", "infiniband", "omni-path", "ethernet"] | None = None
    generation: str | None = None  # hdr, ndr, …
    nics_per_node: Positive | None = None
    nic_gbit_s: PositiveFloat | None = None  # per NIC, one direction
    node_gbit_s: PositiveFloat | None = None  # injection bandwidth of a node, one direction
    topology: str | None = None
    hcas: list[str] = []
    socket_interfaces: list[str] = []
    in_node: InNode = InNode()
    transport: str | None = None  # regular expression that NCCL's or RCCL's INFO log must match
    plugin: str | None = None  # aws-ofi-nccl, aws-ofi-rccl: what carries NCCL over the fabric


class Environment(_Model):
    """Communication and runtime variables of a job."""

    set: dict[str, Text] = {}
    avoid: dict[str, str] = {}  # variable (or VARIABLE=value) -> why it must not be set
    workarounds: dict[str, Text] = {}  # documented for a fault; not set by default


class Container(_Model):
    runtime: Literal["singularity", "apptainer", "enroot-pyxis", "cscs-ce", "sarus", "docker"]
    gpu_flag: Literal["--nv", "--rocm"] | None = None
    image: str | None = None  # a site's own image, or the folder that holds its images
    # Which file of a folder of images; of several the last by name. Plain characters: the pattern stands in a script.
    pattern: Annotated[str, Field(pattern=r"^[A-Za-z0-9._*?+-]+$")] = "*.sif"
    module: str | None = None  # to be loaded first
    binds: list[str] = []
    exec_flags: list[str] = []
    image_dirs: list[str] = []  # images run from these places only
    notes: str | None = None


class Software(_Model):
    modules_system: Literal["lmod", "tmod", "none"] | None = None
    purge: bool = False
    use: list[str] = []  # module use PATH
    modules: list[str] = []  # module load …, in this order
    provides_torch: bool | None = None  # the modules above bring a torch
    needs_image: bool | None = None  # the bare host lacks what NCCL needs: torch comes from an image or a uenv
    containers: list[Container] = []
    os: str | None = None
    cuda: Text | None = None
    driver: Text | None = None
    rocm: Text | None = None
    wheels_isa: Literal["x86_64", "aarch64"] | None = None  # what an environment must be built for


class Filesystem(_Model):
    """``path`` is a template: ``$VARIABLE`` is the site's, ``{user}``, ``{project}``, ``{account}`` are filled from the overlay."""

    role: Literal["home", "project", "scratch", "fast", "node-local", "data", "archive"]
    path: str | None = None
    variable: str | None = None  # environment variable that the site defines
    quota_gib: PositiveFloat | None = None
    inodes: Positive | None = None
    purge_days: Positive | None = None
    kind: Literal["lustre", "gpfs", "ceph", "nfs", "nvme", "ssd", "tmpfs"] | None = None
    on_compute: bool = True
    billing_factor: PositiveFloat | None = None
    note: str | None = None


class Internet(_Model):
    """Outbound connections. ``None`` = not published: offline settings are then used."""

    login: Literal["full", "proxy", "none"] | None = None
    compute: Literal["full", "nat", "proxy", "none"] | None = None
    transfer_host: str | None = None


class Energy(_Model):
    counter: str | None = None  # how a job's energy can be read
    pue: PositiveFloat | None = None
    grid_g_co2_per_kwh: Annotated[float, Field(ge=0)] | None = None
    grid_region: str | None = None


# -- the GPU -----------------------------------------------------------------------------------------------------------


class Gpu(_Model):
    """Constants of one GPU as counted; from ``gpus.yaml``, with what a site documents otherwise laid over.

    An unknown device has no peaks: print no utilisation rather than a guess.
    """

    sku: str | None = None
    model: str | None = None
    vendor: Literal["nvidia", "amd"] | None = None
    arch: Arch | None = None
    counted_as: str | None = None  # where the count differs from the product, e.g. one GCD of an MI250X
    memory_gib: PositiveFloat | None = None  # nominal
    memory_visible_mib: Positive | None = None  # what the driver reports, where known
    memory_bandwidth_gb_s: PositiveFloat | None = None
    peak_tflops: dict[Literal["fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "fp4"], PositiveFloat] = {}  # dense
    fp8_format: Literal["ocp", "fnuz"] | None = None
    compute_units: Positive | None = None  # SMs or CUs
    warp_size: Literal[32, 64] | None = None
    shared_memory_kib: Positive | None = None  # per block (NVIDIA) or workgroup (AMD LDS)
    l2_mib: PositiveFloat | None = None
    link_gb_s: PositiveFloat | None = None  # all in-node links together, one direction
    tdp_w: PositiveFloat | None = None
    unified_memory: bool | None = None  # host and device share one memory
    device_names: list[str] = []  # regular expressions for the driver's device string
    min_cuda: Text | None = None

    @property
    def has_bf16(self) -> bool:
        """Whether matrix units take bf16."""
        return "bf16" in self.peak_tflops

    @property
    def has_fp8(self) -> bool:
        return "fp8" in self.peak_tflops

    @property
    def usable_gib(self) -> float | None:
        """What the driver shows where that is known, else the nominal size; the framework's own share still goes off it."""
        return self.memory_visible_mib / 1024 if self.memory_visible_mib else self.memory_gib


# -- a user's own values -----------------------------------------------------------------------------------------------


class UserValues(_Model):
    """What a user adds to a profile: accounts, paths, software of their own. Kept outside the project."""

    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    project: str | None = None  # project name for path templates
    work_dir: str | None = None  # runs, caches, data; must be visible on compute nodes
    scratch_dir: str | None = None
    container_image: str | None = None
    container_binds: list[str] = []
    venv: str | None = None
    modules: list[str] | None = None  # replaces the profile's list
    env: dict[str, Text] = {}
    exclude_nodes: list[str] = []
    budget_gpu_hours: PositiveFloat | None = None
    price_per_gpu_hour: PositiveFloat | None = None
    currency: str | None = None
    mail: str | None = None


class Overlay(_Model):
    """``~/.config/aifactory/sites/<system>.yaml`` or ``--site-file``: a user's values and corrections to one profile.

    ``corrections`` maps dotted paths to values (what ``aifactory sites probe`` prints); each is marked as the user's.
    """

    overlay_for: str
    user: UserValues = UserValues()
    corrections: dict[str, Any] = {}


# -- the system --------------------------------------------------------------------------------------------------------

Status = Literal["usable", "announced", "unsuitable"]


class Profile(_Model):
    """One file in ``systems/``."""

    schema_: Literal[1] = Field(alias="schema")
    id: Annotated[str, Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    name: str
    aliases: list[str] = []
    status: Status
    status_reason: str | None = None  # why a machine is not usable, or what is expected when
    operator: str
    country: Annotated[str, Field(pattern=r"^[A-Z]{2}$")] | None = None
    docs: str | None = None
    maintainer: str
    expires: Date
    missing: list[str] = []

    detect: Detect = Detect()
    scheduler: Scheduler = Scheduler()
    access: Access = Access()
    partitions: dict[str, Partition] = {}
    default_partition: str | None = None
    qos: dict[str, Qos] = {}
    request: Request = Request()
    node: Node = Node()
    gpu: Gpu = Gpu()
    interconnect: Interconnect = Interconnect()
    launch: Launch = Launch()
    policy: Policy = Policy()
    environment: Environment = Environment()
    software: Software = Software()
    filesystems: list[Filesystem] = []
    internet: Internet = Internet()
    energy: Energy = Energy()

    notes: list[Note] = []
    sources: dict[str, Source] = {}
    facts: list[FactEntry] = []


def json_schema(which: str = "profile") -> dict[str, Any]:
    """The JSON Schema of a profile or an overlay, for editors."""
    if which == "profile":
        schema = Profile.model_json_schema(by_alias=True, mode="validation")
    else:
        schema = Overlay.model_json_schema(by_alias=True, mode="validation")
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = f"aifactory-train site {which}"
    return schema


#: Top-level keys whose values are facts of the machine: each leaf below them needs provenance.
FACT_SECTIONS = (
    "detect",
    "scheduler",
    "access",
    "partitions",
    "default_partition",
    "qos",
    "request",
    "node",
    "gpu",
    "interconnect",
    "launch",
    "policy",
    "environment",
    "software",
    "filesystems",
    "internet",
    "energy",
)

#: Facts that make a profile complete; each is a dotted path, `|` separates ways of meeting it.
CORE_FACTS = {
    "GPU model": "gpu.sku",
    "architecture": "gpu.arch",
    "GPUs per node": "node.gpus",
    "cores per node": "node.cores|node.cores_usable|request.cpus_per_gpu",
    "memory per node": "node.memory_gib|node.memory_usable_gib",
    "selector": "partitions",
    "account rule": "access.account",
    "time limit": "partitions.*.max_time|qos.*.max_time",
}
