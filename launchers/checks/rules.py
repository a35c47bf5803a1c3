"""What a rule is: a small generator of findings about a submission, named as the function is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from aifactory_train.core.errors import UserError
from aifactory_train.launchers import backends
from aifactory_train.launchers.backends import Backend
from aifactory_train.launchers.request import LaunchRequest, Refusal
from aifactory_train.launchers.shape import JobShape
from aifactory_train.launchers.submission import Submission
from aifactory_train.sites.profiles import System
from aifactory_train.sites.schema import Partition, Qos

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe


@dataclass(frozen=True)
class Finding:
    """What a rule found: what is wrong, the fact it rests on (with its source), and the fix."""

    rule: str  # filled in by the rule that found it
    level: str  # refuse | warn | not-checked
    what: str
    fact: str | None = None
    fix: str | None = None
    where: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if v is not None}

    def refusal(self) -> Refusal:
        return Refusal(self.rule, self.what, fact=self.fact, where=self.where, fix=self.fix)


def refuse(what: str, fact: str | None = None, fix: str | None = None, where: str | None = None) -> Finding:
    """Nothing is submitted."""
    return Finding("", "refuse", what, fact, fix, where)


def warn(what: str, fact: str | None = None, fix: str | None = None) -> Finding:
    """Reported, nothing else."""
    return Finding("", "warn", what, fact, fix)


def not_checked(what: str, fix: str | None = None) -> Finding:
    """Only the site itself can tell, and we are not there (never changes the exit code)."""
    return Finding("", "not-checked", what, fix=fix)


@dataclass
class Context:
    """What the rules look at. ``here``: we are on the site (or the job runs on this machine), so its files can be
    looked at.
    """

    sub: Submission
    recipe: Recipe  # rules about it are not asked where there is none
    here: bool
    submitting: bool
    environ: dict[str, str] = field(default_factory=lambda: dict(os.environ))

    @property
    def system(self) -> System:
        return self.sub.system

    @property
    def shape(self) -> JobShape:
        return self.sub.shape

    @property
    def request(self) -> LaunchRequest:
        return self.sub.request

    @property
    def part(self) -> Partition | None:
        return self.system.partitions.get(self.shape.partition_key) if self.shape.partition_key else None

    @property
    def qos(self) -> Qos | None:
        return self.system.qos.get(self.shape.qos) if self.shape.qos else None

    @property
    def limits(self) -> list[tuple[Partition | Qos, str, str]]:
        """``(partition or QoS, its path in the profile, the option that names it)`` of those that are known."""
        found: list[tuple[Partition | Qos | None, str, str]] = [
            (self.part, f"partitions.{self.shape.partition_key}", "--partition"),
            (self.qos, f"qos.{self.shape.qos}", "--qos"),
        ]
        return [(limit, path, flag) for limit, path, flag in found if limit is not None]

    @property
    def batch(self) -> bool:
        """A scheduler takes the job; without one it runs on this machine."""
        return self.backend.batch

    @property
    def backend(self) -> Backend:
        return backends.get(self.shape.backend)

    @property
    def variables(self) -> list[tuple[str, str]]:
        """Environment variables that the user sets, in the site file and on the command line; the later counts."""
        return [*self.system.user.env.items(), *self.request.env]

    def fact(self, path: str) -> str | None:
        """``source (date, confidence)`` of a fact."""
        try:
            found = self.system.provenance(path)
        except UserError:
            return None
        return None if found is None else f"{found.source}, {found.date}, {found.confidence}"


Find = Callable[[Context], Iterator[Finding]]


@dataclass(frozen=True)
class Rule:
    """A named rule; ``text`` says what holds where it finds nothing."""

    name: str
    text: str
    find: Find
    batch: bool  # concerns jobs of a scheduler alone
    recipe: bool = False  # concerns the recipe: not asked for an acceptance, which has none

    def __call__(self, context: Context) -> Iterator[Finding]:
        if (context.batch or not self.batch) and (context.request.accept is None or not self.recipe):
            for finding in self.find(context):
                yield replace(finding, rule=self.name)


def rule(find: Find, batch: bool = False, recipe: bool = False) -> Rule:
    """A rule named as its function (``_`` for ``-``), which says in the first line of its docstring what must hold."""
    return Rule(find.__name__.replace("_", "-"), (find.__doc__ or "").strip().split("\n")[0], find, batch, recipe)


def batch_rule(find: Find) -> Rule:
    """A rule for jobs that a scheduler takes."""
    return rule(find, batch=True)


def recipe_rule(find: Find) -> Rule:
    """A rule about the recipe."""
    return rule(find, recipe=True)


def lies_in(path: str, folders: Iterable[str]) -> bool:
    """Whether a path is one of the folders or below one."""
    return any(path == folder or path.startswith(folder.rstrip("/") + "/") for folder in folders)
