"""Several ranks on this machine: ``python -m aifactory_train.acceptance.ranks MODULE:FUNCTION SETTINGS.json`` is one of
them."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

from aifactory_train.acceptance import processes


def run(where: str, size: int, work: Path, seconds: float, settings: dict[str, Any], *, fork: bool) -> list[Any]:
    """What ``where`` (``module:function`` of ``(world, settings)`` in this room) returned on each rank. Raises
    RuntimeError where one failed or did not end."""
    given = settings_file(work, settings)
    with processes.port() as number:
        started = processes.Started(processes.RANK, [where, given], size, work, number, fork=fork)
        codes = started.wait(seconds, first_failure_ends=5)
    for rank, code in enumerate(codes):
        if code != 0:
            what = "did not end" if code is None else f"ended with {code}"
            raise RuntimeError(f"rank {rank} {what}: {processes.end_of(started.logs[rank])}")
    return [json.loads((work / f"found-{rank}.json").read_text(encoding="utf-8")) for rank in range(size)]


def settings_file(work: Path, settings: dict[str, Any]) -> Path:
    work.mkdir(parents=True, exist_ok=True)
    given = work / "settings.json"
    given.write_text(json.dumps({**settings, "out": str(work)}), encoding="utf-8")
    return given


def main(argv: list[str]) -> int:
    """One rank."""
    from aifactory_train.parallel.world import join_world, leave_alone, leave_world, leaves_alone

    where, given = argv
    settings = json.loads(Path(given).read_text(encoding="utf-8"))
    module, _, function = where.partition(":")
    world = join_world(int(settings.get("timeout_s", 60)), threads=1)
    try:
        found = getattr(importlib.import_module(f"aifactory_train.acceptance.{module}"), function)(world, settings)
        (Path(settings["out"]) / f"found-{world.rank}.json").write_text(json.dumps(found), encoding="utf-8")
    except BaseException as error:
        if leaves_alone(world):
            sys.excepthook(type(error), error, error.__traceback__)
            leave_alone(1)
        raise
    finally:
        leave_world()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
