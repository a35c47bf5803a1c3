"""Builds engines of a model folder on two ranks and counts what each rank allocates while the weights are read.

python loading.py CASES.json OUT.json      with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "checkpoint"), str(TESTS / "parallel")]


def run_case(case: dict[str, Any], world) -> dict[str, Any]:
    import torch.distributed as dist
    from exporting import loading_counted

    from aifactory_train.config.loading import load_recipe
    from aifactory_train.run.folder import RunFolder
    from aifactory_train.run.outcome import Attempt
    from aifactory_train.training.stopping import StopChannels
    from aifactory_train.training.trainer import Trainer

    held: dict[str, int] = {}
    recipe = load_recipe(case["recipe"], case["overrides"])
    run = RunFolder(Path(case["run"]))
    run.path.mkdir(parents=True, exist_ok=True)
    with Attempt(run, world.rank, world.local_rank, 1, timeout_s=120) as attempt:
        with loading_counted(held, Path(case["base"])):
            trainer = Trainer(recipe, run, world, StopChannels(None), attempt, None, None, True)
        losses = [trainer.train_step()["loss"] for _ in range(3)]
    everyone: list[Any] = [None] * world.size
    dist.all_gather_object(everyone, held)
    return {"losses": losses, "held": everyone, "loading": [line for line in trainer.report.lines if "loading" in line]}


if __name__ == "__main__":
    import ranks

    ranks.main(run_case, 300)
