"""The reference of DPO and KTO: log-probabilities under the model as it is before the first step.

For a fresh adapter that model is the base (the adapter adds nothing yet), for ``model.start_from`` the earlier run, for
a full fine-tuning the weights it starts from. It does not change, so its log-probabilities are computed once for the
documents that the run will use, and lie in the run folder; a resumed run reads them, because its model is another one
by then. No second model is held in memory, and no step pays for one.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from aifactory_train.core.errors import UserError
from aifactory_train.data import split_step
from aifactory_train.evaluation.sampling import answering
from aifactory_train.methods.pairs import Mismatched, PairsSubset
from aifactory_train.model.objective import TokenNLL
from aifactory_train.parallel.batches import micro_batch, micro_limit

if TYPE_CHECKING:
    from aifactory_train.methods.base import RunContext

REFERENCE_FILE = "reference_logps.json"
#: The sides of a held-out set that are scored: the set itself, the worse answers, the exchanged ones.
SIDES = ("own", "rejected", "exchanged")
_FIX = "start a new run (--run-dir NEW): the reference is the model before its first step"


class Reference:
    """Log-probabilities of answers, float64, NaN where the run does not come by.

    train: ``[documents]``; exchanged: ``[documents]`` of the same questions with another answer (KTO) or None; held:
    ``{set: {side: [documents]}}``, None where nothing is evaluated.
    """

    def __init__(self) -> None:
        self.train: np.ndarray | None = None
        self.exchanged: np.ndarray | None = None
        self.held: dict[str, dict[str, np.ndarray]] | None = None

    # ---- computing it

    def compute(self, run: RunContext, wanted: np.ndarray, mixed: Mismatched | None) -> tuple[str, str]:
        """Score the ``wanted`` documents, KTO's exchanged ones (``mixed``) and the held-out ones; collective.

        Returns what the start-up report says of it: what was done, and at what cost.
        """
        started = time.perf_counter()
        base = run.data.train.base  # type: ignore[attr-defined]
        self.train = self._score(run, PairsSubset(base, wanted), len(base), wanted)
        scored, tokens = len(wanted), int(base.lengths[wanted].sum())
        if mixed is not None:
            self.exchanged = self._score(run, mixed, len(base), wanted)
            scored, tokens = 2 * scored, tokens + int(mixed.lengths.sum())
        if evaluates(run):
            self.held = {name: self._held_out(run, held) for name, held in run.data.evals.items()}
            scored += sum(int(np.isfinite(v).sum()) for sides in self.held.values() for v in sides.values())
        seconds = time.perf_counter() - started
        return (
            f"the model before its first step: {scored:,} answers scored in {seconds:.1f} s",
            f"{tokens:,} training tokens once, without gradients; {self.nbytes() / 2**20:.3g} MiB kept in "
            f"{REFERENCE_FILE}, no second model",
        )

    def _score(self, run: RunContext, documents: Any, total: int, places: np.ndarray) -> np.ndarray:
        """Log-probabilities, in ``places`` of an array of ``total``."""
        run.beat("reference")
        scored = score(run, documents, most=len(places))
        out = np.full(total, np.nan)
        out[places] = scored
        return out

    def _held_out(self, run: RunContext, held: Any) -> dict[str, np.ndarray]:
        """As :func:`aifactory_train.evaluation.evaluate.evaluate` will score the policy: the same rows in the same
        micro-batches.
        """
        run.beat("reference")
        sides = {side: held if side == "own" else getattr(held, side, None) for side in SIDES}
        most = run.recipe.data.eval_rows
        return {side: score(run, rows, most=most) for side, rows in sides.items() if rows is not None}

    def nbytes(self) -> int:
        """Bytes in memory."""
        arrays = [self.train, self.exchanged, *(v for sides in (self.held or {}).values() for v in sides.values())]
        return sum(array.nbytes for array in arrays if array is not None)

    # ---- keeping it

    def write(self, run: RunContext) -> None:
        """Into the run folder; called by rank 0."""
        from aifactory_train.core.files import write_json
        from aifactory_train.metrics.bootstrap import packed

        content: dict[str, Any] = {"what": "log-probabilities, float64, base64", **self._digests(run)}
        found = {"reference": self.train, "exchanged": self.exchanged}
        content.update({name: packed(values) for name, values in found.items() if values is not None})
        if self.held is not None:
            content["held_out"] = {
                name: {side: packed(values) for side, values in sides.items()} for name, sides in self.held.items()
            }
        write_json(run.folder.path / REFERENCE_FILE, content)

    def read(self, run: RunContext, wanted: np.ndarray) -> tuple[str, str]:
        """What :meth:`write` left. Raises :class:`UserError` where it is of other rows, or does not cover this
        run's.
        """
        from aifactory_train.core.files import read_json
        from aifactory_train.metrics.bootstrap import unpacked

        path = run.folder.path / REFERENCE_FILE
        found, here = read_json(path), self._digests(run)
        if found["data"] != here["data"]:
            raise UserError("the reference was computed on other rows", where=str(path), fix=_FIX)
        self.train = unpacked(found["reference"])
        self.exchanged = unpacked(found["exchanged"]) if "exchanged" in found else None
        missing = int(np.isnan(self.train[wanted]).sum())
        if missing:
            raise UserError(
                f"the reference was not computed for {missing} of this run's documents", where=str(path), fix=_FIX
            )
        if evaluates(run):
            self._read_held_out(found, here, path)
        return ("the model before its first step, read", f"{path.name} of this run; not computed again")

    def _read_held_out(self, found: dict[str, Any], here: dict[str, Any], path: Path) -> None:
        from aifactory_train.metrics.bootstrap import unpacked

        if "held_out" not in found or found.get("evals") != here["evals"]:
            raise UserError("the reference was not computed for these held-out rows", where=str(path), fix=_FIX)
        self.held = {
            name: {side: unpacked(values) for side, values in sides.items()}
            for name, sides in found["held_out"].items()
        }

    def _digests(self, run: RunContext) -> dict[str, Any]:
        from aifactory_train.data.digest import data_digest

        rows = run.recipe.data.eval_rows
        evals = {name: f"{data_digest(held)} {rows}" for name, held in run.data.evals.items()}
        return {"data": data_digest(run.data.train), "evals": evals}


def evaluates(run: RunContext) -> bool:
    """Whether the run looks at held-out rows at all."""
    settings = run.recipe.eval
    return settings.before or settings.after or settings.every_steps is not None


def score(run: RunContext, documents: Any, *, most: int) -> np.ndarray:
    """Log-probabilities of at most ``most`` documents (evenly spaced) as the model is now, float64, the same on all
    ranks.
    """
    from aifactory_train.evaluation.likelihood import held_out

    scored = held_out(
        run.engine.module,
        documents,
        max_rows=most,
        batching=run.recipe.data.batching,
        pad_id=run.pad_id,
        device=run.world.device,
        micro_batch_tokens=run.recipe.train.micro_batch_tokens,
        rank=run.world.rank,
        world_size=run.world.size,
        autocast=autocast_of(run),
    )
    return -scored.nll


def score_tokens(run: RunContext, documents: Any, temperature: float) -> list[np.ndarray]:
    """Log-probabilities (fp32) of the supervised tokens of each document, at ``temperature``, as the model is now; the
    same on all ranks. Collective."""
    world, recipe, module = run.world, run.recipe, run.engine.module
    most = micro_limit(recipe.train.micro_batch_tokens, documents.lengths, world.device)
    dealt = split_step(np.arange(len(documents)), documents.lengths, world.size, "auto", most, recipe.data.batching)
    found: dict[int, np.ndarray] = {}
    with torch.no_grad(), answering(module, world.device, autocast_of(run)):
        for share in dealt[world.rank]:
            run.beat("reference")
            batch = micro_batch(documents, share, recipe.data.batching, run.pad_id, world.device)
            batch.objective = TokenNLL(temperature)
            logps = -module(**batch.kwargs()).float().cpu().numpy()
            ends = np.cumsum(documents.supervised[share])
            found.update(zip(share.tolist(), np.split(logps, ends[:-1]), strict=True) if len(share) else [])
    boxes: list[Any] = [found]
    if world.size > 1:
        boxes = [None] * world.size
        dist.all_gather_object(boxes, found)
    whole = {number: logps for box in boxes for number, logps in box.items()}
    return [whole[number] for number in range(len(documents))]


def autocast_of(run: RunContext) -> torch.dtype | None:
    """The type that forward passes outside of the engine compute in; None where parameters have it already."""
    policy = run.precision
    mixed = policy.compute != policy.parameters or policy.compute != policy.frozen
    return policy.compute if mixed else None
