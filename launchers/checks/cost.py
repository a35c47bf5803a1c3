"""Rules on what a job may cost, and on the age of the facts that all rules rest on."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date

from aifactory_train.launchers.checks.rules import Context, Finding, batch_rule, refuse, rule, warn

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


@batch_rule
def profile_fresh(c: Context) -> Iterator[Finding]:
    """The profile has not expired."""
    if c.system.expires < date.today():
        yield warn(
            f"the profile of {c.system.name} expired on {c.system.expires}: its limits may have changed",
            fix="'aifactory sites probe' compares it with the machine",
        )
