"""What the programs have in common that tests start once per rank (``python PROGRAM.py CASES.json OUT.json``)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main(run: Callable[[dict[str, Any], Any], dict[str, Any]], timeout_s: int) -> None:
    """Join the ranks, run every case of the first argument one after the other, and write what rank 0 found to the
    second.

    Args:
        run: called as ``run(case, world)`` on every rank.
        timeout_s: seconds that a collective may take.
    """
    import torch.distributed as dist

    from aifactory_train.parallel.world import join_world, leave_world

    world = join_world(timeout_s, threads=1)
    found = []
    for case in json.loads(Path(sys.argv[1]).read_text()):
        found.append(run(case, world))
        dist.barrier()
        if world.is_main:  # after each case: where ranks hang, the file says how far they came
            Path(sys.argv[2]).write_text(json.dumps(found))
    leave_world()
