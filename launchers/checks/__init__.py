"""Named rules that judge a submission before the scheduler sees it. ``sbatch --test-only`` ignores QoS and association
limits and knows nothing of budgets, data or containers; a request that breaks a rule there waits for ever or dies in
its first minute.

One module a subject; ``RULES`` keeps the rules in the order in which they are reported. A finding says the rule, what
is wrong, the fact it rests on (with its source) and the fix. Levels:

    refuse       nothing is submitted
    warn         reported, nothing else
    not-checked  only the site itself can tell, and we are not there (never changes the exit code)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from aifactory_train.launchers.checks import cost, known, paths, placement, size, software, staged, times
from aifactory_train.launchers.checks.cost import CONFIRM_GPU_HOURS, billed, gpu_hours
from aifactory_train.launchers.checks.rules import Context, Finding, Rule
from aifactory_train.launchers.submission import Submission

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe

__all__ = ["CONFIRM_GPU_HOURS", "RULES", "Context", "Finding", "Rule", "billed", "check", "gpu_hours", "raise_refusals"]

RULES: dict[str, Rule] = {
    found.name: found
    for module in (placement, size, times, paths, software, known, staged, cost)
    for found in vars(module).values()
    if isinstance(found, Rule)
}
LEVELS = ("refuse", "warn", "not-checked")


def check(sub: Submission, recipe: Recipe | None, *, here: bool, submitting: bool = False) -> list[Finding]:
    """All findings, refusals first. ``recipe`` is None for an acceptance: rules about recipes are left out."""
    context = Context(sub, recipe, here, submitting)  # type: ignore[arg-type]
    found = [finding for rule in RULES.values() for finding in rule(context)]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def raise_refusals(found: Iterable[Finding]) -> None:
    """Raise the first refusal; the others stand in its message."""
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
