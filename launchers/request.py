"""What a user asks for, as typed values; and the rules of hygiene that decide which text may go where.

User text takes one of three ways and no other: into a scheduler directive or a path (only from a small alphabet,
checked here), into a file that the job reads as data (recipe, environment, arguments: any text), or not at all (refused
with a named rule). No user text is ever part of a command line that a shell parses.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

from aifactory_train.core.errors import UserError
from aifactory_train.sites import parse_duration

#: What may stand in a directive's value: accounts, partitions, QoS, node lists, constraints. No blanks, quotes or shell
#: signs.
TOKEN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.@+:/=&|,\[\]-]*")
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
#: Signs that a path may not hold: quotes, expansions, Slurm's own patterns, and what separates binds of containers.
PATH_FORBIDDEN = re.compile(r"[\x00-\x1f\x7f\"'`$\\%*?;&|<>(){}!#:,\[\]]")
LONGEST_PATH = (
    200  # a job name, an attempt and a rank's file are added; file systems end at 255 per name, Slurm at 1024
)
LONGEST_TOKEN = 128


class Refusal(UserError):
    """A request that a named rule forbids, before anything was submitted (exit code 2)."""

    def __init__(
        self, rule: str, what: str, *, fact: str | None = None, where: str | None = None, fix: str | None = None
    ):
        self.rule, self.fact = rule, fact
        text = f"[{rule}] {what}" + (f" ({fact})" if fact else "")
        super().__init__(text, where=where, fix=fix)

    def as_dict(self) -> dict[str, str | None]:
        return {**super().as_dict(), "rule": self.rule, "fact": self.fact}

    def __reduce__(self):
        return (_again, (self.rule, self.what, self.fact, self.where, self.fix))


def _again(rule, what, fact, where, fix):
    error = Refusal(rule, "", fact=fact, where=where, fix=fix)
    error.what = what
    error.args = (str(error),)
    return error


def shown(text: str, length: int = 60) -> str:
    """User text for a message: quoted, control characters made visible, cut."""
    text = repr(text)
    return text if len(text) <= length else text[: length - 1] + "…'"


def token(value: str, flag: str) -> str:
    """``value`` if it may stand in a scheduler directive; else a refusal that names the flag."""
    if len(value) > LONGEST_TOKEN or not TOKEN.fullmatch(value):
        raise Refusal(
            "plain-identifier",
            f"{shown(value)} cannot be a scheduler's identifier",
            where=flag,
            fix="letters, digits and _ . @ + - (and for constraints & | , = [ ]), at most "
            f"{LONGEST_TOKEN}, not beginning with a dash",
        )
    return value


def run_name(value: str, flag: str = "--name") -> str:
    """A run's name: it becomes the job name and a folder."""
    if not NAME.fullmatch(value):
        raise Refusal(
            "run-name",
            f"{shown(value)} is not a name for a run",
            where=flag,
            fix="1 to 64 letters, digits, '.', '_' and '-', beginning with a letter or digit",
        )
    return value


def path(value: str | Path, flag: str, *, must_be_absolute: bool = False) -> Path:
    """A path that can stand in a directive and a script: blanks and Unicode are fine, quotes and expansions are not."""
    text = str(value)
    found = PATH_FORBIDDEN.search(text)
    if not text or found or text.startswith("-") or len(text.encode()) > LONGEST_PATH or text != text.strip():
        reason = (
            f"holds {found.group()!r}"
            if found
            else "is empty"
            if not text
            else "begins with a dash"
            if text.startswith("-")
            else "begins or ends with a blank"
            if text != text.strip()
            else f"is longer than {LONGEST_PATH} bytes"
        )
        raise Refusal(
            "plain-path",
            f"the path {shown(text)} {reason}",
            where=flag,
            fix="use a path without quotes, brackets, wildcards, control characters and any of $ ` \\ % ; & | < > ! # "
            ": ,",
        )
    if must_be_absolute and not text.startswith("/"):
        raise Refusal("absolute-path", f"the path {shown(text)} is not absolute", where=flag, fix="write it from / on")
    return Path(text)


def image(value: str, flag: str) -> str:
    """A container image: a file's path, or a reference such as ``registry/name:tag``."""
    if value.startswith(("/", ".", "~")) or value.endswith((".sif", ".sqsh", ".toml")):
        return str(path(value, flag))
    # Pyxis and the Container Engine write registry#repository:tag.
    token(value.replace("#", "/", 1), flag)
    return value


