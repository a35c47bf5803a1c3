"""From a system and a recipe's needs to the choices that follow from the hardware, each with its reason.

``select`` is a pure function: same system and needs, same answer; it reads nothing and asks nobody. Where the request cannot
be met on that hardware it refuses with the rule and the mend.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.sites.schema import slurm_time
from aifactory_train.sites.system import System

OFFLINE_ENV = {
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "WANDB_MODE": "offline",
}

PRECISIONS = ("auto", "bf16", "fp16", "fp32", "fp8")


@dataclass(frozen=True)
class Needs:
    """What a recipe asks of a system. Only what is set constrains the answer."""

    precision: str = "auto"  # auto | bf16 | fp16 | fp32 | fp8
    nodes: int = 1
    gpus_per_node: int | None = None  # None: whole nodes
    hours: float | None = None  # wall time wanted
    state_gib: float | None = None  # parameters + gradients + optimizer state of one full replica
    environment_isa: str | None = None  # what a wheelhouse or image was built for
    environment_backend: str | None = None  # cuda | rocm, what it was built for
    partition: str | None = None
    qos: str | None = None


@dataclass(frozen=True)
class Choice:
    """One decision: its value, why, and the profile's facts that it rests on."""

    value: Any
    reason: str
    facts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Selection:
    """What the hardware decides. ``reasons`` repeats every choice as one line for people."""

    system: str
    kernel_key: tuple[str | None, str | None]  # (arch, sku)
    precision: str
    fp8_format: str | None
    attention: tuple[str, ...]  # usable implementations, the preferred first
    engine: str  # ddp | fsdp | hsdp
    shard_group: int  # GPUs over which one replica is sharded
    replicas: int
    launcher: str  # torchrun | srun | mpi
    partition: str | None
    qos: str | None
    env: dict[str, str]
    must_not_set: dict[str, str]
    offline: bool
    choices: dict[str, Choice] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def reasons(self) -> list[str]:
        return [f"{name}: {c.value} because {c.reason}" for name, c in self.choices.items()]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"reasons": self.reasons}


def select(system: System, needs: Needs | None = None) -> Selection:
    """Kernel key, precision, sharding default, placement, environment and launcher of ``system`` for ``needs``.

    Raises UserError where the request breaks a rule of the hardware or of the site's limits.
    """
    needs = needs or Needs()
    require_usable(system)
    choices: dict[str, Choice] = {}
    warnings: list[str] = []
    _check_environment(system, needs)
    precision = _precision(system, needs, choices, warnings)
    attention = _attention(system, choices)
    engine, group, replicas = _sharding(system, needs, choices, warnings)
    partition, qos = _placement(system, needs, choices, warnings)
    env = _environment(system, choices)
    style = system.launch.style or ("torchrun" if (system.node.gpus or 1) >= 1 else "mpi")
    choices["launcher"] = Choice(
        style,
        "the profile says so"
        if system.launch.style
        else "no style is published; one torchrun per node needs least of a site",
        ("launch.style",) if system.launch.style else (),
    )
    choices["kernel key"] = Choice(
        f"{system.gpu.arch or 'cpu'}/{system.gpu.sku or 'none'}",
        "kernels are tuned per product, then per architecture",
        ("gpu.sku", "gpu.arch"),
    )
    if system.expired:
        warnings.append(
            f"the profile of {system.id} expired on {system.expires}: check it with 'aifactory sites probe {system.id}' there"
        )
    if system.node.isa and system.node.login_isa and system.node.isa != system.node.login_isa:
        warnings.append(
            f"login nodes are {system.node.login_isa}, compute nodes {system.node.isa}: build environments on a compute node"
        )
    return Selection(
        system=system.id,
        kernel_key=(system.gpu.arch, system.gpu.sku),
        precision=precision,
        fp8_format=system.gpu.fp8_format if system.gpu.has_fp8 else None,
        attention=attention,
        engine=engine,
        shard_group=group,
        replicas=replicas,
        launcher=style,
        partition=partition,
        qos=qos,
        env=env,
        must_not_set=dict(system.environment.avoid),
        offline=system.offline,
        choices=choices,
        warnings=tuple(warnings),
    )


def require_usable(system: System) -> None:
    """Refuse a machine that nobody can run on today."""
    if not system.usable:
        raise UserError(
            f"{system.name} cannot be used today: {system.status_reason or system.status}",
            where="--site",
            fix=f"'aifactory sites {system.id}' tells what is known; 'aifactory sites' lists what runs today",
        )


