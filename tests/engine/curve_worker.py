"""Trains the same rows under many settings inside one process group and writes each case's curve as JSON.

Started by test_curve.py, directly for one rank and by torchrun for several. ``bug`` plants a known mistake of other
frameworks, so that the test can prove that it would notice. ``again_from``: the steps after that one are made a second
time, by a trainer that goes on from its checkpoint; they are appended to the curve.
"""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

from aifactory_train.config.loading import load_recipe
from aifactory_train.parallel.world import join_world, leave_world
from aifactory_train.run.folder import RunFolder
from aifactory_train.run.outcome import Attempt
from aifactory_train.training.stopping import StopChannels
from aifactory_train.training.trainer import Trainer


def plant(trainer: Trainer, bug: str) -> None:
    """Replace the engine's forward/backward by one with a known mistake."""
    engine, right = trainer.engine, trainer.engine.forward_backward

    def wrong(batch: Any, scale: float, last: bool) -> Any:
        if bug == "times_world_size":
            return right(batch, scale * trainer.world.size, last)
        if bug == "mean_of_means":
            own = max(1, batch.targets.numel())
            return right(batch, 1.0 / (own * trainer.world.size * trainer.recipe.train.grad_accum), last)
        if bug == "last_only":
            return right(batch, scale if last else 0.0, last)
        raise ValueError(bug)

    engine.forward_backward = wrong  # type: ignore[method-assign]


def curve(case: dict[str, Any], folder: Path) -> list[dict[str, float]]:
    world = join_world(120, 1)
    recipe = load_recipe(case["recipe"], case["overrides"])
    run = RunFolder(folder / case["name"])
    run.path.mkdir(parents=True, exist_ok=True)
    again = case.get("again_from")
    with Attempt(run, world.rank, world.local_rank, 1, timeout_s=120) as attempt:
        trainer = Trainer(recipe, run, world, StopChannels(None), attempt, None, None, True)
        if case.get("bug"):
            plant(trainer, case["bug"])
        records = []
        for step in range(1, case["steps"] + 1):
            records.append(trainer.train_step())
            if step == again:
                trainer._save(wait=True)
        if again:
            trainer = Trainer(recipe, run, world, StopChannels(None), attempt, None, again, True)
            records += [trainer.train_step() for _ in range(case["steps"] - again)]
    del trainer
    gc.collect()  # DeepSpeed's engines are cycles: every rank drops this one here, not in the middle of the next case
    return [{k: record[k] for k in ("loss", "grad_norm", "micro_batches", "rows", "tokens")} for record in records]


def main(job: Path, out: Path) -> None:
    cases = json.loads(job.read_text())
    results = {case["name"]: curve(case, out.parent / f"runs-{out.stem}") for case in cases}
    if join_world().is_main:
        out.write_text(json.dumps(results))
    leave_world()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
