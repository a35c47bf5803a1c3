"""What Slurm's accounting says was used: every instance of every job, also those before a requeue."""

from __future__ import annotations

import datetime
import re
import shutil
import subprocess
from dataclasses import dataclass

from aifactory_train.core.errors import UserError

#: Columns, in this order. ``-X``: allocations, not their steps (whose hours are the same ones again); ``-D``: also the
#: instances that a requeue or a lost node ended; ``-T``: time outside the window does not count.
COLUMNS = (
    "JobIDRaw",
    "JobID",
    "Account",
    "State",
    "Start",
    "End",
    "ElapsedRaw",
    "NNodes",
    "AllocTRES",
    "Partition",
    "QOS",
)
COMMAND = ("sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", f"--format={','.join(COLUMNS)}")


@dataclass(frozen=True)
class JobUse:
    """One instance of a job. ``state``: Slurm's first word, such as NODE_FAIL; ``array``: the id that was submitted."""

    job: str
    array: str
    account: str
    state: str
    start: str
    seconds: float
    nodes: int
    gpus: int
    partition: str
    qos: str

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.gpus / 3600

    @property
    def node_hours(self) -> float:
        return self.seconds * self.nodes / 3600


def ask(
    since: datetime.date, until: datetime.date | None, account: str | None, user: str | None
) -> list[JobUse] | None:
    """The jobs of an account (of all its users, as far as the site shows them), else of a user; None where there is no
    sacct here. Raises :class:`UserError` where it fails: no answer is not zero hours."""
    if shutil.which("sacct") is None:
        return None
    command = [*COMMAND, f"--starttime={since.isoformat()}", "--truncate"]
    command.append(f"--endtime={until.isoformat()}T23:59:59" if until else "--endtime=now")
    command += [f"--accounts={account}", "--allusers"] if account else []
    command += [f"--user={user}"] if user and not account else []
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"sacct gave no answer: {error}", where="sacct", fix="--records counts the run folders"
        ) from None
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()
        fix = "a project that you are a member of (--project); --records counts the run folders"
        raise UserError(f"sacct failed: {said[0][:200] if said else done.returncode}", where="sacct", fix=fix)
    return parse(done.stdout)


def parse(text: str) -> list[JobUse]:
    """The lines of :data:`COMMAND`; a line of another shape is refused, not skipped."""
    return [_use(line) for line in text.splitlines() if line.strip()]


def _use(line: str) -> JobUse:
    cells = line.strip().split("|")
    named = dict(zip(COLUMNS, cells, strict=False))
    if len(cells) != len(COLUMNS) or not named["ElapsedRaw"].isdigit() or not named["NNodes"].isdigit():
        raise UserError("sacct's answer has another shape than was asked for", where=f"sacct: {line[:120]}")
    return JobUse(
        job=named["JobIDRaw"],
        array=re.split(r"[_+]", named["JobID"])[0],
        account=named["Account"],
        state=named["State"].split()[0] if named["State"].strip() else "UNKNOWN",
        start=named["Start"],
        seconds=float(named["ElapsedRaw"]),
        nodes=int(named["NNodes"]),
        gpus=gpus_of(named["AllocTRES"]),
        partition=named["Partition"],
        qos=named["QOS"],
    )


def gpus_of(tres: str) -> int:
    """GPUs of ``AllocTRES`` (``cpu=56,gres/gpu=8,gres/gpu:mi250=8,node=1``): the plain count where there is one, else
    those of all types together."""
    plain, typed = 0, 0
    for name, value in re.findall(r"gres/gpu((?::[\w.-]+)?)=(\d+)", tres):
        if name:
            typed += int(value)
        else:
            plain = int(value)
    return plain or typed