def _check_environment(system: System, needs: Needs) -> None:
    isa, arch = system.node.isa, system.gpu.arch
    if needs.environment_isa and isa and needs.environment_isa != isa:
        raise UserError(
            f"the environment is built for {needs.environment_isa}, the compute nodes of {system.name} are {isa}",
            where="environment",
            fix=f"'aifactory env --site {system.id}' builds one for {isa}; x86 wheels and images do not run there"
            if isa == "aarch64"
            else f"'aifactory env --site {system.id}' builds one for {isa}",
        )
    backend = None if arch is None else ("cuda" if arch.startswith("sm_") else "rocm")
    if needs.environment_backend and backend and needs.environment_backend != backend:
        raise UserError(
            f"the environment is built for {needs.environment_backend}, {system.name} has {arch} ({backend})",
            where="environment",
            fix=f"use a {backend} build of torch",
        )


def _precision(system: System, needs: Needs, choices: dict[str, Choice], warnings: list[str]) -> str:
    gpu = system.gpu
    wanted = needs.precision
    if wanted not in PRECISIONS:
        raise UserError(f"'{wanted}' is not a precision", where="precision", fix=f"one of {', '.join(PRECISIONS)}")
    if gpu.arch is None and not gpu.peak_tflops:
        value = "fp32" if wanted == "auto" else wanted
        choices["precision"] = Choice(value, "no GPU constants are known here", ())
        return value
    if wanted == "auto":
        value = "bf16" if gpu.has_bf16 else "fp16"
        reason = (
            f"{gpu.model} has bf16 matrix units"
            if gpu.has_bf16
            else f"{gpu.model} ({gpu.arch}) has no bf16; fp16 needs loss scaling"
        )
    else:
        value, reason = wanted, "the recipe asks for it and the hardware has it"
        if wanted != "fp32" and wanted not in gpu.peak_tflops:
            has = ", ".join(p for p in gpu.peak_tflops if p in ("bf16", "fp16", "fp8", "fp32"))
            raise UserError(
                f"{gpu.model} ({gpu.arch}) has no {wanted}",
                where="precision",
                fix=f"it has {has}; 'auto' picks the best of them",
            )
    if value == "fp8" and gpu.fp8_format == "fnuz":
        warnings.append(f"{gpu.arch} has fp8 in the fnuz encoding: scales and checkpoints of OCP fp8 do not carry over")
    choices["precision"] = Choice(value, reason, ("gpu.peak_tflops",))
    return value


def _attention(system: System, choices: dict[str, Choice]) -> tuple[str, ...]:
    arch = system.gpu.arch
    if arch is None:
        usable: tuple[str, ...] = ("sdpa", "eager")
        reason = "no GPU is known here"
    elif arch.startswith("sm_") and int(arch.removeprefix("sm_")) < 80:
        usable, reason = ("sdpa", "eager"), f"FlashAttention-2 needs sm_80, this is {arch}"
    else:
        usable, reason = ("flash", "sdpa", "eager"), f"{arch} has FlashAttention-2 kernels"
    choices["attention"] = Choice(usable[0], reason, ("gpu.arch",))
    return usable


