"""The environment of every rank: what the profile documents, and defaults that fail hard rather than run slowly.

Names that the launcher or the scheduler owns cannot be set by a user; names that look like secrets are refused, because
the files of a submission are kept.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from aifactory_train.launchers import backends
from aifactory_train.launchers import request as rq
from aifactory_train.launchers.caches import hugging_face_folder
from aifactory_train.launchers.shape import JobShape
from aifactory_train.launchers.submission import Line, Submission, quoted
from aifactory_train.sites.profiles import System

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe

#: Variables that belong to launcher, scheduler or shell; a user's value would break the start of the ranks.
OWNED = re.compile(
    r"(RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|NODE_RANK|MASTER_ADDR|MASTER_PORT|TORCHELASTIC_.*|SLURM_.*|SBATCH_.*|SRUN_.*"
    r"|PBS_.*|PMI_.*|PMIX_.*|OMPI_.*|PALS_.*|AIFACTORY_(?!ALLOW_CPU$).*|PATH|HOME|USER|LOGNAME|SHELL|IFS|BASH_ENV|ENV|BASHOPTS|SHELLOPTS|PS4"
    r"|PROMPT_COMMAND|LD_PRELOAD|LD_AUDIT|PYTHONHOME|PYTHONSTARTUP|PYTHONINSPECT|POSIXLY_CORRECT|UID|EUID|PPID|BASH.*)"
)


def environment_lines(sub: Submission, recipe: Recipe | None, cache: str | None) -> list[Line]:
    """``export`` lines with their reasons, in the order: communication, runtime, offline, caches, threads, the user's
    own.
    """
    system = sub.system
    remote = backends.get(sub.shape.backend).batch
    put = _Exports(sub)
    if remote or system.environment.set:
        _of_the_profile(system, put)
    if remote:
        _communication(system, sub.shape, put)
        _expected_gpus(sub.shape, put)
    _runtime(system, put)
    if remote:
        put("PYTHONNOUSERSITE", "1", "packages in ~/.local do not shadow the environment")
        _offline(system, put)
    put("HF_HUB_DISABLE_TELEMETRY", "1", "no telemetry from jobs")
    if remote and rq.NAME.fullmatch(system.id):
        put("AIFACTORY_SITE", system.id, "the run's record takes PUE and grid intensity from this profile")
    _caches(system, cache, remote, put)
    _threads(sub.shape, recipe, remote, put)
    for name, value in system.user.env.items():
        put.seen.discard(name)
        put(name, value, "from your site file (user.env)")
    return put.lines


class _Exports:
    """Collects ``export`` lines: yours count, else the first value of a name; what breaks jobs at the site is left
    out.
    """

    def __init__(self, sub: Submission):
        self.sub = sub
        self.lines: list[Line] = []
        self.seen: set[str] = set(sub.system.user.env)

    def __call__(self, name: str, value: str, why: str, fact: str | None = None) -> None:
        avoid = self.sub.system.environment.avoid
        if name in self.seen or name in avoid or f"{name}={value}" in avoid:
            return
        self.seen.add(name)
        self.lines.append(self.sub.line(f"export {name}={quoted(value)}", why, fact))


def _of_the_profile(system: System, put: _Exports) -> None:
    for name, value in system.environment.set.items():
        if name == "GLOO_SOCKET_FAMILY":
            why = (
                "left out: torch does not read it. Each rank takes an interface with an address of the family that "
                "NCCL is given"
            )
            put.lines.append(Line(f"# {name} of the profile is {why}.", why, f"environment.set.{name}"))
            continue
        put(name, value, f"communication and runtime setting of {system.name}", f"environment.set.{name}")


def _expected_gpus(shape: JobShape, put: _Exports) -> None:
    if shape.gpus_per_node:
        fact = shape.reason("gpus_per_node").fact
        why = "no rank trains on the CPU of a GPU job unnoticed"
        put("AIFACTORY_EXPECT_GPUS", str(shape.gpus_per_node), why, fact)


def _runtime(system: System, put: _Exports) -> None:
    put("TORCH_NCCL_DUMP_ON_TIMEOUT", "1", "a collective that timed out leaves a flight record")
    put("TORCH_FR_BUFFER_SIZE", "2000", "entries of the flight record")
    put("NCCL_DEBUG", "WARN", "warnings of the communication library, into a file per process")
    if system.gpu.vendor == "nvidia":
        put(
            "PYTORCH_CUDA_ALLOC_CONF",
            "expandable_segments:True",
            "less memory lost to fragmentation, on NVIDIA GPUs",
            "gpu.vendor",
        )
    put("PYTHONUNBUFFERED", "1", "lines reach the log when they are printed")
    put("PYTHONFAULTHANDLER", "1", "a crash in native code leaves a Python traceback")
    put("TOKENIZERS_PARALLELISM", "false", "tokenizer threads do not mix with forked workers")


def _offline(system: System, put: _Exports) -> None:
    if not system.offline:
        return
    why = (
        f"compute nodes of {system.name} have no internet"
        if system.internet.compute == "none"
        else "it is not published that compute nodes have internet: offline is the safe side"
    )
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
        put(name, "1", why, "internet.compute")
    put("WANDB_MODE", "offline", why, "internet.compute")


def _caches(system: System, cache: str | None, remote: bool, put: _Exports) -> None:
    if cache:
        put(
            "AIFACTORY_CACHE",
            cache,
            "where `aifactory fetch` put model and data; the home folder may differ on compute nodes",
        )
    if os.environ.get("HF_HOME"):
        put("HF_HOME", hugging_face_folder(system), "your Hugging Face cache when you launched")
    elif remote:
        put(
            "HF_HOME",
            hugging_face_folder(system),
            "an explicit Hugging Face cache: XDG_CACHE_HOME points to the node's disk",
        )


def _threads(shape: JobShape, recipe: Recipe | None, remote: bool, put: _Exports) -> None:
    threads = recipe.parallel.threads if recipe is not None else None
    if threads:
        put("OMP_NUM_THREADS", str(threads), "the recipe's parallel.threads")
    elif shape.cpus_per_rank:
        put("OMP_NUM_THREADS", str(shape.cpus_per_rank), "cores of one rank", shape.reason("cpus_per_task").fact)
    elif not remote:
        put(
            "OMP_NUM_THREADS",
            str(max(1, (os.cpu_count() or 1) // max(shape.ranks_per_node, 1))),
            "cores of this machine, shared by the ranks",
        )


def gloo_pattern(system: System) -> str:
    """What NCCL is told about interfaces at this site, from which every rank finds one of its node for gloo; empty if
    unknown.
    """
    reported = system.environment.set
    named = reported.get("GLOO_SOCKET_IFNAME") or reported.get("NCCL_SOCKET_IFNAME")
    return named or ",".join(system.interconnect.socket_interfaces)


def _communication(system: System, shape: JobShape, put: _Exports) -> None:
    net = system.interconnect
    if net.socket_interfaces:
        put(
            "NCCL_SOCKET_IFNAME",
            ",".join(net.socket_interfaces),
            "interfaces that rendezvous traffic may use",
            "interconnect.socket_interfaces",
        )
    if system.launch.head_address.family == "inet":
        put("NCCL_SOCKET_FAMILY", "AF_INET", "addresses of this site's nodes are IPv4", "launch.head_address.family")
    if shape.nodes > 1 and shape.gpus_per_node:
        # A named transport makes a missing plug-in an error at start instead of a silent fall-back to TCP.
        if net.fabric == "infiniband":
            put(
                "NCCL_NET",
                "IB",
                "fail at start rather than fall back to TCP where InfiniBand is not found",
                "interconnect.fabric",
            )
        elif net.plugin in ("aws-ofi-nccl", "aws-ofi-rccl"):
            put(
                "NCCL_NET",
                "AWS Libfabric",
                "fail at start rather than fall back to TCP where the OFI plug-in is not found",
                "interconnect.plugin",
            )
