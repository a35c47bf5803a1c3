"""Rules on what a job may cost, and on the age of the facts that all rules rest on."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date

from aifactory_train.launchers.checks.rules import Context, Finding, batch_rule, refuse, rule, warn
from aifactory_train.sites.billing import Bill, bill

#: GPU-hours above which a job wants ``--yes`` (or an answer at the terminal).
CONFIRM_GPU_HOURS = 100.0


@rule
def budget(c: Context) -> Iterator[Finding]:
    """The job stays within the budget that you named."""
    most = c.request.budget_gpu_hours if c.request.budget_gpu_hours is not None else c.system.user.budget_gpu_hours
    hours = gpu_hours(c)
    if most is not None and hours > most:
        yield refuse(
            f"up to {hours:,.1f} GPU-hours, your budget is {most:,.1f}",
            fix="fewer nodes, a shorter --time, or a larger --budget",
            where="--budget",
        )


@batch_rule
def site_budget(c: Context) -> Iterator[Finding]:
    """The job stays within the budget that you named in the site's own unit."""
    most = c.request.site_budget if c.request.site_budget is not None else c.system.user.site_budget
    if most is None:
        return
    cost = billed(c)
    if cost is None:
        yield refuse(
            f"what {c.system.name} bills for an hour is not published: a budget in its unit cannot be kept",
            fix="a budget in GPU-hours: --budget; or correct accounting.unit and accounting.per_gpu_hour in your site "
            "file",
            where="--site-budget",
        )
    elif cost.amount > most:
        yield refuse(
            f"up to {cost}, your budget is {most:,.4g}: {cost.how}",
            c.fact("accounting.unit"),
            "fewer nodes, a shorter --time, or a larger --site-budget",
            "--site-budget",
        )


@batch_rule
def jobs_submitted(c: Context) -> Iterator[Finding]:
    """Tasks of an array and links of a chain are no more jobs than the queue takes of one user."""
    jobs, most = c.request.tasks * (1 + c.request.chain), c.system.queue.max_submitted
    if most is not None and jobs > most:
        yield refuse(
            f"{jobs} jobs, {c.system.name} takes {most} of one user, queued and running",
            c.fact("queue.max_submitted"),
            "a smaller --array or --chain; where your project may submit more, correct queue.max_submitted in your "
            "site file",
            "--array",
        )


@batch_rule
def confirm_cost(c: Context) -> Iterator[Finding]:
    """A large job is confirmed by its user."""
    hours = gpu_hours(c)
    if c.submitting and hours > CONFIRM_GPU_HOURS and not c.request.confirmed:
        yield refuse(
            f"up to {hours:,.0f} GPU-hours are more than {CONFIRM_GPU_HOURS:,.0f}",
            fix="--yes if you mean it",
            where="--yes",
        )


def gpu_hours(c: Context) -> float:
    """GPU-hours of the whole request: every task of an array and every link of a chain, each with its full time."""
    return c.shape.gpu_hours * c.request.tasks * (1 + c.request.chain)


def billed(c: Context) -> Bill | None:
    """What the site bills for the whole request at most; ``None`` where it is not published."""
    if not c.batch or not c.shape.gpus_per_node:
        return None
    hours = c.shape.time_s / 3600 * c.request.tasks * (1 + c.request.chain)
    job = {"gpus_per_node": c.shape.gpus_per_node, "partition": c.shape.partition_key, "qos": c.shape.qos}
    return bill(c.system, c.shape.nodes, hours, exclusive=c.shape.exclusive, **job)


@batch_rule
def profile_fresh(c: Context) -> Iterator[Finding]:
    """The profile has not expired."""
    if c.system.expires < date.today():
        yield warn(
            f"the profile of {c.system.name} expired on {c.system.expires}: its limits may have changed",
            fix="'aifactory sites probe' compares it with the machine",
        )
