"""Grammars of batch directives: what Slurm, PBS Pro and Torque accept behind ``#SBATCH`` and ``#PBS``, as far as
scripts of this project may use it. For Slurm a real controller judges too; for the other two this is the only judge,
and it says so.

Sources: the sbatch manual (Slurm 22.05 to 25.05); the PBS Professional 2022.1 Reference Guide, qsub and pbs_resources;
the Torque 6.1 Administrator Guide, qsub and "Requesting resources".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from aifactory_train.core.errors import UserError

TIME = r"(\d+:)?\d{1,2}:\d{2}:\d{2}|\d+:\d{2}|\d+"
NAME = r"[A-Za-z0-9_][A-Za-z0-9_.+-]*"


@dataclass(frozen=True)
class Directive:
    line: int
    option: str
    value: str | None


def sbatch(script: str) -> list[Directive]:
    """The directives of a Slurm script. Refuses one behind the first command (Slurm would ignore it) and shell
    variables in one.
    """
    out = []
    for number, line in _lines(script, "#SBATCH"):
        found = re.fullmatch(r'#SBATCH (--[a-z][a-z-]*)(?:=("[^"]*"|\S+))?', line)
        if not found:
            raise UserError(f"not one option: {line}", where=f"line {number}")
        value = found.group(2)
        out.append(Directive(number, found.group(1), value.strip('"') if value else None))
    return out


def _lines(script: str, mark: str) -> Iterator[tuple[int, str]]:
    """``(number, line)`` of each directive; none may stand behind the first command or hold what a shell would
    expand.
    """
    body = False
    for number, line in enumerate(script.splitlines(), 1):
        if line.startswith(mark):
            if body:
                raise UserError("a directive behind the first command is ignored", where=f"line {number}")
            if "$" in line or "`" in line:
                raise UserError("a directive is not expanded by a shell", where=f"line {number}")
            yield number, line
        elif line.strip() and not line.startswith("#"):
            body = True


_PBS_OPTIONS = {
    "-N": r"[A-Za-z0-9_+.-]{1,236}",
    "-A": r"\S+",
    "-q": rf"{NAME}(@{NAME})?",
    "-j": r"oe|eo|n",
    "-o": r"[^\s:]+",
    "-e": r"[^\s:]+",
    "-r": r"y|n",
    "-J": r"\d+-\d+(:\d+)?",
    "-m": r"[abejn]+",
    "-M": r"\S+",
    "-W": r"\S+",
    "-l": None,
    "-V": "",
}


def pbspro(script: str) -> list[Directive]:
    """The directives of a PBS Pro script; refuses what the grammar of qsub and of ``select`` does not allow."""
    out = _pbs_lines(script, _PBS_OPTIONS)
    for d, name, value in _resources(out):
        if name == "select":
            _select(d, value)
        elif name == "walltime":
            if not re.fullmatch(r"\d+(:\d{2}){0,2}", value):
                raise UserError(f"walltime '{value}' is not HH:MM:SS (PBS knows no days)", where=f"line {d.line}")
        elif name == "place":
            if not re.fullmatch(
                r"(free|pack|scatter|vscatter)?(:?(excl|shared|exclhost))?(:?group=[A-Za-z0-9_]+)?", value
            ):
                raise UserError(f"'{value}' is no placement", where=f"line {d.line}")
        else:
            _other_resource(d, name, value)
    _once(out, ("-N", "-q", "-A", "-r", "-J"))
    return out


def _select(d: Directive, value: str) -> None:
    for chunk in value.split("+"):
        parts = chunk.split(":")
        start = 1 if re.fullmatch(r"\d+", parts[0]) else 0
        if start and int(parts[0]) < 1:
            raise UserError(f"a chunk of {parts[0]} nodes", where=f"line {d.line}")
        if start == 0 and "=" not in parts[0]:
            raise UserError(f"'{parts[0]}' is neither a number of chunks nor a resource", where=f"line {d.line}")
        seen = set()
        for part in parts[start:]:
            name, separator, amount = part.partition("=")
            if not separator or not re.fullmatch(NAME, name) or not re.fullmatch(r"[A-Za-z0-9_.+-]+", amount):
                raise UserError(f"'{part}' is not RESOURCE=VALUE", where=f"line {d.line}")
            if name in ("ncpus", "mpiprocs", "ompthreads", "ngpus") and not re.fullmatch(r"[1-9]\d*", amount):
                raise UserError(f"{name} must be a positive number, not '{amount}'", where=f"line {d.line}")
            if name == "mem" and not re.fullmatch(r"\d+([kmgtp]?[bw])?", amount, re.I):
                raise UserError(f"'{amount}' is no size", where=f"line {d.line}")
            if name in seen:
                raise UserError(f"{name} is given twice in one chunk", where=f"line {d.line}")
            seen.add(name)


_TORQUE_OPTIONS = {
    **{k: v for k, v in _PBS_OPTIONS.items() if k != "-J"},
    "-N": r"[A-Za-z][A-Za-z0-9_.+-]{0,14}",
    "-t": r"\d+(-\d+)?(,\d+(-\d+)?)*(%\d+)?",
}


def torque(script: str) -> list[Directive]:
    """The directives of a Torque script; refuses what qsub's and ``nodes=``'s grammar does not allow."""
    out = _pbs_lines(script, _TORQUE_OPTIONS)
    for d, name, value in _resources(out):
        if name == "nodes":
            _nodes(d, value)
        elif name == "select":
            raise UserError("'select' is PBS Pro's, Torque asks for nodes=", where=f"line {d.line}")
        elif name == "walltime":
            if not re.fullmatch(TIME, value):
                raise UserError(f"walltime '{value}' is no time", where=f"line {d.line}")
        elif name in ("mem", "pmem", "vmem", "pvmem", "file"):
            if not re.fullmatch(r"\d+([kmgt]?[bw])?", value, re.I):
                raise UserError(f"'{value}' is no size", where=f"line {d.line}")
        else:
            _other_resource(d, name, value)
    _once(out, ("-N", "-q", "-A", "-r", "-t"))
    return out


def _nodes(d: Directive, value: str) -> None:
    for chunk in value.split("+"):
        parts = chunk.split(":")
        if not re.fullmatch(r"[1-9]\d*|[A-Za-z][A-Za-z0-9_.-]*", parts[0]):
            raise UserError(f"'{parts[0]}' is neither a number of nodes nor a node's name", where=f"line {d.line}")
        for part in parts[1:]:
            if not re.fullmatch(r"(ppn|gpus|mics)=[1-9]\d*|[A-Za-z][A-Za-z0-9_.-]*(=\S+)?", part):
                raise UserError(f"'{part}' is no property of a node", where=f"line {d.line}")


def _pbs_lines(script: str, options: dict[str, str | None]) -> list[Directive]:
    out = []
    for number, line in _lines(script, "#PBS"):
        found = re.fullmatch(r"#PBS (-[A-Za-z])(?: (\S.*))?", line)
        if not found or found.group(1) not in options:
            raise UserError(f"not an option of qsub: {line}", where=f"line {number}")
        option, value = found.group(1), found.group(2)
        pattern = options[option]
        if pattern is not None and not re.fullmatch(pattern, value or ""):
            raise UserError(f"'{value}' is no value of {option}", where=f"line {number}")
        out.append(Directive(number, option, value))
    if not out:
        raise UserError("the script has no directive", where="line 1")
    return out


def _resources(found: list[Directive]) -> Iterator[tuple[Directive, str, str]]:
    """``(directive, name, value)`` of every resource that a ``-l`` asks for."""
    for directive in found:
        if directive.option == "-l":
            for resource in re.split(r",(?=[a-z_]+=)", directive.value or ""):
                name, _, value = resource.partition("=")
                yield directive, name, value


def _other_resource(d: Directive, name: str, value: str) -> None:
    if not re.fullmatch(NAME, name) or not re.fullmatch(r"\S+", value):
        raise UserError(f"'{name}={value}' is no resource request", where=f"line {d.line}")


def _once(found: list[Directive], options: tuple[str, ...]) -> None:
    for option in options:
        hits = [d for d in found if d.option == option]
        if len(hits) > 1:
            raise UserError(f"{option} is given twice", where=f"line {hits[1].line}")
