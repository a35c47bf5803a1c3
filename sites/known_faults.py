"""``known-faults.yaml``: what is known to go wrong with an image, a version, a variable, an engine, a kind of machine.

Whoever starts something asks :func:`applicable` with what is known of it and tells what comes back. A condition whose
subject is not known (the packages inside an image, say) does not hold: nothing is told on a guess.
"""

from __future__ import annotations

import datetime
import fnmatch
import functools
import importlib.metadata
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date as Date
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from aifactory_train.core.errors import UserError
from aifactory_train.sites.catalogue import ROOM
from aifactory_train.sites.fields import Positive, SiteModel, Text
from aifactory_train.sites.reading import place_of, read_yaml
from aifactory_train.sites.schema import Source

if TYPE_CHECKING:
    from aifactory_train.sites.system import System

FAULTS = ROOM / "known-faults.yaml"
#: A version condition: comparisons joined by commas, all of which hold (``>=0.18.3,<=0.19.3``).
VERSIONS = re.compile(r"^(>=|<=|==|<|>)\d+(\.\d+)*(,(>=|<=|==|<|>)\d+(\.\d+)*)*$")


class Conditions(SiteModel):
    """All that are given hold together; of the values in a list any."""

    systems: list[str] = []  # ids of profiles; * stands for anything (jean-zay-*)
    vendor: Literal["nvidia", "amd"] | None = None
    gpu: str | None = None  # regular expression, found in the GPU's model or SKU
    isa: Literal["x86_64", "aarch64"] | None = None
    fabric: str | None = None
    image: str | None = None  # regular expression, found in the path of the image
    packages: dict[str, Text] = {}  # package -> versions
    variables: dict[str, Text] = {}  # set, and the value matches the regular expression whole
    unset: list[str] = []  # not set
    engines: list[str] = []
    flags: list[str] = []  # regular expressions of scheduler options, one of which is given
    nodes_from: Positive | None = None

    @field_validator("packages")
    @classmethod
    def _versions(cls, packages: dict[str, str]) -> dict[str, str]:
        for name, wanted in packages.items():
            if not VERSIONS.match(wanted.replace(" ", "")):
                raise ValueError(f"{name}: '{wanted}' is no list of versions such as >=2.7,<2.8")
        return packages

    @model_validator(mode="after")
    def _compiles(self) -> Conditions:
        for pattern in (self.gpu, self.image, *self.variables.values(), *self.flags):
            if pattern is not None:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise ValueError(f"'{pattern}' is not a regular expression: {error}") from None
        return self


