"""One pass of a teacher over the rows of a recipe: its likeliest tokens at every supervised target, stored for
``methods.distill`` (:mod:`aifactory_train.data.teacher_scores`).
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aifactory_train.config.distill_block import stored_folder, teacher_recipe
from aifactory_train.core.errors import UserError
from aifactory_train.data import Sampler, load_tokenizer, prepare
from aifactory_train.data.teacher_scores import (
    TeacherId,
    TeacherScores,
    bytes_per_target,
    document_key,
    make_folder,
    vocabulary_digest,
    write_part,
)
from aifactory_train.evaluation.likelihood import _micro_batches, choose_rows
from aifactory_train.model import position_check
from aifactory_train.model.base import base_folder
from aifactory_train.model.causal_lm import CausalLM
from aifactory_train.model.loading import check_vocabulary, load_language_model
from aifactory_train.model.precision import choose_precision
from aifactory_train.model.report import ModelReport
from aifactory_train.model.top_logps import TeacherTop
from aifactory_train.parallel.batches import micro_batch
from aifactory_train.sources.digests import sha256_of
from aifactory_train.sources.model_folder import weight_files

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.data import TokenDataset

#: A part is written after so many supervised targets (about 50 MB at k = 64), or so many seconds: what an interruption
#: costs at most.
PART_TARGETS, PART_SECONDS = 1 << 17, 300.0


@dataclass
class _Wanted:
    """Documents of one set, with their keys int64."""

    name: str
    dataset: TokenDataset
    documents: np.ndarray
    keys: np.ndarray


def teach(
    recipe: Recipe,
    *,
    folder: Path | None = None,
    share: tuple[int, int] = (1, 1),
    device: str = "cpu",
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Store what ``methods.distill.teacher`` thinks of the documents that the recipe's run will train on, and of its
    held-out ones; what is stored already is not computed again.

    ``folder``: default :func:`stored_folder`; ``share`` ``(i, n)``: the i-th of n processes that divide the documents
    among them. Returns figures of what is stored then, ready for JSON: ``sets`` with ``documents``, ``targets``,
    ``mass`` and ``loss`` (the teacher's own, nats per target) of each set, and how much of it this call computed.
    Raises :class:`UserError` for a teacher that was not fetched or has another vocabulary.
    """
    how = recipe.methods.distill
    assert how is not None
    folder = folder or stored_folder(recipe)
    teacher = teacher_recipe(recipe)
    tokenizer = load_tokenizer(recipe)
    identity = _identity(recipe, teacher, tokenizer.get_vocab())
    pad_id, wanted = _documents(recipe, tokenizer)
    make_folder(folder)
    scores = TeacherScores(folder)
    if scores.identity is not None and scores.identity != identity:
        raise UserError(
            "holds the log-probabilities of another teacher, or with other settings",
            where=str(folder),
            fix="move it away, or name another folder with --out",
        )
    number, of = share
    missing = [(one, i) for one in wanted for i in np.flatnonzero(~scores.has(one.keys)).tolist()]
    missing = list({int(one.keys[i]): (one, i) for one, i in missing}.values())[number - 1 :: of]
    started, targets = time.perf_counter(), 0
    if missing:
        targets = _score(teacher, tokenizer, identity, folder, missing, pad_id, device, say)
        scores = TeacherScores(folder)
    return {
        "teacher": how.teacher,
        "stored": str(folder),
        "top_k": how.top_k,
        "temperature": how.temperature,
        "bytes_per_target": bytes_per_target(how.top_k, identity.tokens),
        "bytes": sum(part.path.stat().st_size for part in scores.parts),
        "computed_documents": len(missing),
        "computed_targets": targets,
        "seconds": round(time.perf_counter() - started, 2),
        "sets": {one.name: _figures(scores, one) for one in wanted},
    }


def _identity(recipe: Recipe, teacher: Recipe, vocabulary: dict[str, int]) -> TeacherId:
    """Whose log-probabilities are to be stored. Raises :class:`UserError` for another vocabulary, or too large a
    ``top_k``.
    """
    how = recipe.methods.distill
    assert how is not None
    tokens = same_vocabulary(vocabulary, _of_teacher(lambda: load_tokenizer(teacher)).get_vocab(), teacher)
    if how.top_k >= tokens:
        raise UserError(
            f"{how.top_k} of a vocabulary of {tokens} tokens",
            where="methods.distill.top_k",
            fix=f"at most {tokens - 1}",
        )
    digests = weights_digest(teacher), vocabulary_digest(vocabulary)
    return TeacherId(how.teacher, how.revision, *digests, tokens, how.top_k, how.temperature)


def _figures(scores: TeacherScores, one: _Wanted) -> dict[str, Any]:
    there = one.keys[scores.has(one.keys)]
    targets, mass, nll = scores.figures(there)
    missing = len(one.keys) - len(there)
    means = {"mass": mass, "loss": nll} if targets else {"mass": None, "loss": None}
    return {"documents": len(there), "missing": missing, "targets": targets, **means}


def _of_teacher(function: Callable[[], Any]) -> Any:
    """What a function of the teacher's recipe gives, whose faults are those of the key that names it."""
    try:
        return function()
    except UserError as error:
        raise UserError(f"the teacher: {error.what}", where="methods.distill.teacher", fix=error.fix) from None


