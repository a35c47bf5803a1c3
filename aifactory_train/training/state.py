"""What the loop itself keeps in a checkpoint (beside engine and random numbers), and how it goes on from it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from aifactory_train.config.schema import TrainConfig
from aifactory_train.core.errors import UserError
from aifactory_train.core.output import note
from aifactory_train.data import Cursor
from aifactory_train.data.digest import data_digest
from aifactory_train.parallel.world import from_main
from aifactory_train.training import identity
from aifactory_train.training.schedule import learning_rate

if TYPE_CHECKING:
    from aifactory_train.training.trainer import Trainer


def trainer_values(trainer: Trainer) -> dict[str, Any]:
    """Everything of the loop's own that is needed to go on from this step boundary, as JSON values."""
    return {
        "cursor": dataclasses.asdict(trainer.cursor),
        "data": data_digest(trainer.data.train),
        "total_steps": trainer.total_steps,
        "best": trainer.best.state(),
        "guard": trainer.guard.state(),
        "results": trainer.results,
    }


def restore(trainer: Trainer, step: int | None) -> None:
    """Go on from the checkpoint of ``step``.

    Raises :class:`UserError` if there is none (any more), if base model, tokenizer or rows are others than the run was begun with, if the learning rates of the steps already made
    would be others under this configuration, or if a finished run is not to be prolonged.
    """
    if step is None:
        raise UserError(
            "the checkpoint to go on from is gone",
            where=str(trainer.run.checkpoints),
            fix="is another process at work here?",
        )

    def same_rates(before: dict[str, Any]) -> bool:
        old, length = TrainConfig.model_validate(before["train"]), saved["total_steps"]
        now, total = trainer.recipe.train, trainer.total_steps
        return all(learning_rate(s, length, old) == learning_rate(s, total, now) for s in range(step))

    finished = trainer.run.state()["state"] == "finished"
    if step > trainer.total_steps or (finished and step == trainer.total_steps):
        done = "is finished after" if finished else "has made"
        raise UserError(
            f"the run {done} {step} steps, and {trainer.total_steps} are asked for",
            where="train.max_steps, train.epochs",
            fix=f"more than {step} steps (train.max_steps, train.epochs) prolong it, or --resume STEP goes back to an earlier checkpoint",
        )
    saved = trainer.checkpoints.values(step)
    if saved["data"] != data_digest(trainer.data.train):
        raise UserError(
            "the training rows are not those that the checkpoint counted",
            where="data.train",
            fix="restore the data, or start a new run (--run-dir NEW)",
        )
    trainer.checkpoints.load(step, same_rates=same_rates)
    for line in from_main(trainer.world, lambda: identity.check(trainer.run, trainer.recipe, trainer.inputs)):
        if trainer.world.is_main:
            note(line)
    trainer.checkpoints.leave_behind(step)
    trainer.step, trainer.cursor = step, Cursor(**saved["cursor"])
    trainer.best.load(saved["best"])
    trainer.results = saved["results"]
    trainer.guard.load(saved["guard"])
    if trainer.world.is_main:
        note(f"going on after step {step} of {trainer.total_steps}")
