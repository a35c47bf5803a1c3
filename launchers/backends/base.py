"""What a scheduler can do, and how it is asked: the class that every backend fills in, and the register of them.

Nobody outside this package compares the names of backends. What differs between schedulers is an attribute or a method
here.
"""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from aifactory_train.core.errors import UserError
from aifactory_train.launchers.submission import Line, Submission
from aifactory_train.sites.schema import Container


@dataclass(frozen=True)
class Job:
    """A job as its scheduler sees it. ``state``: pending | running | done | failed | cancelled | timeout | node-fail |
    out-of-memory | preempted.
    """

    id: str
    state: str
    reason: str | None = None
    nodes: str | None = None
    started: str | None = None
    ended: str | None = None
    exit_code: str | None = None
    raw: str = ""
    accounting: dict[str, Any] = field(default_factory=dict)


class Backend(ABC):
    """One way to get a job onto nodes. An attribute says what the scheduler can do; a subclass sets those in which it
    differs.
    """

    #: As ``--backend`` and the run's manifest name it, and for people.
    name: ClassVar[str]
    title: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    #: Kinds of ``scheduler.kind`` in a profile that it serves.
    schedulers: ClassVar[tuple[str, ...]] = ()
    #: Commands that must be on PATH to submit.
    programs: ClassVar[tuple[str, ...]] = ()
    #: Said before each submission where no scheduler of this kind has seen our scripts.
    unseen: ClassVar[str | None] = None

    #: A scheduler takes the job; without one it runs on this machine in the foreground (:meth:`run`).
    batch: ClassVar[bool] = True
    #: Ways to start the ranks, the one that needs least of a site first.
    styles: ClassVar[tuple[str, ...]] = ("torchrun",)
    #: What the ranks run with: the site's modules, containers and Python; the image that the job names; or what runs
    #: here now.
    software: ClassVar[Literal["site", "image", "here"]] = "site"
    arrays: ClassVar[bool] = True
    #: A job can be put back into the queue under its own id; a job can submit the one that goes on after it.
    requeue: ClassVar[bool] = False
    chain: ClassVar[bool] = True
    #: Several nodes meet before the model is loaded, unless told otherwise.
    preflight: ClassVar[bool] = False
    #: A task that asks for no cores is held to one.
    one_core: ClassVar[bool] = False
    #: ``status`` asks it about jobs; without, the run folder alone tells.
    followed: ClassVar[bool] = True

    #: The template of the shell script, and the file of ``submission/`` that the scheduler gets.
    template: ClassVar[str] = "plain.sh.j2"
    script_file: ClassVar[str] = "job.sh"
    #: Shell text within the script: the job's id, the task of an array from 0, the line that sets ``nodes``, a node's
    #: rank (a constant: torchrun starts on one node alone, more are refused), the address of a node as the scheduler
    #: knows it, and the command that submits the next job and prints its id.
    job_id: ClassVar[str]
    array_index: ClassVar[str | None] = None
    node_list: ClassVar[str] = "nodes=$(hostname -s 2>/dev/null || hostname)"
    node_rank: ClassVar[str] = "0"
    node_address: ClassVar[str] = "hostname -f 2>/dev/null || hostname"
    successor: ClassVar[str | None] = None
    #: Variables of the submitting shell that its commands would read as options, unset in the script.
    scrubbed: ClassVar[tuple[str, ...]] = ()

    def spans(self, style: str) -> bool:
        """The script can start ranks of ``style`` on several nodes: torchrun is told on each which node it is
        (``node_rank``).
        """
        return style != "torchrun" or self.node_rank != Backend.node_rank

    # ---- what stands in the script

    def directives(self, sub: Submission) -> list[Line]:
        """The lines that the scheduler reads."""
        return []

    def starter(self, sub: Submission) -> list[Line]:
        """The words of a command before the program of a rank or node, where the template starts processes through
        one.
        """
        return []

    def step_options(self, sub: Submission, container: Container | None, mounts: list[str]) -> list[Line]:
        """Options of the command that starts a step on all nodes, with the container that it enters."""
        return []

    def document(self, sub: Submission, script: str) -> str:
        """What the scheduler gets, made of the shell script: the script itself, or a document that carries it."""
        return script

    # ---- asking it

    @abstractmethod
    def submit(self, run_dir: Path, *, test_only: bool = False) -> str:
        """Submit the script of a run folder and return the job's id; raises RunFailed with the scheduler's own
        words.
        """

    @abstractmethod
    def query(self, job: str) -> Job | None:
        """What it knows about a job now; None where it knows nothing any more. Raises RunFailed where it does not
        answer.
        """

    @abstractmethod
    def cancel(self, job: str) -> None:
        """End a job, or take it out of the queue."""

    def run(self, run_dir: Path) -> int:
        """Run the script of a run folder in the foreground; exit code as the command line's. Only where ``batch`` is
        False.
        """
        raise UserError(f"{self.title} takes jobs, it runs none in the foreground", where=f"--backend {self.name}")

    def jobs_of(self, run_dir: Path) -> list[str] | None:
        """Ids of your jobs that were submitted with the script of this run folder and are not forgotten yet; None where
        it cannot be asked that.
        """
        return None

    def accounting(self, job: str) -> dict[str, str] | None:
        """What its accounting says of a job; None where there is none."""
        return None

    def failed_nodes(self, nodes: str | None) -> list[str]:
        """Nodes of a list that it sees as down; none where it cannot be asked."""
        return []

    def task_job(self, job: str, task: int) -> str:
        """The id of one task of an array's job."""
        return job if "_" in job else f"{job}_{task}"

    def missing_programs(self) -> list[str]:
        """Commands that are not on this machine, without which nothing can be submitted."""
        return [program for program in self.programs if shutil.which(program) is None]

    def missing_starter(self) -> tuple[str, str] | None:
        """What this machine lacks to start ranks in the foreground, and the fix."""
        return None


#: Backends by name, each registered by its own module.
REGISTERED: dict[str, Backend] = {}
_Class = TypeVar("_Class", bound=type[Backend])


def register(cls: _Class) -> _Class:
    """Decorator: the class is a backend from now on, under its ``name``."""
    REGISTERED[cls.name] = cls()
    return cls
