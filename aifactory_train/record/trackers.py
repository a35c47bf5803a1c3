"""Trackers besides TensorBoard: MLflow's file store and Weights & Biases in offline mode, both inside the run folder.

Nothing is sent anywhere: neither tracker is given an address, telemetry is switched off, and neither collects code,
hardware or the command line. ``mlflow ui --backend-store-uri RUN/mlruns`` and ``wandb sync RUN/wandb/offline-run-*``
show or send what lies there, when a person decides to. An error of a tracker never ends a training.
"""

from __future__ import annotations

import importlib
import math
import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from aifactory_train.core.errors import UserError
from aifactory_train.record.events import Evaluated, Event, RunEnded, RunStarted, StepDone
from aifactory_train.record.files import without_samples

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.run.folder import RunFolder

_NEEDS = "pip install -c constraints.txt 'aifactory-train[tracking]'"


class Trackers:
    """Listens to a run (rank 0) and hands its figures to the trackers that the recipe asks for."""

    def __init__(self, run: RunFolder, recipe: Recipe, failed: Callable[[str, BaseException], None]):
        self._every, self._open = recipe.logging.every_steps, lambda: open_trackers(run, recipe, failed)
        self._trackers: list[Any] = []

    def hear(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self._trackers = self._open()
        for tracker in self._trackers:
            if isinstance(event, StepDone) and int(event.metrics["step"]) % self._every == 0:
                tracker.log(event.metrics)
            elif isinstance(event, Evaluated):
                tracker.log({**without_samples(event.figures), "kind": "eval", "step": event.step})
            elif isinstance(event, RunEnded):
                tracker.finish(event.state)


def open_trackers(run: RunFolder, recipe: Recipe, failed: Callable[[str, BaseException], None]) -> list[Any]:
    """The trackers that the recipe asks for (rank 0 only). A missing package is a :class:`UserError`: it was asked
    for.
    """
    found: list[Any] = []
    kinds = [(recipe.tracking.mlflow, MLflow), (recipe.tracking.wandb, WandB)]
    for wanted, kind in kinds:
        if wanted:
            found.append(_Guarded(kind(run, recipe), failed))
    return found


def check(recipe: Recipe) -> None:
    """Refuse before any work what cannot be done: a package that is not here."""
    import importlib.util

    for wanted, name in ((recipe.tracking.mlflow, "mlflow"), (recipe.tracking.wandb, "wandb")):
        if wanted and importlib.util.find_spec(name) is None:
            raise UserError(f"the package '{name}' is not installed", where=f"tracking.{name}", fix=_NEEDS)


class _Guarded:
    """A tracker whose errors are said once and end nothing."""

    def __init__(self, tracker: Any, failed: Callable[[str, BaseException], None]):
        self._tracker, self._failed = tracker, failed

    def log(self, record: dict[str, Any]) -> None:
        self._try("log", numbers(record), int(record.get("step", 0)), str(record.get("kind", "train")))

    def finish(self, state: str) -> None:
        self._try("finish", state)

    def _try(self, method: str, *arguments: Any) -> None:
        try:
            getattr(self._tracker, method)(*arguments)
        except Exception as error:
            self._failed(f"tracker {type(self._tracker).__name__}", error)


def numbers(record: dict[str, Any]) -> dict[str, float]:
    """The finite figures of a metrics record."""
    return {
        key: float(value)
        for key, value in record.items()
        if key != "step" and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def parameters(recipe: Recipe) -> dict[str, str]:
    """What trackers show as the run's settings: the training block and the model, no data and no paths of data."""
    tree = recipe.model_dump(mode="json")
    found = {"recipe": recipe.id, "model.base": recipe.model.base}
    for block in ("adapter", "train", "precision", "parallel"):
        found |= {f"{block}.{key}": str(value) for key, value in tree[block].items() if value is not None}
    return found


def _package(module: str) -> Any:
    name = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"the package '{name}' is not installed", where=f"tracking.{name}", fix=_NEEDS) from None


class MLflow:
    """One MLflow run in ``RUN/mlruns``."""

    def __init__(self, run: RunFolder, recipe: Recipe):
        os.environ.update(MLFLOW_ALLOW_FILE_STORE="true", MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")
        entities = _package("mlflow.entities")
        self._metric = entities.Metric
        self._client = _package("mlflow.tracking").MlflowClient(tracking_uri=(run.path / "mlruns").resolve().as_uri())
        experiment = self._client.get_experiment_by_name(recipe.tracking.experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(recipe.tracking.experiment)
        name = run.path.resolve().name
        # A resumed run goes on in the MLflow run of the attempt before it.
        earlier = self._client.search_runs([number], f"tags.mlflow.runName = '{name}'") if experiment else []
        if earlier:
            self._run = earlier[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._client.create_run(number, run_name=name).info.run_id
        self._client.log_batch(self._run, params=[entities.Param(k, v[:500]) for k, v in parameters(recipe).items()])

    def log(self, values: dict[str, float], step: int, kind: str) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(
            self._run, metrics=[self._metric(f"{kind}/{k}", v, now, step) for k, v in values.items()]
        )

    def finish(self, state: str) -> None:
        self._client.set_terminated(self._run, {"finished": "FINISHED", "stopped": "KILLED"}.get(state, "FAILED"))


class WandB:
    """One offline W&B run in ``RUN/wandb``; each attempt is a file of its own under the same id."""

    def __init__(self, run: RunFolder, recipe: Recipe):
        os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true", DO_NOT_TRACK="true")
        wandb = _package("wandb")
        folder = str(run.path.resolve())
        settings = wandb.Settings(
            mode="offline",
            root_dir=folder,
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
        )
        name = run.path.resolve().name
        self._run = wandb.init(
            project=recipe.tracking.experiment,
            name=name,
            id="".join(c if c.isalnum() or c in "-_" else "-" for c in name),
            dir=folder,
            mode="offline",
            settings=settings,
            config=parameters(recipe),
        )

    def log(self, values: dict[str, float], step: int, kind: str) -> None:
        self._run.log({f"{kind}/{k}": v for k, v in values.items()}, step=step)

    def finish(self, state: str) -> None:
        self._run.finish(exit_code=0 if state in ("finished", "stopped") else 1)
