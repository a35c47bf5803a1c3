"""The schema of a site profile: typed, strict (an unknown key is an error) and free of policy and code.

A profile is one YAML file in ``systems/``. What nobody has published stays ``None``; ``missing:`` in the profile names
the gaps. Every fact is addressed by a dotted path (``node.gpus``, ``partitions.standard-g.max_time``) and its source
stands in the profile's ``facts:`` list; :mod:`aifactory_train.sites.check` proves that none lacks one.

Units are part of the contract: times are whole **seconds**, memory is **GiB** (vendors print "GB" for the same number),
bandwidths are **GB/s** (1e9 bytes) in one direction unless the name says ``gbit``, compute is dense **TFLOP/s**, power
is W. A *GPU* is what the scheduler and the framework count: on MI250X that is one GCD (half a module).
"""

from __future__ import annotations

import re
from datetime import date as Date
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from aifactory_train.sites.confirmed import Confirmation
from aifactory_train.sites.fields import Positive, PositiveFloat, Seconds, SiteModel, Text
from aifactory_train.sites.hardware import Gpu, Interconnect, Node
from aifactory_train.sites.schedulers import Flavour, GpuRequest, Kind
from aifactory_train.sites.services import Accounting, DataMovement, Help, Login, Queue

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


class Source(SiteModel):
    """Where facts come from. ``date`` is the date of the source, or ``n.d.`` beside ``retrieved``."""

    title: str
    url: str | None = None
    date: Annotated[Text, Field(pattern=r"^(n\.d\.|\d{4}(-\d{2}(-\d{2})?)?)$")]
    retrieved: Annotated[Text, Field(pattern=r"^\d{4}-\d{2}(-\d{2})?$")] | None = None


class FactEntry(SiteModel):
    """``at`` lists dotted paths (a path covers everything below it; the longest match wins)."""

    at: list[str] = Field(min_length=1)
    source: str
    confidence: Confidence
    note: str | None = None


class Fact(SiteModel):
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


class Note(SiteModel):
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


class Detect(SiteModel):
    """How to recognise the machine: regular expressions for the full host name, Slurm's ClusterName, environment
    variables.
    """

    hostnames: list[str] = []
    cluster_names: list[str] = []
    env: dict[str, str] = {}

    @field_validator("hostnames", "env")
    @classmethod
    def _compiles(cls, patterns: list[str] | dict[str, str]) -> list[str] | dict[str, str]:
        for pattern in patterns.values() if isinstance(patterns, dict) else patterns:
            _compiled(pattern)
        return patterns


class SchedulerFacts(SiteModel):
    kind: Kind | None = None
    flavour: Flavour | None = None
    version: Text | None = None
    launchers: list[str] = []  # process starters known to exist there (srun, mpiexec); empty = not published
    accounting: bool | None = None  # sacct answers


class Access(SiteModel):
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


class Qos(SiteModel):
    """Limits of one quality of service. Times in seconds; ``None`` = not published."""

    max_time: Seconds | None = None
    min_nodes: Positive | None = None
    max_nodes: Positive | None = None
    max_gpus: Positive | None = None
    max_running_jobs: Positive | None = None
    purpose: Purpose = "train"
    flags: list[str] = []  # further scheduler flags that this QoS needs, e.g. --reservation=gpudev


class Partition(SiteModel):
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


class RequestRules(SiteModel):
    """How GPUs, cores and memory are asked for (per node; the launcher renders the flags)."""

    gpus: GpuRequest | None = None
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


class HeadAddress(SiteModel):
    """How the rendezvous address is found, on the head node (see docs/sites.md for the strategies)."""

    strategy: Literal["hostname", "fqdn", "nodeaddr", "suffix", "interface", "command"] = "hostname"
    suffix: str | None = None
    strip_domain: bool = False  # cut the domain before the suffix goes on
    interface: str | None = None
    family: Literal["inet", "inet6"] | None = None  # force an address family
    resolve: bool = False  # turn the name into a numeric address before it is used


class Launch(SiteModel):
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


class Policy(SiteModel):
    """What the site allows between jobs. ``None`` = not published."""

    export: Literal["NONE", "ALL"] = "NONE"  # sbatch --export=; NONE goes with SLURM_EXPORT_ENV=ALL in the body
    requeue: Literal["allowed", "forbidden"] | None = None
    resubmit: Literal["requeue", "chain", "resubmit"] = "chain"
    signal: Literal["USR1", "USR2", "TERM"] = "USR1"
    preemption: bool | None = None  # jobs can be preempted and requeued
    unattended_submission: Literal["allowed", "human-needed"] | None = None


