"""Legs of runs: train from a checkpoint (or the start) up to a step, saving on the way. One process per rank.

python legs.py LEGS.json OUT.json      with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set

A leg is ``{"folder", "to", "every", "resume", "asynchronous", ...}`` plus a case of ``tests/parallel/curves.py``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "parallel")]

import curves  # noqa: E402


def run_legs(ranks: int, legs: list[dict[str, Any]], folder: Path, timeout: float = 540) -> list[dict[str, Any]]:
    """Per leg ``{"losses": {step: loss}, "norms": …, "resumed": step or None}`` as rank 0 saw them."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted, found = folder / f"legs-{ranks}.json", folder / f"out-{ranks}.json"
    found.unlink(missing_ok=True)
    wanted.write_text(json.dumps(legs))
    curves.start_ranks(Path(__file__), ranks, str(wanted), str(found), timeout=timeout)
    return json.loads(found.read_text())


def run_leg(leg: dict[str, Any], world) -> dict[str, Any]:
    import torch

    from aifactory_train.core.errors import UserError
    from aifactory_train.training.checkpoint import Checkpointer

    case = {**leg, "train": {"seed": 3, **leg.get("train", {})}}
    engine = curves.build(case, world)
    recipe = engine.recipe
    recipe.checkpoint.keep = leg.get("keep", 10)
    recipe.checkpoint.asynchronous = leg.get("asynchronous", False)
    torch.manual_seed(1000 + world.rank)  # dropout
    checkpointer = Checkpointer(Path(leg["folder"]), recipe, engine, world)
    if leg.get("file_limit") and world.rank == 1:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (leg["file_limit"], resource.RLIM_INFINITY))
    step, out = 0, {"losses": {}, "norms": {}, "resumed": None}
    try:
        checkpointer.prepare()
        if leg.get("resume"):
            found = checkpointer.choose(None if leg["resume"] is True else leg["resume"])
            if found is not None:
                step = checkpointer.load(found)["step"]
                out["resumed"] = step
        while step < leg["to"]:
            out["losses"][step], out["norms"][step] = curves.train_step(engine, case, world, step)
            step += 1
            if step % leg.get("every", leg["to"]) == 0 or step == leg["to"]:
                checkpointer.save(step, {"cursor": step}, wait=False)
        checkpointer.wait()
    except UserError as error:
        out["error"] = str(error)
    return out


if __name__ == "__main__":
    import ranks

    ranks.main(run_leg, 120)
