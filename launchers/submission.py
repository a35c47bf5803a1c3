"""A submission as typed values: every line with its origin, every file with its content. Nothing here touches a
disk.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aifactory_train.launchers.request import LaunchRequest
from aifactory_train.launchers.shape import JobShape
from aifactory_train.sites.profiles import System


@dataclass(frozen=True)
class Line:
    """One line of a script: its text, why it is there, and the fact (dotted path of the profile) that it rests on."""

    text: str
    why: str
    fact: str | None = None


@dataclass(frozen=True)
class File:
    """A file of the submission, relative to the run folder. ``mode`` is the permission bits."""

    path: str
    content: bytes
    mode: int = 0o644


@dataclass
class Submission:
    """Request + site + plan, decided. ``script`` is the file that the scheduler (or bash) gets."""

    request: LaunchRequest
    system: System
    shape: JobShape
    name: str
    run_dir: Path
    script: str = ""
    lines: dict[str, Line] = field(default_factory=dict)  # text of a line -> its origin
    files: list[File] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    plan: dict[str, Any] | None = None

    def line(self, text: str, why: str, fact: str | None = None) -> Line:
        """Register a line with its origin and return it for the template."""
        made = Line(text, why, fact)
        self.lines[text.strip()] = made
        return made


def quoted(value: Any) -> str:
    """A value as one literal shell word. Everything that enters a template from outside passes through here."""
    text = shlex.quote(str(value))
    # A bare comma is literal to bash, but in an array it looks like a mistake to people and to shellcheck.
    return f"'{text}'" if "," in text and not text.startswith("'") and "'" not in text else text


def nul_joined(words: list[str]) -> bytes:
    """Words for a shell to read back with ``read -d ''``: each ended by NUL, so any text is carried literally."""
    for word in words:
        if "\0" in word:
            raise ValueError("a word holds NUL")
    return b"".join(word.encode("utf-8", "surrogateescape") + b"\0" for word in words)
