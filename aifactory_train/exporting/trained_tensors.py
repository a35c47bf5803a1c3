"""The tensors that a training left: of a live engine, or of a checkpoint."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.core.output import note
from aifactory_train.exporting.gate import (
    is_plain_fp32,
)
from aifactory_train.exporting.place import named
from aifactory_train.exporting.streaming import Scratch
from aifactory_train.model.causal_lm import CausalLM
from aifactory_train.model.weight_files import Source
from aifactory_train.private import vault
from aifactory_train.run.folder import RunFolder

if TYPE_CHECKING:
    from aifactory_train.parallel.engine import Engine


@contextlib.contextmanager
def trained_by(engine: Engine, run: RunFolder) -> Iterator[tuple[Source | None, CausalLM | None]]:
    """``(trained tensors, the model)`` of a live engine, on rank 0. Collective.

    Where every rank has whole fp32 parameters on the CPU they are read in place. Otherwise they are sent to rank 0 one
    by one, which puts them into a file beside the exports; the model is None then.
    """
    from aifactory_train.parallel.world import from_main

    if is_plain_fp32(engine.core):
        names = {n: p.detach() for n, p in engine.core.named_parameters() if p.requires_grad}
        yield names, engine.core
        return
    world = engine.world  # type: ignore[attr-defined]
    kept: dict[str, torch.Tensor] = {}  # instead of the file where nothing plain may reach the disk
    made: list[Scratch] = []
    trouble: list[RunFailed] = []

    def make() -> None:
        with named(run.export, "the trained weights cannot be collected"):
            run.export.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=run.export, prefix=".trained-")
            os.close(handle)
            made.append(Scratch(Path(name)))

    def take(name: str, tensor: torch.Tensor) -> None:
        if not made:
            kept[name] = tensor
            return
        with named(run.export, "the trained weights cannot be collected"):
            made[0].put(name, tensor)

    def check() -> None:
        if trouble:
            raise trouble[0]

    try:
        if not vault.seals():
            from_main(world, make)
        for name, tensor in engine.full_parameters(trained_only=True):
            if tensor is not None and not trouble:  # after a failure the others must still be able to send
                try:
                    take(name, tensor)
                except RunFailed as error:
                    trouble.append(error)
            del tensor
        from_main(world, check)
        yield (made[0] if made else kept), None
    finally:
        for scratch in made:
            scratch.close()


class _Means(Mapping[str, torch.Tensor]):
    """Of the weights in a checkpoint the mean that was kept of them, each made when it is asked for: what ``mean_of``
    makes of a parameter and of what lies ``beside`` it."""

    def __init__(self, folder: Path, beside: str, mean_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        from aifactory_train.parallel.storage import StoredParameters

        self.weights, self.beside = StoredParameters(folder), StoredParameters(folder, f"optimizer/{beside}/")
        self.mean_of = mean_of

    def __getitem__(self, name: str) -> torch.Tensor:
        weights = self.weights[name]
        if name not in self.beside.entries:  # never stepped
            return weights
        return self.mean_of(weights, self.beside[name]).to(weights.dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)


def judged(folder: Path) -> Source:
    """The weights of the checkpoint in ``folder`` that an evaluation after its step sees."""
    from aifactory_train.config.schema import TrainConfig
    from aifactory_train.parallel.averaging import AVERAGE
    from aifactory_train.parallel.schedule_free import averaged
    from aifactory_train.parallel.storage import StoredParameters, read_tree

    settings = TrainConfig.model_validate(read_tree(folder, "trainer.json")["config"]["train"])
    if settings.optimizer == "schedule_free_adamw":
        return _Means(folder, "z", lambda y, z: averaged(y, z, settings.betas[0]))
    if settings.average is not None:
        return _Means(folder, AVERAGE, lambda _, mean: mean)
    return StoredParameters(folder)


def trained_before(run: RunFolder, merge: bool, step: int | None) -> Source | None:
    """Trained tensors of a checkpoint (``step``, or the newest good one of a run without an export); None: use the
    exported adapter. Raises when there is nothing to export or nothing to do."""
    if step is None and vault.holds(run.export / "adapter" / "adapter_model.safetensors"):
        if merge:
            return None
        raise UserError(
            "the adapter is exported already",
            where=str(run.export / "adapter"),
            fix="--merge writes merged weights, --step N exports another checkpoint",
        )
    if step is None and (run.export / "model" / "config.json").is_file():
        raise UserError(
            "this run trained all weights and its export is whole already",
            where=str(run.export / "model"),
            fix="use that folder with any tool that reads transformers models, or --step N for another checkpoint",
        )
    from aifactory_train.parallel.storage import faults

    known = run.complete_checkpoints()
    if step is not None and step not in known:
        raise UserError(
            f"no complete checkpoint of step {step}",
            where="--step",
            fix=f"there are: {', '.join(map(str, known))}" if known else "this run has none",
        )
    found: list[str] = []
    for number in [step] if step is not None else reversed(known):
        folder = run.checkpoints / f"step-{number}"
        trouble = faults(folder)
        if not trouble:
            note(f"exporting the checkpoint of step {number}")
            return judged(folder)
        found += trouble
    if found:
        raise UserError("damaged: " + "; ".join(found), where=str(run.checkpoints))
    raise UserError(
        "this run has exported nothing yet and has no checkpoint",
        where=str(run.path),
        fix="let it finish: the export follows the last step",
    )
