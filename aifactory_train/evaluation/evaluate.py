"""Held-out evaluation: likelihood of the rows' own answers, and answers by generation where the recipe is a question.

Bits per byte is the NLL of the assistant's *text* tokens over the UTF-8 bytes of that text: it compares models with
different tokenizers, and format tokens (end of turn, headers) buy nothing. Perplexity and loss are over all supervised
tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from aifactory_train import metrics
from aifactory_train.core.figures import duration
from aifactory_train.evaluation.answers import answer_rows
from aifactory_train.evaluation.general import forgetting, general_documents
from aifactory_train.evaluation.heads import evaluate_head
from aifactory_train.evaluation.likelihood import HeldOut, choose_rows, held_out
from aifactory_train.evaluation.memorisation import probe_memory
from aifactory_train.evaluation.results import SetResult
from aifactory_train.evaluation.verdict import answer_facts, judge
from aifactory_train.metrics.bootstrap import packed
from aifactory_train.metrics.registry import without_replicates
from aifactory_train.metrics.slices import groups, tags

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.data import PreparedData


# ---- answers by generation


# ---- all sets of a recipe


def evaluate(
    module: nn.Module,
    tokenizer,
    prepared: PreparedData,
    recipe: Recipe,
    *,
    device: str,
    rank: int,
    world_size: int,
    generate: bool,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Figures over all held-out rows, and of each evaluation set under ``sets``; the same on all ranks.

    ``bits_per_byte``, ``perplexity``, ``loss``, ``rows``, ``ci`` (95 % bootstrap over rows) always. With ``generate``
    also the metrics of answers that ``eval.metrics`` asks for, with ``samples`` of prompt, expectation and answer, the
    ``slices``, the ``general`` text of the forgetting check, and ``replicates``
    (:func:`aifactory_train.metrics.changes` pairs them; they do not belong into eval.json). Text rows (continued
    pre-training) have samples but no metrics of answers. ``tell`` hears what is done now, and about how long it takes.
    """
    from aifactory_train.model.precision import choose_precision

    precision, _ = choose_precision(recipe, device)
    mixed = precision.compute != precision.parameters or precision.compute != precision.frozen
    how: dict[str, Any] = {
        "device": device,
        "rank": rank,
        "world_size": world_size,
        "autocast": precision.compute if mixed else None,
        "pad_id": prepared.tokenizer_info["pad_id"],
    }
    if recipe.methods.head is not None:
        return evaluate_head(module, prepared, recipe, how=how, whole=generate, tell=tell)
    scoring = {"batching": recipe.data.batching, "micro_batch_tokens": recipe.train.micro_batch_tokens, **how}
    found: list[SetResult] = []
    sets: dict[str, Any] = {}
    took = _announce(prepared, recipe, tell) if tell is not None else None
    for name, dataset in prepared.evals.items():
        first: dict[str, Any] = {"took": None if sets else took}
        result = SetResult(dataset, held_out(module, dataset, max_rows=recipe.data.eval_rows, **scoring, **first))
        for side in _SIDES:
            documents = getattr(dataset, side, None)
            if documents is not None:
                setattr(result, side, held_out(module, documents, max_rows=recipe.data.eval_rows, **scoring))
        if generate:
            result.asked, result.answers, result.cut_off = answer_rows(
                module, tokenizer, result, recipe, prepared.tokenizer_info, how, tell
            )
        found.append(result)
        sets[name] = _figures([result], recipe, generate=generate, pooled=False)
    figures = _figures(found, recipe, generate=generate, pooled=True)
    if generate and "memorisation" in recipe.eval.metrics:
        figures.update(probe_memory(module, prepared, recipe, figures, how))
    if generate and recipe.eval.forgetting:
        general = general_documents(recipe, tokenizer)
        scored = held_out(module, general, max_rows=len(general), **scoring)  # type: ignore[arg-type]
        figures["general"] = scored.figures()
    return {**figures, "sets": sets}


#: Further documents of a held-out set, under a preference method.
_SIDES = ("rejected", "exchanged")


def _announce(prepared: PreparedData, recipe: Recipe, tell: Callable[[str], None]) -> Callable[[int, float], None]:
    """Say how many rows are scored; what is returned hears of the first of them, and says about how long all take."""
    sets = list(prepared.evals.values())
    sides = [side for d in sets for side in (d, *(getattr(d, name, None) for name in _SIDES)) if side is not None]
    tokens = sum(int(d.lengths[choose_rows(len(d), recipe.data.eval_rows)].sum()) for d in sides)
    rows = sum(min(len(d), recipe.data.eval_rows) for d in sets)
    tell(f"scoring {rows:,} held-out rows ({tokens:,} tokens)")

    def took(done: int, seconds: float) -> None:
        tell(f"  they take about {duration(seconds * tokens / max(1, done))}")

    return took