def same_vocabulary(own: dict[str, int], theirs: dict[str, int], teacher: Recipe) -> int:
    """The number of token ids. Raises :class:`UserError` where the teacher's tokens have other ids than the model's."""
    if own == theirs:
        return max(own.values()) + 1
    odd = sorted((own.keys() | theirs.keys()) - {t for t in own.keys() & theirs.keys() if own[t] == theirs[t]})
    first = ascii(odd[0])
    here, there = (str(found.get(odd[0], "no token")) for found in (own, theirs))
    raise UserError(
        f"{teacher.model.base} has another vocabulary: {len(odd):,} tokens differ, of {len(own):,} and {len(theirs):,}"
        f"; {first} is {here} here and {there} there",
        where="methods.distill.teacher",
        fix="take a teacher of the same family; from any other, its answers can be rows (docs/methods.md)",
    )


def weights_digest(teacher: Recipe) -> str:
    """Of the files that the teacher's weights are read from, with config.json."""
    folder = _of_teacher(lambda: base_folder(teacher))
    files = [folder / "config.json", *weight_files(folder)]
    found = sha256_of(files)
    lines = "".join(f"{os.path.relpath(path, folder)} {found[path]}\n" for path in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _documents(recipe: Recipe, tokenizer: Any) -> tuple[int, list[_Wanted]]:
    """(padding id, the documents that the run's steps use, and the held-out ones that it evaluates)."""
    prepared, settings = prepare(recipe, tokenizer), recipe.train
    train = prepared.train
    sampler = Sampler(train.lengths, train.weights, settings.seed, settings.batch_rows, settings.batch_tokens)
    seen = np.zeros(len(train), dtype=bool)
    sampler.mark_seen(seen, sampler.steps(settings.epochs, settings.max_steps))
    sets = [("train", train, np.flatnonzero(seen))]
    sets += [(name, held, choose_rows(len(held), recipe.data.eval_rows)) for name, held in prepared.evals.items()]
    return int(prepared.tokenizer_info["pad_id"]), [
        _Wanted(name, rows, found, np.asarray([document_key(rows, int(i)) for i in found], dtype=np.int64))
        for name, rows, found in sets
    ]


def _score(
    teacher: Recipe,
    tokenizer: Any,
    identity: TeacherId,
    folder: Path,
    missing: list[tuple[_Wanted, int]],
    pad_id: int,
    device: str,
    say: Callable[[str], None],
) -> int:
    """Compute and write the missing documents, a part after the other; returns their supervised targets."""
    model = _loaded(teacher, tokenizer, device)
    how, total = teacher.data.batching, len(missing)
    licence, most = teacher.model.licence, teacher.train.micro_batch_tokens
    waiting: list[tuple[int, dict[str, np.ndarray]]] = []
    done = targets = 0
    began = started = time.monotonic()
    sets = list({id(one): one for one, _ in missing}.values())
    for one in sets:
        places = np.asarray([i for other, i in missing if other is one])
        documents = one.documents[places]
        for rows in _micro_batches(one.dataset.lengths[documents], most, how):
            found = _of_batch(model, one.dataset, documents[rows], identity, how, pad_id, device)
            waiting += zip(one.keys[places[rows]].tolist(), found, strict=True)
            done += len(rows)
            unwritten = sum(len(part["rest"]) for _, part in waiting)
            if unwritten >= PART_TARGETS or time.monotonic() - began > PART_SECONDS or done == total:
                write_part(folder, identity, licence, [key for key, _ in waiting], [part for _, part in waiting])
                targets += unwritten
                waiting, began = [], time.monotonic()
                say(f"{done:,} of {total:,} documents, {targets / (began - started):,.0f} targets/s")
    return targets


def _loaded(teacher: Recipe, tokenizer: Any, device: str) -> CausalLM:
    """The teacher in the type that it computes in, without anything that is trained."""

    def load() -> CausalLM:
        path = base_folder(teacher)
        position_check.settle(teacher, position_check.check(teacher, path, device=device))
        precision, _ = choose_precision(teacher, device)
        model = load_language_model(path, teacher, device=device, dtype=precision.compute, report=ModelReport())
        check_vocabulary(model, tokenizer)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        return CausalLM(model, teacher.train.loss_chunk_tokens, own=teacher.model.attention == "own").eval()

    found: CausalLM = _of_teacher(load)
    return found


@torch.no_grad()
def _of_batch(
    model: CausalLM,
    dataset: TokenDataset,
    documents: np.ndarray,
    identity: TeacherId,
    batching: str,
    pad_id: int,
    device: str,
) -> list[dict[str, np.ndarray]]:
    """``ids``, ``logps``, ``rest`` and ``nll`` of each document's targets."""
    batch = micro_batch(dataset, documents, batching, pad_id, device)
    top = TeacherTop(identity.top_k, identity.temperature, identity.tokens)
    batch.objective = top
    nll = model(**batch.kwargs())
    if not bool(torch.isfinite(nll).all()):
        raise UserError(
            f"the teacher gives no finite probabilities for {dataset.place(int(documents[0]))} or a row beside it",
            where="methods.distill.teacher",
            fix="--set precision.compute=fp32, or another teacher",
        )
    found = {"ids": top.ids, "logps": top.logps, "rest": top.rest, "nll": nll}
    host = {name: tensor.cpu().numpy() for name, tensor in found.items()}
    ends = np.cumsum(dataset.supervised[documents].astype(np.int64))[:-1]
    parts = {name: np.split(values, ends) for name, values in host.items()}
    return [{name: parts[name][k] for name in parts} for k in range(len(documents))]
