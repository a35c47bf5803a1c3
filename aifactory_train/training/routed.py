"""What a step does about routers of experts: what they need before the first backward pass, what they did after it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aifactory_train.parallel.engine import DeviceBatch, Engine


def begin(engine: Engine, batches: list[DeviceBatch], tokens: int, units: int) -> None:
    """Before the micro-batches of a step with ``tokens`` real tokens, whose loss is divided by ``units``; collective.

    A model without experts, and one whose routers have no loss, costs nothing here.
    """
    routing = engine.core.routing
    if routing is not None:
        routing.begin(tokens, units)
        routing.count_before([functools.partial(engine.module, **batch.kwargs()) for batch in batches])


def figures(engine: Engine) -> dict[str, float]:
    """What routers did in the step, over all ranks (:meth:`aifactory_train.model.routing.Routing.figures`);
    collective.
    """
    routing = engine.core.routing
    return {} if routing is None else routing.figures()