def _sharding(system: System, needs: Needs, choices: dict[str, Choice], warnings: list[str]) -> tuple[str, int, int]:
    per_node = needs.gpus_per_node or system.node.gpus or 1
    if system.node.gpus and per_node > system.node.gpus:
        raise UserError(
            f"{per_node} GPUs per node are asked for, a node of {system.name} has {system.node.gpus}"
            + (f" (counted as {system.gpu.counted_as})" if system.gpu.counted_as else ""),
            where="gpus_per_node",
            fix=f"at most {system.node.gpus}, on more nodes",
        )
    world = per_node * needs.nodes
    room = system.gpu.usable_gib
    if needs.state_gib is None or room is None:
        engine, group, reason = (
            "fsdp",
            world,
            "the size of one replica is not given; sharding over all GPUs needs least memory",
        )
        if needs.nodes > 1 and world > 1:
            engine, group, reason = (
                "hsdp",
                per_node,
                "sharding stays inside the node, where links are fastest, and replicas span nodes",
            )
    elif needs.state_gib <= 0.6 * room:
        engine, group, reason = (
            "ddp",
            1,
            f"one replica's state of {needs.state_gib:.1f} GiB fits a GPU with {room:.0f} GiB",
        )
    elif needs.state_gib <= 0.6 * room * per_node and needs.nodes > 1:
        engine, group, reason = (
            "hsdp",
            per_node,
            f"one replica of {needs.state_gib:.0f} GiB fits a node of {per_node} GPUs",
        )
    else:
        engine, group, reason = (
            "fsdp",
            world,
            f"one replica of {needs.state_gib:.0f} GiB needs more than a node's share",
        )
        if needs.state_gib > 0.6 * room * world:
            warnings.append(
                f"{needs.state_gib:.0f} GiB of state do not fit {world} GPUs of {room:.0f} GiB with room for activations; plan with more nodes"
            )
    if world == 1:
        engine, group = "ddp", 1
        reason = "one GPU: nothing to shard over"
    choices["sharding"] = Choice(f"{engine} over {group}", reason, ("gpu.memory_gib", "node.gpus"))
    return engine, group, max(1, world // group)


def _placement(
    system: System, needs: Needs, choices: dict[str, Choice], warnings: list[str]
) -> tuple[str | None, str | None]:
    if not system.partitions:
        choices["placement"] = Choice(None, "no partition is published; the request alone selects nodes")
        return None, needs.qos or system.user.qos
    seconds = int(needs.hours * 3600) if needs.hours else None
    wanted = needs.partition or system.user.partition
    wanted_qos = needs.qos or system.user.qos
    refused: list[str] = []
    # The profile's default first, then the others in the order written, each with every QoS that goes with it.
    names = [wanted] if wanted else _in_order(system)
    for name in names:
        part = system.partition(name)
        if part.state == "down":
            told = f"{name} was seen down: it takes jobs of a reservation only"
            if wanted is None:
                refused.append(told)
                continue
            warnings.append(told)
        for qos in [wanted_qos] if wanted_qos else (part.qos or [None]):
            try:
                qos_name, q = system.qos_of(name, qos)
            except UserError as error:
                refused.append(error.what)
                continue
            purpose = q.purpose if q else part.purpose
            if not wanted and not wanted_qos and purpose not in ("train", "large", "long"):
                continue
            problem = broken_limit(system, name, qos_name, needs.nodes, seconds, needs.gpus_per_node)
            if problem is None:
                label = name + (f" with QoS {qos_name}" if qos_name else "")
                choices["placement"] = Choice(
                    label, f"{needs.nodes} node(s) are within its limits", (f"partitions.{name}",)
                )
                return name, qos_name
            refused.append(problem)
    raise UserError(
        f"{system.name} has no place for this request: {'; '.join(dict.fromkeys(refused)) or 'no partition for training'}",
        where="--nodes/--time",
        fix="fewer nodes or less time (checkpoints let a chain of jobs go on), or name a partition and QoS of your own",
    )


def _in_order(system: System) -> list[str]:
    names = list(system.partitions)
    if system.default_partition in names:
        names.remove(system.default_partition)
        names.insert(0, system.default_partition)
    return names


def broken_limit(
    system: System,
    partition: str,
    qos: str | None,
    nodes: int,
    seconds: int | None = None,
    gpus_per_node: int | None = None,
) -> str | None:
    """The first published limit that a request breaks, as a sentence, or None."""
    limit = system.limits(partition, qos, gpus_per_node)
    place = partition + (f"/{qos}" if qos else "")
    gpus = nodes * (gpus_per_node or system.node.gpus or 1)
    if limit["max_nodes"] is not None and nodes > limit["max_nodes"]:
        return f"{place} allows {limit['max_nodes']} node(s), {nodes} are asked for"
    if limit["min_nodes"] is not None and nodes < limit["min_nodes"]:
        return f"{place} needs at least {limit['min_nodes']} node(s), {nodes} are asked for"
    if limit["max_gpus"] is not None and gpus > limit["max_gpus"]:
        return f"{place} allows {limit['max_gpus']} GPU(s) per job, {gpus} are asked for"
    if seconds is not None and limit["max_time"] is not None and seconds > limit["max_time"]:
        return f"{place} allows {slurm_time(limit['max_time'])}, {slurm_time(seconds)} is asked for"
    return None


def _environment(system: System, choices: dict[str, Choice]) -> dict[str, str]:
    env = dict(system.environment.set)
    if system.offline:
        env.update(OFFLINE_ENV)
        known = system.internet.compute == "none"
        choices["internet"] = Choice(
            "offline",
            "compute nodes reach nothing outside"
            if known
            else "outbound connections from compute nodes are not published",
            ("internet.compute",) if known else (),
        )
    else:
        choices["internet"] = Choice("online", "compute nodes reach the internet", ("internet.compute",))
    env.update(system.user.env)
    return env
