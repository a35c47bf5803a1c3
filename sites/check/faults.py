"""What a fault is, and the names of all that can be found."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aifactory_train.sites.reading import line_of

#: Every fault that can be found, with what it means. `aifactory sites check --list` prints it.
FAULTS = {
    "yaml": "the file is not valid YAML, or a key is written twice",
    "schema": "an unknown key, a missing key or a value of the wrong kind",
    "file-name": "the file is not called <id>.yaml",
    "duplicate-name": "an id, name or alias is used by two systems",
    "no-source": "a fact has no entry in facts:",
    "unknown-source": "facts: or a note names a source that is not defined",
    "second-source": "confirmed: names a source that is not defined, the first one again, or a path without a fact",
    "unused-fact": "facts: names a path that holds no value",
    "undated": "a source is undated and does not say when it was retrieved",
    "future-date": "a source is dated in the future",
    "expired": "the profile's expiry has passed: read its sources again",
    "recalled": "a remembered value where only GPU constants may be remembered",
    "not-usable-fact": "a machine that nobody can use yet states facts instead of notes",
    "missing-list": "missing: does not name exactly the core facts that are not known",
    "status-reason": "a machine is not usable and does not say why",
    "maintainer": "the maintainer line is empty",
    "private": "an account, user path or code stands in a profile",
    "arch": "the architecture does not fit the vendor or the GPU",
    "gpu-constants": "constants contradict each other (no bf16 before sm_80, fnuz fp8 on gfx942 only, ...)",
    "cores": "cores per GPU times GPUs exceed the usable cores, or usable cores exceed the cores",
    "memory": "memory asked for or usable exceeds what the node has",
    "limits": "limits out of order (default over maximum, minimum over maximum, more nodes than there are)",
    "qos": "a partition names a QoS that is not defined",
    "default-partition": "default_partition is not one of the partitions, or is not given",
    "scheduler": "the request's form does not fit the scheduler",
    "isa": "the environment is built for another instruction set than the nodes",
    "binding": "binding masks or NUMA domains do not fit the GPUs, the cores or the reserved cores",
    "network": "NICs times speed is not the node's bandwidth",
    "container": "a GPU flag for the other vendor",
    "environment": "a variable is set and is to be avoided",
    "account": "suffix, pattern and example of the account do not fit",
    "example": "the example values break the profile's own rules",
    "members": "not exactly 19 factories and 13 antennas",
    "country": "a member's country has no name",
    "sector": "an unknown sector, or none without a reason",
    "link": "a link, system or announced system does not exist or has another status",
    "no-reason": "a member without a usable system gives no reason",
    "orphan": "a system belongs to no member",
    "readiness": "readiness.yaml names no system, no known level, or gives no date and evidence",
    "centre": "a centre names a system that is not usable or another centre's, or states facts without a value",
    "unanswered": "a question that is asked before or after a job is neither answered nor named under unknown",
    "access": "access.yaml leaves out a member, or names a route, member or source that does not exist",
    "known-fault": "a known fault names no system, package or variable, has no source, or has expired",
    "contradiction": "a default of the profile is what a newer source says to be at fault",
    "index": "index.json was built from other files",
}


@dataclass(frozen=True)
class Place:
    """A key of a file; the line is looked up when it is printed, because most places are never printed."""

    path: Path | None
    keys: tuple[Any, ...]

    def __str__(self) -> str:
        if self.path is None:
            return ".".join(str(k) for k in self.keys)
        line = line_of(self.path, self.keys)
        return f"{self.path.name}:{line}" if line else self.path.name


@dataclass(frozen=True)
class Fault:
    """One fault. ``severity`` is error or warning; ``where`` is file:line."""

    name: str
    place: Place | str
    what: str
    fix: str | None = None
    severity: str = "error"

    @property
    def where(self) -> str:
        return str(self.place)

    def as_dict(self) -> dict[str, str | None]:
        return {"name": self.name, "where": self.where, "what": self.what, "fix": self.fix, "severity": self.severity}


@dataclass
class CheckReport:
    faults: list[Fault]
    systems: int = 0
    complete: int = 0
    numeric_facts: int = 0
    numeric_covered: int = 0
    facts: int = 0
    covered: int = 0
    #: Facts of usable systems that rest on one user's repository alone, by system.
    single: dict[str, list[str]] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not any(f.severity == "error" for f in self.faults)


def at(path: Path | None, *keys: Any) -> Place:
    """The place of a key."""
    return Place(path, keys)


def keys_of(dotted: str) -> list[Any]:
    """A dotted path as keys and list indices."""
    return [int(k) if k.isdigit() else k for k in dotted.split(".")]