def pair(text: str, flag: str) -> tuple[str, str]:
    """``NAME=value`` of ``--env`` or ``--array``; the value may be any text without NUL."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise Refusal("name-equals-value", f"{shown(text)} is not NAME=value", where=flag, fix=f"{flag} NAME=value")
    return name, value


def duration(text: str, flag: str = "--time") -> int:
    """Seconds from ``HH:MM:SS``, ``D-HH:MM:SS``, ``90m``, ``24h``, ``2d``."""
    try:
        if re.fullmatch(r"\d+", text):
            raise ValueError("a bare number is minutes to one scheduler and seconds to another")
        return parse_duration(text)
    except ValueError as error:
        raise Refusal(
            "time-form", f"{shown(text)}: {error}", where=flag, fix="write 24:00:00, 2-00:00:00, 90m or 24h"
        ) from None


@dataclass(frozen=True)
class Restarts:
    """How often a run may be started again after each kind of end; two attempts without a new checkpoint end it
    anyway.
    """

    time: int = 50  # stopped at the time limit
    node: int = 3  # lost a node, or a node failed its pre-flight
    crash: int = 1  # a rank was killed or hung; an exception of the program itself is never repeated
    preempted: int = 50


@dataclass(frozen=True)
class LaunchRequest:
    """Everything a user can ask of ``aifactory launch``. ``None`` means: the profile or a default decides."""

    recipe: str
    site: str = "local"
    backend: str | None = None
    style: str | None = None
    partition: str | None = None
    qos: str | None = None
    account: str | None = None
    nodes: int = 1
    gpus_per_node: int | None = None
    nproc: int | None = None
    time_s: int | None = None
    reservation: str | None = None
    constraint: str | None = None
    exclude: tuple[str, ...] = ()
    name: str | None = None
    run_dir: str | None = None
    overrides: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()
    array: tuple[tuple[str, tuple[str, ...]], ...] = ()
    container: str | None = None
    venv: str | None = None
    resubmit: str | None = None  # requeue | chain | none
    chain: int = 0  # further jobs queued at once behind the first, one at a time
    restarts: Restarts = field(default_factory=Restarts)
    grace_s: int | None = None  # time left for the last save before the limit
    hang_s: int = 1800
    preflight: str = "auto"  # auto | on | off
    budget_gpu_hours: float | None = None
    site_budget: float | None = None  # in the unit that the site bills in
    confirmed: bool = False
    resume: bool = False
    mpi: str | None = None  # openmpi | mpich
    #: The program of a rank and its fixed arguments, before recipe and run folder; ``None`` is ``aifactory train``.
    program: tuple[str, ...] | None = None
    extra_flags: tuple[str, ...] = ()
    profile: str | None = None  # the steps of which every rank records where their time goes
    #: Instead of a recipe: the acceptance of one node (``aifactory accept``), with these options.
    accept: tuple[str, ...] | None = None

    @property
    def tasks(self) -> int:
        """Tasks of the sweep: one for each combination of ``array``; 1 without one."""
        return math.prod(len(values) for _, values in self.array)

    def checked(self) -> LaunchRequest:
        """Itself, after the hygiene of every text in it; raises :class:`Refusal`."""
        for flag, value in (
            ("--account", self.account),
            ("--partition", self.partition),
            ("--qos", self.qos),
            ("--reservation", self.reservation),
            ("--constraint", self.constraint),
            *(("--exclude", node) for node in self.exclude),
        ):
            if value is not None:
                token(value, flag)
        if self.name is not None:
            run_name(self.name)
        for flag, value in (("--run-dir", self.run_dir), ("--venv", self.venv)):
            if value is not None:
                path(value, flag)
        if self.container is not None:
            image(self.container, "--container")
        for name, value in self.env:
            if not ENV_NAME.fullmatch(name) or len(name) > LONGEST_TOKEN:
                raise Refusal(
                    "env-name",
                    f"{shown(name)} is not the name of an environment variable",
                    where="--env",
                    fix="letters, digits and _, not beginning with a digit",
                )
            if "\0" in value or len(value) > 32768:
                raise Refusal(
                    "env-value", f"the value of {name} holds a NUL or is over 32 KiB", where="--env", fix="shorten it"
                )
        for flag in self.extra_flags:
            if not re.fullmatch(r"--[a-z][a-z-]*(=[A-Za-z0-9_.@+:/&|,=\[\]-]*)?", flag):
                raise Refusal(
                    "plain-directive",
                    f"{shown(flag)} is not a plain scheduler option",
                    where="--directive",
                    fix="write --option or --option=value with letters, digits and _ . @ + : / & | , = [ ] -",
                )
        return self