# -- software, storage, energy ----------------------------------------------------------------------------------------


class Environment(SiteModel):
    """Communication and runtime variables of a job."""

    set: dict[str, Text] = {}
    avoid: dict[str, str] = {}  # variable (or VARIABLE=value) -> why it must not be set
    workarounds: dict[str, Text] = {}  # documented for a fault; not set by default


class Container(SiteModel):
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


class Software(SiteModel):
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


class Filesystem(SiteModel):
    """``path`` is a template: ``$VARIABLE`` is the site's, ``{user}``, ``{project}``, ``{account}`` are filled from the
    overlay.
    """

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


class Internet(SiteModel):
    """Outbound connections. ``None`` = not published: offline settings are then used."""

    login: Literal["full", "proxy", "none"] | None = None
    compute: Literal["full", "nat", "proxy", "none"] | None = None
    transfer_host: str | None = None


class Energy(SiteModel):
    counter: str | None = None  # how a job's energy can be read
    pue: PositiveFloat | None = None
    grid_g_co2_per_kwh: Annotated[float, Field(ge=0)] | None = None
    grid_region: str | None = None


# -- a user's own values -----------------------------------------------------------------------------------------------


class UserValues(SiteModel):
    """What a user adds to a profile: accounts, paths, software of their own. Kept outside the project."""

    account: Text | None = None
    partition: Text | None = None
    qos: Text | None = None
    reservation: Text | None = None
    constraint: Text | None = None
    project: Text | None = None  # project name for path templates
    work_dir: Text | None = None  # runs, caches, data; must be visible on compute nodes
    scratch_dir: Text | None = None
    container_image: Text | None = None
    container_binds: list[Text] = []
    venv: Text | None = None
    modules: list[Text] | None = None  # replaces the profile's list
    env: dict[str, Text] = {}
    exclude_nodes: list[Text] = []
    budget_gpu_hours: PositiveFloat | None = None
    site_budget: PositiveFloat | None = None  # in the unit that the site bills in
    cache: Text | None = None  # where fetched models and data lie: a folder, or 'shared' (data.model_cache)
    price_per_gpu_hour: PositiveFloat | None = None
    currency: Text | None = None
    mail: Text | None = None


class Overlay(SiteModel):
    """``~/.config/aifactory/sites/<system>.yaml`` or ``--site-file``: a user's values and corrections to one profile.

    ``corrections`` maps dotted paths to values (what ``aifactory sites probe`` prints); each is marked as the user's.
    """

    overlay_for: str
    user: UserValues = UserValues()
    corrections: dict[str, Any] = {}


# -- the system --------------------------------------------------------------------------------------------------------

Status = Literal["usable", "announced", "unsuitable"]


class Profile(SiteModel):
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
    scheduler: SchedulerFacts = SchedulerFacts()
    access: Access = Access()
    partitions: dict[str, Partition] = {}
    default_partition: str | None = None
    qos: dict[str, Qos] = {}
    request: RequestRules = RequestRules()
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
    accounting: Accounting = Accounting()
    login: Login = Login()
    queue: Queue = Queue()
    data: DataMovement = DataMovement()
    help: Help = Help()

    notes: list[Note] = []
    sources: dict[str, Source] = {}
    facts: list[FactEntry] = []
    confirmed: list[Confirmation] = []  # further sources that say the same


def json_schema(which: str = "profile") -> dict[str, Any]:
    """The JSON Schema of a profile or an overlay, for editors."""
    if which == "profile":
        schema = Profile.model_json_schema(by_alias=True, mode="validation")
    else:
        schema = Overlay.model_json_schema(by_alias=True, mode="validation")
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = f"aifactory-train site {which}"
    return schema


_KEYS = list(Profile.model_fields)
#: Top-level keys whose values are facts of the machine: each leaf below them needs provenance. In ``Profile`` they
#: stand between what names a profile and its notes.
FACT_SECTIONS = tuple(_KEYS[_KEYS.index("detect") : _KEYS.index("notes")])

#: Facts that make a profile complete; each is a dotted path, `|` separates ways of meeting it.
CORE_FACTS = {
    "GPU model": "gpu.sku|gpu.memory_gib",
    "architecture": "gpu.arch",
    "GPUs per node": "node.gpus",
    "cores per node": "node.cores|node.cores_usable|request.cpus_per_gpu",
    "memory per node": "node.memory_gib|node.memory_usable_gib",
    "selector": "partitions",
    "account rule": "access.account",
    "time limit": "partitions.*.max_time|qos.*.max_time",
}
