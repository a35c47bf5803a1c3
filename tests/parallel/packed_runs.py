"""Trainings on a 4-bit base, one after the other in one process group (run by ``test_packed_runs.py``).

python packed_runs.py CASES.json OUT.json      with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(TESTS), str(TESTS / "parallel")]


def weights(trainer: Any) -> dict[str, Any]:
    """Digest of all unpacked weights, parameters that are packed, and bytes of them on this rank."""
    import torch
    from torch.distributed.tensor import DTensor

    from aifactory_train.model.packed import PackedLinear

    found, values, held = hashlib.sha256(), 0, 0
    for module in trainer.engine.core.modules():
        if isinstance(module, PackedLinear):
            weight = module.weight
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            unpacked = module.packing.dequantise(whole.detach())
            found.update(unpacked.contiguous().view(torch.uint8).numpy().tobytes())
            values += unpacked.numel()
            held += (weight.to_local() if isinstance(weight, DTensor) else weight).numel()
    return {"unpacked": found.hexdigest(), "values": values, "held": held}


def flip(trainer: Any, rank: int) -> str:
    """Another byte in the middle of what ``rank`` holds of one weight; the weight's name."""
    from torch.distributed.tensor import DTensor

    name, weight = next((n, p) for n, p in trainer.engine.core.named_parameters() if "up_proj.base_layer.weight" in n)
    if trainer.world.rank == rank:
        local = weight.to_local() if isinstance(weight, DTensor) else weight.data
        local[len(local) // 2] ^= 8
    return name


def run_case(case: dict[str, Any], world: Any) -> dict[str, Any]:
    import torch.distributed as dist

    from aifactory_train.config.loading import load_recipe
    from aifactory_train.core.errors import RunFailed
    from aifactory_train.run.folder import RunFolder
    from aifactory_train.run.outcome import Attempt
    from aifactory_train.training.stopping import StopChannels
    from aifactory_train.training.trainer import Trainer

    recipe = load_recipe(case["recipe"], case["overrides"])
    run = RunFolder(Path(case["run"]))
    run.path.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"losses": [], "error": ""}
    with Attempt(run, world.rank, world.local_rank, 1, timeout_s=120) as attempt:
        start = case.get("from")
        resume = "auto" if start is not None else None
        trainer = Trainer(recipe, run, world, StopChannels(None), attempt, resume, start, True)
        found |= {"digest": trainer.frozen.digest, "resumed": trainer.step, **weights(trainer)}
        if case.get("export"):
            found["code"] = trainer.run_to_end()
            return found
        while trainer.step < case["to"]:
            found["losses"].append(trainer.train_step()["loss"])
        if case.get("flip") is not None:
            found["flipped"] = flip(trainer, case["flip"])
        try:
            trainer._save(wait=True)
        except RunFailed as error:
            found["error"] = str(error)
        trainer.ahead.close()
    held: list[Any] = [None] * world.size
    dist.all_gather_object(held, found["held"])
    return {**found, "held": held}


if __name__ == "__main__":
    import ranks

    ranks.main(run_case, 300)