def _figures(results: list[SetResult], recipe: Recipe, *, generate: bool, pooled: bool) -> dict[str, Any]:
    """Figures of one set, or of all sets together (``pooled``: with replicates and slices)."""
    scored = HeldOut(*(np.concatenate([getattr(r.scored, f) for r in results]) for f in HeldOut.__dataclass_fields__))
    figures = scored.figures(replicates=generate and pooled)
    if recipe.methods.preference is not None:
        _add_preferences(figures, results, recipe)
    if not generate:
        return figures
    rated = [(r, i) for r in results for i in r.rated()]
    given, expected = [r.answers[i] for r, i in rated], [r.asked[i].expected for r, i in rated]
    statistics = answer_statistics(given, expected, recipe)
    add_answers(figures, statistics, None)
    if rated:
        figures["answers"] = answer_facts(given, expected, [r.cut_off[i] for r, i in rated])
    samples = [
        {"prompt": q.prompt, "expected": q.expected, "answer": answer}
        for r in results
        for q, answer in list(zip(r.asked, r.answers, strict=True))[: recipe.eval.samples]
    ]
    figures["samples"] = samples[: recipe.eval.samples]
    if pooled and recipe.eval.slices:
        figures["slices"] = _slices(results, scored, rated, statistics, recipe)
    return figures


def _add_preferences(figures: dict[str, Any], results: list[SetResult], recipe: Recipe) -> None:
    """Loss, rewards and log-probabilities of the held-out answers (:mod:`aifactory_train.evaluation.preferences`)."""
    from aifactory_train.evaluation.preferences import statistics

    assert recipe.methods.preference is not None
    for name, (values, value) in statistics(results, recipe.methods.preference).items():
        one = metrics.figure(values, value)
        figures[name], figures["ci"][name] = one.value, one.ci
        if "replicates" in figures and one.replicates is not None:
            figures["replicates"][name] = packed(one.replicates)


def answer_statistics(given: Sequence[str], expected: Sequence[str], recipe: Recipe) -> dict[str, np.ndarray]:
    """``{metric: [rows, K]}`` of the metrics of answers that ``eval.metrics`` names."""
    return {
        name: metric.statistics(given, expected, recipe.eval.label_separator)
        for name, metric in metrics.ANSWER_METRICS.items()
        if name in recipe.eval.metrics
    }


def add_answers(figures: dict[str, Any], statistics: dict[str, np.ndarray], rows: np.ndarray | None) -> None:
    """Put the metrics of answers of ``rows`` (default: all) into ``figures`` beside those of likelihood."""
    for name, values in statistics.items():
        found = metrics.figure(values if rows is None else values[rows], metrics.ANSWER_METRICS[name].value)
        figures[name], figures["ci"][name] = found.value, found.ci
        figures["answered_rows"] = len(values) if rows is None else len(rows)
        if "replicates" in figures and found.replicates is not None:
            figures["replicates"][name] = packed(found.replicates)


def _slices(
    results: list[SetResult],
    scored: HeldOut,
    rated: list[tuple[SetResult, int]],
    statistics: dict[str, np.ndarray],
    recipe: Recipe,
) -> dict[str, Any]:
    """``{dimension: {value: figures}}`` of all rows, in the dimensions in which they differ."""
    rows: list[dict[str, Any]] = []
    lengths: list[int] = []
    labels: list[str | None] = []
    place: dict[tuple[int, int], int] = {}  # (set, document) -> row
    classified = {"accuracy", "micro_f1", "macro_f1"} & set(recipe.eval.metrics)
    for number, result in enumerate(results):
        for index in result.scored.documents.tolist():
            row = result.dataset.row(index)
            place[number, index] = len(rows)
            rows.append(row)
            lengths.append(int(result.dataset.lengths[index]))
            last = (row.get("messages") or [{}])[-1]
            labels.append(last.get("content") if classified and last.get("role") == "assistant" else None)
    numbers = {id(result): number for number, result in enumerate(results)}
    answered = np.asarray([place[numbers[id(r)], r.asked[i].row] for r, i in rated], dtype=np.int64)
    out: dict[str, Any] = {}
    for dimension, values in tags(rows, lengths, labels).items():
        if dimension == "label" and recipe.privacy.profile != "open":
            continue  # a label is text of the rows, and figures go into the record
        out[dimension] = {}
        for value, chosen in groups(values).items():
            block = scored.figures(chosen)
            add_answers(block, statistics, np.flatnonzero(np.isin(answered, chosen)))
            out[dimension][value] = block
    return out


# ---- memorisation


def results_file(results: dict[str, Any], recipe: Recipe, run: Path | None = None, steps: int = 0) -> dict[str, Any]:
    """``eval.json`` of the figures ``before`` and ``after``: with paired ``change`` of every metric, the ``forgetting``
    check, and the ``verdict`` on so many ``steps`` of ``run``, where one is named.
    """
    before, after = results.get("before"), results.get("after")
    out = without_replicates(results)
    if before and after:
        out["change"] = metrics.changes(before, after)
        found = forgetting(before.get("general"), after.get("general"), recipe.eval.forgetting_limit)
        if found is not None:
            out["forgetting"] = found
    if run is not None:
        out["verdict"] = judge(out, recipe, run, steps).as_dict()
    return out
