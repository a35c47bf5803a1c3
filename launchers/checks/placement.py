"""Rules on where a job runs: the machine, its scheduler, account, partition and QoS."""

from __future__ import annotations

import re
from collections.abc import Iterator

from aifactory_train.core.errors import did_you_mean
from aifactory_train.launchers.checks.rules import Context, Finding, batch_rule, refuse, rule, warn
from aifactory_train.launchers.request import shown


@rule
def site_usable(c: Context) -> Iterator[Finding]:
    """The machine exists and can be used today."""
    if not c.system.usable:
        yield refuse(
            f"{c.system.name} cannot be used today: {c.system.status_reason or c.system.status}",
            fix="'aifactory sites' lists what runs today",
            where="--site",
        )


@batch_rule
def backend_matches_scheduler(c: Context) -> Iterator[Finding]:
    """The backend is that of the site's scheduler."""
    kind = c.system.scheduler.kind
    if kind not in (None, "none", *c.backend.schedulers):
        yield refuse(
            f"{c.system.name} runs {kind}, not {c.shape.backend}",
            c.fact("scheduler.kind"),
            f"leave --backend out, or --backend {kind}",
            "--backend",
        )
    elif kind in (None, "none"):
        yield refuse(
            f"no scheduler is known for {c.system.name}",
            fix="--backend local, or name a site with --site",
            where="--backend",
        )


@rule
def scheduler_unseen(c: Context) -> Iterator[Finding]:
    """Said where no scheduler of this kind has seen our scripts."""
    if c.backend.unseen is not None:
        yield warn(c.backend.unseen)


@batch_rule
def human_submits(c: Context) -> Iterator[Finding]:
    """Sites that require a person behind each submission."""
    if c.system.policy.unattended_submission == "human-needed":
        yield warn(
            f"{c.system.name} requires a person behind every submission: a job that stops at its limit is not "
            "submitted again by itself",
            c.fact("policy.unattended_submission"),
            "aifactory launch --resume RUN goes on with it",
        )
        if c.request.resubmit in ("requeue", "chain") or c.request.chain:
            yield refuse(
                "automatic resubmission is asked for",
                c.fact("policy.unattended_submission"),
                "leave --resubmit and --chain out",
                "--resubmit",
            )


@batch_rule
def account_required(c: Context) -> Iterator[Finding]:
    """An account is given where the site demands one."""
    if c.system.access.account == "required" and not c.shape.account:
        form = c.system.access.account_form or c.system.access.account_suffix
        yield refuse(
            f"{c.system.name} takes no job without an account",
            c.fact("access.account"),
            f"--account ACCOUNT{f' (form: {form})' if form else ''}, or user.account in your site file",
            "--account",
        )


@batch_rule
def account_form(c: Context) -> Iterator[Finding]:
    """The account has the form that the site's accounts have."""
    pattern = c.system.access.account_pattern
    # Slurm folds the names of accounts to lower case.
    if c.shape.account and pattern and not re.fullmatch(pattern, c.shape.account, re.IGNORECASE):
        yield refuse(
            f"{shown(c.shape.account)} does not look like an account of {c.system.name}",
            c.fact("access.account_pattern"),
            f"accounts there have the form {c.system.access.account_form or pattern}",
            "--account",
        )


@batch_rule
def account_suffix(c: Context) -> Iterator[Finding]:
    """GPU accounts that must end in a suffix do."""
    suffix = c.system.access.account_suffix
    if c.shape.account and suffix and not c.shape.account.lower().endswith(suffix.lower()):
        yield refuse(
            f"{shown(c.shape.account)} is no GPU account of {c.system.name}: those end in '{suffix}'",
            c.fact("access.account_suffix"),
            f"--account {c.shape.account}{suffix}",
            "--account",
        )


@batch_rule
def partition_known(c: Context) -> Iterator[Finding]:
    """The partition is one of the profile's."""
    key, known = c.shape.partition_key, list(c.system.partitions)
    if key and known and key not in known:
        yield refuse(
            f"{c.system.name} has no partition '{key}'{did_you_mean(key, known)}",
            c.fact("partitions"),
            f"one of {', '.join(known)}",
            "--partition",
        )


