"""Trains two steps, saves, and exports twice: from the live engine on all ranks, and from the checkpoint on one.

python exporting.py CASES.json OUT.json      with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set

The largest set of tensors alive during an export is counted by torch's own allocator (the profiler's memory events).
Mappings of whole files are told by their size and left out, as they hold nothing; instead, tensors read from them are
copied and counted.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from aifactory_train.model.weight_files import TensorFiles

sys.path[:0] = [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent.parent / "parallel")]


@contextlib.contextmanager
def counted(out: dict[str, int], key: str, folders: list[Path]):
    """``out[key]``: the largest number of bytes that were allocated within it and not freed yet, at any moment.

    ``folders``: where mapped files lie.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        torch.empty(25, dtype=torch.uint8)  # something to count, whatever follows
        yield
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events, "the profiler counts no memory"
    mapped = {path.stat().st_size for folder in folders for path in folder.rglob("*.safetensors")}
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        if abs(event.nbytes()) not in mapped:
            held += event.nbytes()
        most = max(most, held)
    out[key] = most


@contextlib.contextmanager
def loading_counted(out: dict[str, int], base: Path):
    """What a rank allocates while a sharded engine reads the weights below ``base``, by function."""
    from aifactory_train.parallel import deepspeed, materialise

    places: list[tuple[Any, str]] = [
        (materialise, "to_memory"),
        (materialise, "load_rows"),
        (deepspeed, "partition_while_reading"),
    ]
    real = [getattr(module, name) for module, name in places]

    def counting(function: Any, name: str) -> Any:
        def call(*args: Any) -> Any:
            with counted(out, name, [base]):
                return function(*args)

        return call

    for (module, name), function in zip(places, real, strict=True):
        setattr(module, name, counting(function, name))
    try:
        yield
    finally:
        for (module, name), function in zip(places, real, strict=True):
            setattr(module, name, function)


def run_case(case: dict[str, Any], world) -> dict[str, Any]:
    import torch.distributed as dist

    from aifactory_train.config.loading import load_recipe
    from aifactory_train.exporting import trained_model
    from aifactory_train.exporting import writer as export
    from aifactory_train.run.folder import RunFolder
    from aifactory_train.run.outcome import Attempt
    from aifactory_train.training.stopping import StopChannels
    from aifactory_train.training.trainer import Trainer

    read = TensorFiles.__getitem__
    TensorFiles.__getitem__ = lambda self, name: read(self, name).clone()  # type: ignore[method-assign]
    export.MAX_SHARD_BYTES = trained_model.MAX_BLOCK_BYTES = case["shard"]
    recipe = load_recipe(case["recipe"], case["overrides"])
    run = RunFolder(Path(case["run"]))
    run.path.mkdir(parents=True, exist_ok=True)
    held: dict[str, int] = {}
    out: dict[str, Any] = {}
    with Attempt(run, world.rank, world.local_rank, 1, timeout_s=120) as attempt:
        read_in: dict[str, int] = {}
        with loading_counted(read_in, Path(recipe.model.base)):
            trainer = Trainer(recipe, run, world, StopChannels(None), attempt, None, None, True)
        if read_in:
            held["loading"] = sum(read_in.values())
        for _ in range(2):
            trainer.train_step()
        trainer._save(wait=True)
        if world.is_main:
            run.save_config(recipe)
        places = [run.path, Path(recipe.model.base)]
        more = {"tokenizer": trainer.tokenizer, "data": trainer.data, "recipe": recipe}
        with counted(held, "live", places):
            export.export_run(run, merge=case["merge"], dtype="fp32", engine=trainer.engine, verify=False, **more)
        if world.is_main:
            live = run.export.rename(run.path / "live")
            with counted(held, "stored", places):
                export.export_run(run, merge=case["merge"], dtype="fp32", verify=False, step=2, **more)
            run.export.rename(run.path / "stored")
            out["gate"] = export.export_run(run, merge=case["merge"], verify=True, step=2, **more)["gate"]
            out["live"] = str(live)
        whole = sum(p.numel() * 4 for n, p in trainer.engine.core.named_parameters())
        if recipe.parallel.engine == "zero3":
            whole = sum(p.ds_numel * 4 for p in trainer.engine.core.parameters())
        out["whole"] = whole
        everyone: list[Any] = [None] * world.size
        dist.all_gather_object(everyone, held)
        out["held"] = everyone
    return out


if __name__ == "__main__":
    import ranks

    ranks.main(run_case, 300)
