"""Rules on how long and how often: the time limit, sweeps, restarts."""

from __future__ import annotations

from collections.abc import Iterator

from aifactory_train.launchers.checks.rules import Context, Finding, batch_rule, refuse, rule, warn
from aifactory_train.sites import slurm_time

#: Tasks of one sweep.
MOST_TASKS = 256


@batch_rule
def time_over_partition(c: Context) -> Iterator[Finding]:
    """No longer than the partition admits."""
    if c.part is not None and c.part.max_time is not None and c.shape.time_s > c.part.max_time:
        yield refuse(
            f"{slurm_time(c.shape.time_s)}, '{c.shape.partition_key}' admits {slurm_time(c.part.max_time)}",
            c.fact(f"partitions.{c.shape.partition_key}.max_time"),
            f"--time {slurm_time(c.part.max_time)}: the run stops, saves and goes on in the next job",
            "--time",
        )


@batch_rule
def time_over_qos(c: Context) -> Iterator[Finding]:
    """No longer than the QoS admits (Slurm accepts such a job and holds it for ever)."""
    if c.qos is not None and c.qos.max_time is not None and c.shape.time_s > c.qos.max_time:
        yield refuse(
            f"{slurm_time(c.shape.time_s)}, QoS '{c.shape.qos}' admits {slurm_time(c.qos.max_time)}; such a job would "
            f"wait for ever",
            c.fact(f"qos.{c.shape.qos}.max_time"),
            f"--time {slurm_time(c.qos.max_time)}, or another --qos",
            "--time",
        )


@rule
def time_too_short(c: Context) -> Iterator[Finding]:
    """Long enough to start, train and save."""
    if c.batch and c.shape.time_s < 120:
        yield refuse(
            f"{c.shape.time_s} s leave no time to start and save", fix="--time 00:10:00 or more", where="--time"
        )
    elif c.shape.time_s and c.shape.grace_s * 2 > c.shape.time_s:
        yield refuse(
            f"{c.shape.grace_s} s of grace are more than half of {c.shape.time_s} s",
            fix="a shorter --grace or a longer --time",
            where="--grace",
        )


@batch_rule
def jobs_at_once(c: Context) -> Iterator[Finding]:
    """Array tasks against the limit of running jobs."""
    limits = [found.max_running_jobs for found, _, _ in c.limits if found.max_running_jobs is not None]
    if limits and c.request.tasks > min(limits):
        yield warn(f"{c.request.tasks} tasks, {min(limits)} run at a time here: the others wait")


@batch_rule
def requeue_allowed(c: Context) -> Iterator[Finding]:
    """Requeueing is asked for only where the site allows it."""
    if c.request.resubmit == "requeue" and c.system.policy.requeue == "forbidden":
        yield refuse(f"{c.system.name} forbids requeueing", c.fact("policy.requeue"), "--resubmit chain", "--resubmit")


@rule
def array_and_chain(c: Context) -> Iterator[Finding]:
    """A sweep and a pre-queued chain exclude each other."""
    if c.request.array and c.request.chain:
        yield refuse(
            "--chain with --array",
            fix="leave --chain out: each task of an array submits its own next job",
            where="--chain",
        )


@rule
def array_size(c: Context) -> Iterator[Finding]:
    """A sweep is small, and a scheduler that has arrays takes it."""
    if not c.request.array:
        return
    if not 1 <= c.request.tasks <= MOST_TASKS:
        yield refuse(f"{c.request.tasks} tasks", fix=f"1 to {MOST_TASKS}", where="--array")
    if not c.batch:
        yield refuse(
            "an array on this machine",
            fix="run the settings one after the other, or name a site with --site",
            where="--array",
        )
    elif not c.backend.arrays:
        yield refuse(f"arrays are not written for {c.backend.title}", fix="submit one job per setting", where="--array")