@batch_rule
def partition_needed(c: Context) -> Iterator[Finding]:
    """A partition is named where several exist and none is the default."""
    if not c.shape.partition_key and len(c.system.partitions) > 1:
        yield refuse(
            f"{c.system.name} has several partitions and no default",
            c.fact("partitions"),
            f"--partition, one of {', '.join(c.system.partitions)}",
            "--partition",
        )


@batch_rule
def partition_up(c: Context) -> Iterator[Finding]:
    """The partition was not seen down; a reservation opens it all the same."""
    if c.part is None or c.part.state != "down" or c.request.reservation or c.system.user.reservation:
        return
    key = c.shape.partition_key
    others = [k for k, p in c.system.partitions.items() if p.state != "down" and p.purpose not in ("data", "debug")]
    yield refuse(
        f"'{key}' of {c.system.name} was seen down: a job would wait for ever",
        c.fact(f"partitions.{key}.state"),
        f"{f'--partition {others[0]}, or ' if others else ''}--reservation NAME where the site gave you one; if it is "
        f"up "
        f"again, correct partitions.{key}.state to up in your site file",
        "--partition",
    )


@batch_rule
def partition_is_for_training(c: Context) -> Iterator[Finding]:
    """Data-transfer partitions are no place for training."""
    for found, _, flag in c.limits:
        if found.purpose == "data":
            what = "partition" if flag == "--partition" else "QoS"
            yield refuse(
                f"this {what} of {c.system.name} is for data transfer",
                fix="choose another; 'aifactory sites' lists their purposes",
                where=flag,
            )


@batch_rule
def qos_required(c: Context) -> Iterator[Finding]:
    """A QoS is given where the site demands one."""
    if c.system.access.qos in ("required", "project") and not c.shape.qos:
        choice = (
            "your project's name"
            if c.system.access.qos == "project"
            else f"one of {', '.join(c.system.qos) or 'your QoS'}"
        )
        yield refuse(
            f"{c.system.name} takes no GPU job without a QoS", c.fact("access.qos"), f"--qos, {choice}", "--qos"
        )


@batch_rule
def qos_known(c: Context) -> Iterator[Finding]:
    """The QoS is one of the profile's."""
    known = list(c.system.qos)
    if not (c.shape.qos and known) or c.shape.qos in known or c.system.access.qos == "project":
        return
    if c.part is not None and c.part.qos_equals_partition and c.shape.qos == c.shape.partition_key:
        return
    yield refuse(
        f"{c.system.name} has no QoS '{c.shape.qos}'{did_you_mean(c.shape.qos, known)}",
        c.fact("qos"),
        f"one of {', '.join(known)}",
        "--qos",
    )


@batch_rule
def qos_form(c: Context) -> Iterator[Finding]:
    """A QoS that is the project's name has its form."""
    pattern = c.system.access.qos_pattern
    if c.shape.qos and pattern and c.shape.qos not in c.system.qos and not re.fullmatch(pattern, c.shape.qos):
        yield refuse(
            f"{shown(c.shape.qos)} does not look like a QoS of {c.system.name}",
            c.fact("access.qos_pattern"),
            f"it must match {pattern}",
            "--qos",
        )


@batch_rule
def qos_goes_with_partition(c: Context) -> Iterator[Finding]:
    """Partition and QoS belong together."""
    part, qos = c.part, c.shape.qos
    if part is None or qos is None:
        return
    if part.qos and qos in c.system.qos and qos not in part.qos:
        yield refuse(
            f"QoS '{qos}' does not go with partition '{c.shape.partition_key}'",
            c.fact(f"partitions.{c.shape.partition_key}.qos"),
            f"QoS of that partition: {', '.join(part.qos)}",
            "--qos",
        )


@batch_rule
def qos_not_taken(c: Context) -> Iterator[Finding]:
    """No QoS is given where the site knows none."""
    if c.system.access.qos == "none" and c.shape.qos:
        yield refuse(f"{c.system.name} has no QoS to choose", c.fact("access.qos"), "leave --qos out", "--qos")
