"""Whether the largest micro-batch fits, before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aifactory_train.parallel.memory_advice import explain_memory

if TYPE_CHECKING:
    from aifactory_train.training.trainer import Trainer


def probe_largest_batch(trainer: Trainer) -> None:
    """On a GPU, run the largest micro-batch once before the first step, so that running out of memory shows at once."""
    if trainer.world.device == "cpu":
        return
    lengths = trainer.data.train.lengths
    order = lengths.argsort()[::-1]
    budget, chosen = trainer.recipe.train.micro_batch_tokens, []
    for index in order:
        if int(lengths[index]) > budget:
            break
        chosen.append(int(index))
        budget -= int(lengths[index])
    with explain_memory(trainer.engine, trainer.recipe, trainer.world):
        trainer.engine.forward_backward(trainer.micro_batch(chosen or [int(order[0])]), 0.0, last=True)
    trainer.engine.discard()