class KnownFault(SiteModel):
    """One fault. ``effect`` in one word, ``what`` happens, the ``remedy``, who says so and until when to believe it."""

    id: str = Field(pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")
    where: Conditions
    effect: Literal["hang", "crash", "wrong", "slow", "lost"]
    what: str
    remedy: str
    state: Literal["open", "fixed"] = "open"  # fixed: newer versions are well
    always: bool = False  # the source sets the remedy for everybody, not only where the fault shows
    source: Source
    expires: Date  # look at the source again

    @property
    def expired(self) -> bool:
        return self.expires < datetime.date.today()

    @property
    def dated(self) -> str:
        return self.source.date if self.source.date != "n.d." else self.source.retrieved or ""

    def sentence(self) -> str:
        """The fault for people."""
        old = f"; this entry expired on {self.expires}, look at the source" if self.expired else ""
        place = self.source.url or self.source.title
        return f"{self.effect}: {self.what}; remedy: {self.remedy} [{self.id}, {self.dated}, {place}{old}]"

    def as_dict(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_none=True)


@dataclass(frozen=True)
class Situation:
    """What is known of something that is to be started. ``None``: not known."""

    system: System | None = None
    image: str | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    variables: Mapping[str, str] | None = None
    engine: str | None = None
    flags: tuple[str, ...] = ()
    nodes: int | None = None


@functools.lru_cache(maxsize=1)
def known() -> tuple[KnownFault, ...]:
    """All entries of the shipped file."""
    return read(FAULTS)


def read(path: Path) -> tuple[KnownFault, ...]:
    """The entries of a file; raises UserError for one that is not of the shape."""
    found = []
    for i, entry in enumerate((read_yaml(path) or {}).get("faults", [])):
        try:
            found.append(KnownFault.model_validate(entry))
        except ValueError as error:
            what = " ".join(str(error).split())[:300]
            raise UserError(what, where=place_of(path, ("faults", i), path.name)) from None
    return tuple(found)


def applicable(situation: Situation, faults: tuple[KnownFault, ...] | None = None) -> list[KnownFault]:
    """The faults whose conditions all hold."""
    return [f for f in (known() if faults is None else faults) if all(_holds(f.where, situation))]


def installed() -> dict[str, str]:
    """Versions of the packages that the entries speak of, of those that are installed here."""
    found = {}
    for name in sorted({name for fault in known() for name in fault.where.packages}):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def of_system(system: System) -> list[KnownFault]:
    """Faults that name a system, or its kind of GPU or fabric, whatever is run there."""
    return [
        fault
        for fault in known()
        if (fault.where.systems or fault.where.gpu or fault.where.fabric) and all(_machine(fault.where, system))
    ]


def _machine(where: Conditions, system: System | None) -> Iterator[bool]:
    """Conditions on the machine."""
    if where.systems:
        yield system is not None and any(fnmatch.fnmatchcase(system.id, name) for name in where.systems)
    if where.vendor:
        yield system is not None and system.gpu.vendor == where.vendor
    if where.gpu:
        names = f"{system.gpu.model or ''} {system.gpu.sku or ''}" if system is not None else ""
        yield re.search(where.gpu, names, re.I) is not None
    if where.isa:
        yield system is not None and system.node.isa == where.isa
    if where.fabric:
        yield system is not None and system.interconnect.fabric == where.fabric


def _holds(where: Conditions, s: Situation) -> Iterator[bool]:
    yield from _machine(where, s.system)
    if where.image:
        yield s.image is not None and re.search(where.image, s.image) is not None
    for name, wanted in where.packages.items():
        yield name in s.packages and version_in(s.packages[name], wanted)
    for name, pattern in where.variables.items():
        yield s.variables is not None and name in s.variables and bool(re.fullmatch(pattern, s.variables[name]))
    for name in where.unset:
        yield s.variables is not None and name not in s.variables
    if where.engines:
        yield s.engine in where.engines
    if where.flags:
        yield any(re.search(pattern, flag) for pattern in where.flags for flag in s.flags)
    if where.nodes_from:
        yield s.nodes is not None and s.nodes >= where.nodes_from


def version_in(version: str, wanted: str) -> bool:
    """Whether a version lies in ``>=1.2,<2``. Only its leading numbers count: 2.9.1+cu128 is 2.9.1."""
    have = _numbers(version)
    return all(_compare(have, *part) for part in re.findall(r"(>=|<=|==|<|>)([\d.]+)", wanted))


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(n) for n in found[0].split(".")) if found else ()


def _compare(have: tuple[int, ...], sign: str, text: str) -> bool:
    want = _numbers(text)
    size = max(len(have), len(want))
    a, b = (t + (0,) * (size - len(t)) for t in (have, want))
    return {">=": a >= b, "<=": a <= b, "==": a[: len(want)] == b[: len(want)], "<": a < b, ">": a > b}[sign]


def flags_of(system: System) -> tuple[str, ...]:
    """The scheduler's options that a profile gives to every job, and to its steps."""
    return (*system.request.flags, *system.launch.srun_flags)


def contradictions(system: System, faults: tuple[KnownFault, ...] | None = None) -> list[tuple[KnownFault, str, str]]:
    """``(fault, path of the default, date of the default's source)``: what a profile sets, or leaves unset, meets every
    condition of a fault, and the fault's source is not older than that of the profile.

    What is known of the default: the variables that the profile sets, its first image, its options of the scheduler,
    any number of nodes, no engine. What is left unset contradicts a source only where that sets it for everybody
    (``always``).
    """
    i, image = next(((i, box.image) for i, box in enumerate(system.software.containers) if box.image), (0, None))
    options = {"request.flags": system.request.flags, "launch.srun_flags": system.launch.srun_flags}
    situation = Situation(system, image, {}, dict(system.environment.set), None, flags_of(system), nodes=sys.maxsize)
    found = []
    for fault in applicable(situation, faults):
        blamed = [(f"environment.set.{name}",) * 2 for name in fault.where.variables]
        blamed += [(f"software.containers.{i}.image",) * 2] if fault.where.image else []
        for where, flags in options.items():
            blamed += [(where,) * 2 for p in fault.where.flags if any(re.search(p, flag) for flag in flags)]
        if fault.always:
            blamed += [("environment.set", f"environment.set without {name}") for name in fault.where.unset]
        for at, path in blamed:
            fact = system.provenance(at)
            dated = (fact.date if fact.date != "n.d." else fact.retrieved or "") if fact is not None else ""
            if fault.dated >= dated[: len(fault.dated)]:
                found.append((fault, path, dated))
    return found
