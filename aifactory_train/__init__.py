"""aifactory-train: fine-tune language models on Europe's AI Factories.

A recipe says what to train, a site says where, and everything between them is derived, shown and checked before a GPU
hour is spent. From Python::

    import aifactory_train as af

    recipe = af.recipe("acme/tickets", data=[{"prompt": "…", "completion": "…"}, …], licence="own")
    run = af.train(recipe, name="tickets")
    print(run.verdict.sentence)

Every name of :data:`__all__` is stable: docs/python.md lists them with the rule by which one may go. Nothing heavy is
imported before one of them is used.
"""

import importlib as _importlib
import os as _os
from typing import TYPE_CHECKING as _TYPE_CHECKING

__version__ = "0.1.0"

# A child of a process whose privacy profile closed the way out: closed here, too, before anything else is imported.
if "AIFACTORY_EGRESS_NODES" in _os.environ:
    from aifactory_train.private import egress as _egress

    _egress.close(_os.environ[_egress.VARIABLE].split(","))

if _TYPE_CHECKING:
    from aifactory_train.api.machines import Launched, Plan, SitesRanked, Systems, launch, plan, systems, where
    from aifactory_train.api.models import LoadedModel, export, load
    from aifactory_train.api.preparing import PreparedRows, prepare, recipe
    from aifactory_train.api.results import Evaluation, TrainedRun, evaluate
    from aifactory_train.api.running import train
    from aifactory_train.config.schema import Recipe
    from aifactory_train.core.errors import RunFailed, UserError
    from aifactory_train.evaluation.verdict import Verdict
    from aifactory_train.record.events import (
        Evaluated,
        Event,
        Exported,
        Incident,
        PhaseBegan,
        RunEnded,
        RunStarted,
        Saved,
        StepDone,
        VerdictReached,
    )

#: Stable name -> the module below this package that holds it.
_STABLE = {
    **dict.fromkeys(("recipe", "prepare", "PreparedRows"), "api.preparing"),
    **dict.fromkeys(
        ("systems", "plan", "where", "launch", "Systems", "Plan", "SitesRanked", "Launched"), "api.machines"
    ),
    "train": "api.running",
    **dict.fromkeys(("evaluate", "Evaluation", "TrainedRun"), "api.results"),
    **dict.fromkeys(("load", "export", "LoadedModel"), "api.models"),
    "Recipe": "config.schema",
    "Verdict": "evaluation.verdict",
    **dict.fromkeys(("UserError", "RunFailed"), "core.errors"),
    **dict.fromkeys(
        (
            "Event",
            "PhaseBegan",
            "RunStarted",
            "StepDone",
            "Evaluated",
            "Incident",
            "Saved",
            "Exported",
            "VerdictReached",
        ),
        "record.events",
    ),
    "RunEnded": "record.events",
}

__all__ = [
    "Evaluated",
    "Evaluation",
    "Event",
    "Exported",
    "Incident",
    "Launched",
    "LoadedModel",
    "PhaseBegan",
    "Plan",
    "PreparedRows",
    "Recipe",
    "RunEnded",
    "RunFailed",
    "RunStarted",
    "Saved",
    "SitesRanked",
    "StepDone",
    "Systems",
    "TrainedRun",
    "UserError",
    "Verdict",
    "VerdictReached",
    "evaluate",
    "export",
    "launch",
    "load",
    "plan",
    "prepare",
    "recipe",
    "systems",
    "train",
    "where",
]


def __getattr__(name: str) -> object:
    place = _STABLE.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(_importlib.import_module(f"{__name__}.{place}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
