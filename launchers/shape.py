"""The shape of a job: nodes, tasks, cores, memory, time, placement. Every value carries where it came from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Slurm may deliver the warning signal up to a minute early (sbatch manual), so the lead is the grace plus this.
SIGNAL_SLACK_S = 60


@dataclass(frozen=True)
class Value:
    """One decided value, why it is so, and the fact (dotted path of the profile) that it rests on."""

    value: Any
    why: str
    fact: str | None = None


@dataclass(frozen=True)
class JobShape:
    """A job as the scheduler will see it. Memory in GiB per node (or per GPU), times in seconds."""

    backend: str
    style: str  # torchrun: one task a node; srun: one task a GPU; mpi: one process a GPU under mpirun
    nodes: int
    gpus_per_node: int  # as the scheduler counts them; 0 = none
    ranks_per_node: int
    tasks_per_node: int
    time_s: int
    grace_s: int
    cpus_per_task: int | None = None  # as the scheduler counts: cores, or hardware threads where it counts those
    cpus_per_rank: int | None = None  # cores
    memory: tuple[str, int] | None = None  # ("mem" | "mem-per-gpu", GiB)
    partition: str | None = None  # None: not named to the scheduler
    partition_key: str | None = None  # the profile's key
    qos: str | None = None
    constraint: str | None = None
    account: str | None = None
    exclusive: bool = False
    why: dict[str, Value] = field(default_factory=dict)

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def gpu_hours(self) -> float:
        """GPU-hours of one job that uses its whole time."""
        return self.nodes * self.gpus_per_node * self.time_s / 3600

    def reason(self, name: str) -> Value:
        return self.why.get(name) or Value(getattr(self, name, None), "default of aifactory-train")


def lead(shape: JobShape) -> int:
    """Seconds before the limit at which the warning signal is asked for: grace and slack (at most a tenth of a short
    job), at most half of the job. The ranks watch the clock themselves, so the signal may be late in a short job, not
    early."""
    return max(1, min(shape.grace_s + min(SIGNAL_SLACK_S, shape.time_s // 10), shape.time_s // 2))
