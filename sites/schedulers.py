"""The schedulers that a profile may name, and what is true of each wherever it runs: how GPUs are asked for, its
flavours, and the variables that it gives to jobs. What this project can do with one is stated by its backend
(``launchers/backends``).

Another kind is its words in the literals here and a row of ``SCHEDULERS``; then ``aifactory sites check --write-index``
writes the schema from which editors complete profiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: ``scheduler.kind`` of a profile.
Kind = Literal["slurm", "pbspro", "torque", "kubernetes", "none"]
#: ``request.gpus`` of a profile, the forms of all kinds.
GpuRequest = Literal["gpus-per-node", "gres", "gpus", "none", "pbs-select", "torque-nodes", "kubernetes"]
#: ``scheduler.flavour`` of a profile.
Flavour = Literal["slurmd", "psslurm", "moab", "kueue"]


@dataclass(frozen=True)
class JobVariables:
    """Names of the environment variables that a job of a scheduler sees; None where it has no such variable."""

    job: str
    cluster: str | None = None
    partition: str | None = None
    nodes: str | None = None


@dataclass(frozen=True)
class Scheduler:
    """One kind. ``gpu_requests``: forms of ``request.gpus`` that it takes; ``flavours``: values of
    ``scheduler.flavour``.
    """

    gpu_requests: tuple[GpuRequest, ...]
    flavours: tuple[Flavour, ...] = ()
    variables: JobVariables | None = None


SCHEDULERS: dict[str, Scheduler] = {
    "slurm": Scheduler(
        gpu_requests=("gpus-per-node", "gres", "gpus", "none"),
        flavours=("slurmd", "psslurm"),
        variables=JobVariables("SLURM_JOB_ID", "SLURM_CLUSTER_NAME", "SLURM_JOB_PARTITION", "SLURM_JOB_NUM_NODES"),
    ),
    "pbspro": Scheduler(
        gpu_requests=("pbs-select", "none"),
        variables=JobVariables("PBS_JOBID", "PBS_SERVER", "PBS_QUEUE"),
    ),
    # Its jobs see the names of PBS: from within, the two are not told apart.
    "torque": Scheduler(gpu_requests=("torque-nodes", "none"), flavours=("moab",)),
    "kubernetes": Scheduler(gpu_requests=("kubernetes",), flavours=("kueue",)),
    "none": Scheduler(gpu_requests=("none",)),
}
