"""Which rank this process is, and how the ranks find each other.

Ranks are read from torchrun's variables, else from Slurm's (one task per GPU), else from MPI; training itself always
goes through torch.distributed.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from aifactory_train.core import compat
from aifactory_train.core.errors import UserError
from aifactory_train.parallel import patience


@dataclass(frozen=True)
class World:
    """This process among the others. ``device`` is 'cpu' or 'cuda:LOCAL_RANK' (a GPU is what the scheduler counts)."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: str
    started_by: str
    host: str
    timeout_s: float = 600.0  # of a collective

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def discover(environment: dict[str, str] | None = None) -> tuple[int, int, int, int, str]:
    """(rank, size, local rank, local size, started by) from the environment. Raises on a half-set environment."""
    env = os.environ if environment is None else environment

    def numbers(*names: str) -> list[int]:
        try:
            return [int(env[name]) for name in names]
        except (KeyError, ValueError) as error:
            raise UserError(
                f"the launcher set {names[0]} but not a usable {error}",
                where="environment",
                fix="start with torchrun, srun or mpirun, or unset RANK and WORLD_SIZE",
            ) from None

    if "RANK" in env or "WORLD_SIZE" in env:
        rank, size = numbers("RANK", "WORLD_SIZE")
        local = int(env.get("LOCAL_RANK", 0))
        return rank, size, local, int(env.get("LOCAL_WORLD_SIZE", 1)), "torchrun"
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and env.get("MASTER_ADDR"):
        rank, size, local = numbers("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        tasks = env.get("SLURM_NTASKS_PER_NODE", "1").split("(")[0]
        return rank, size, local, int(tasks) if tasks.isdigit() else 1, "srun"
    if "OMPI_COMM_WORLD_RANK" in env:
        rank, size, local, per_node = numbers(
            "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
        )
        return rank, size, local, per_node, "mpi"
    if "PMI_RANK" in env and "PMI_SIZE" in env:
        rank, size = numbers("PMI_RANK", "PMI_SIZE")
        return rank, size, int(env.get("MPI_LOCALRANKID", 0)), int(env.get("MPI_LOCALNRANKS", 1)), "mpi"
    if "SLURM_STEP_ID" in env and env.get("SLURM_STEP_NUM_TASKS", "1") not in ("", "1"):
        raise UserError(
            f"srun started {env['SLURM_STEP_NUM_TASKS']} tasks without MASTER_ADDR: each would train alone, in one "
            f"run folder",
            where="environment",
            fix="let `aifactory launch` write the batch script, or export MASTER_ADDR and MASTER_PORT before srun",
        )
    return 0, 1, 0, 1, "alone"


def _mpi_rendezvous() -> None:
    """Rank 0 tells its address and a free port to the others through mpi4py; nothing else uses MPI."""
    if os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT"):
        return
    try:
        from mpi4py import MPI
    except ImportError:
        raise UserError(
            "started by mpirun, but mpi4py is not installed", fix="pip install 'aifactory-train[mpi]', or use torchrun"
        ) from None
    comm = MPI.COMM_WORLD
    address = None
    if comm.rank == 0:
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = probe.getsockname()[1]
        one_host = comm.allgather(socket.gethostname())
        address = ("127.0.0.1" if len(set(one_host)) == 1 else socket.gethostname(), port)
    else:
        comm.allgather(socket.gethostname())
    host, port = comm.bcast(address, root=0)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = host, str(port)


#: What the environment held under the names that :func:`join_world` sets, for :func:`leave_world` to put back.
_BEFORE: dict[str, str | None] = {}


def join_world(timeout_s: int = 600, threads: int | None = None) -> World:
    """Join the process group (also for one process: engines and checkpoints then need no second code path)."""
    rank, size, local_rank, local_size, started_by = discover()
    if started_by == "mpi":
        _mpi_rendezvous()
    device = "cpu"
    _expect_gpus(local_size)
    index = local_rank
    if compat.device_type() == "cuda":
        count = torch.cuda.device_count()
        if local_rank >= count and count != 1:
            raise UserError(
                f"local rank {local_rank}, but this process sees {count} GPUs",
                where="launcher",
                fix="start at most one process per visible GPU",
            )
        index = local_rank % count
        device = f"cuda:{index}"
        torch.cuda.set_device(device)
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(threads or max(1, cores // local_size))
    if not dist.is_initialized():
        # DeepSpeed reads them, and takes LOCAL_RANK for the number of a device that this process sees.
        for name, value in {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": index}.items():
            _BEFORE.setdefault(name, os.environ.get(name))
            os.environ[name] = str(value)
        store = None
        if size == 1:
            store = dist.HashStore()
        elif not (os.environ.get("MASTER_ADDR") and os.environ.get("MASTER_PORT")):
            raise UserError("MASTER_ADDR or MASTER_PORT is not set", where="environment", fix="start with torchrun")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device != "cpu" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    return World(rank, size, local_rank, local_size, device, started_by, socket.gethostname(), timeout_s)


def _expect_gpus(local_size: int) -> None:
    """A job that asked for GPUs (``AIFACTORY_EXPECT_GPUS`` a node, from the launcher) does not train on the CPU or on
    fewer of them. One GPU of several is right where each rank was given its own."""
    expected = os.environ.get("AIFACTORY_EXPECT_GPUS", "")
    if not expected.isdigit() or int(expected) == 0:
        return
    seen = torch.cuda.device_count() if compat.device_type() == "cuda" else 0
    if seen == 0:
        if os.environ.get("AIFACTORY_ALLOW_CPU") == "1":
            return
        built = torch.version.cuda is not None or torch.version.hip is not None
        raise UserError(
            f"the job asked for {expected} GPUs a node, but torch {torch.__version__} "
            + ("sees none" if built else "has no GPU support (a CPU build)"),
            where="environment",
            fix="install a build of torch for these GPUs, or AIFACTORY_ALLOW_CPU=1 to train on the CPU"
            if not built
            else "look at driver and visible devices (aifactory doctor), or AIFACTORY_ALLOW_CPU=1 to train on the CPU",
        )
    if seen < int(expected) and not (seen == 1 and local_size > 1):
        raise UserError(
            f"{seen} of the {expected} GPUs that the job asked for on each node are visible",
            where="environment",
            fix=f"look at the node and at *_VISIBLE_DEVICES, or ask for them: aifactory launch --gpus-per-node {seen}",
        )


def from_main(world: World, function: Callable[[], Any]) -> Any:
    """The result of ``function``, which rank 0 alone runs; a :class:`UserError` of rank 0 is raised on every rank.

    The others wait as long as rank 0 gets on, which may be hours of tokenising; where it freezes, ``world.timeout_s``.
    """
    if world.size == 1:
        return function()
    box: list[Any] = [None, None]
    if world.is_main:
        with patience.working(world.timeout_s) as group:
            try:
                box = [function(), None]
            except UserError as error:
                box = [None, error]
    else:
        group = patience.wait(world.timeout_s)
    dist.broadcast_object_list(box, src=0, group=group)
    if box[1] is not None:
        raise box[1].of(0)
    return box[0]


def leaves_alone(world: World) -> bool:
    """Whether a rank that failed must end without the others: on GPUs taking the group down is a collective (NCCL
    flushes and finalises together), so it would hang until the time-out of those that still compute."""
    return world.size > 1 and world.device != "cpu"


def leave_alone(code: int) -> NoReturn:
    """End this process now, with its own exit code: what it had to say is written, nothing waits for another rank."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a full disk or a closed pipe must not keep the rank
            stream.flush()
    os._exit(code)


#: A rank whose work is done waits this long for the others to take the group down with it.
LEAVE_S = 60.0


def leave_world(code: int | None = None) -> None:
    """Tear the process group down, in the order that lets no rank wait for another. With an exit ``code``, a group that
    cannot be taken down within ``LEAVE_S`` (NCCL finalises together with ranks that may be gone) ends the process with
    it: what it had to say is written, and the job must not last until its time is up.

    Gloo's threads are joined when the last reference to their group goes, and one that still releases a finished
    collective's tensors while the interpreter ends takes the process down ("terminate called without an active
    exception", seen on busy cores). So everything that holds a group is collected here, where the interpreter is whole.
    """
    patience.forget()
    gc.collect()
    if dist.is_initialized():
        limit = threading.Timer(LEAVE_S, leave_alone, (code,))
        limit.daemon = True
        if code is not None:
            limit.start()
        try:
            dist.destroy_process_group()
        finally:
            limit.cancel()
    gc.collect()
    for name, value in _BEFORE.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    _BEFORE.clear()
