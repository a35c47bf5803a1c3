"""Held-out evaluation: likelihood of the rows' own answers, and answers by generation where the recipe is a question.

Bits per byte is the NLL of the assistant's *text* tokens over the UTF-8 bytes of that text: it compares models with different
tokenizers, and format tokens (end of turn, headers) buy nothing. Perplexity and loss are over all supervised tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from aifactory_train import metrics
from aifactory_train.attention import Documents
from aifactory_train.data import collate
from aifactory_train.errors import UserError
from aifactory_train.generate import generate
from aifactory_train.metrics.bootstrap import packed, ratio
from aifactory_train.metrics.general import forgetting, general_documents
from aifactory_train.metrics.registry import without_replicates
from aifactory_train.metrics.slices import groups, tags

if TYPE_CHECKING:
    from aifactory_train.config import Recipe
    from aifactory_train.data import PreparedData, TokenDataset

#: A text row asks for its own continuation after this many tokens (samples only; it is no question with an answer).
TEXT_PROMPT_TOKENS = 32


@dataclass
class HeldOut:
    """Likelihood of held-out documents. Arrays are float64 ``[rows]`` in the order of ``documents``, the same on all ranks."""

    documents: np.ndarray  # int64 [rows], indices into the data set
    nll: np.ndarray  # nats over all supervised targets
    tokens: np.ndarray  # supervised targets
    text_nll: np.ndarray  # nats over the targets that are text
    text_bytes: np.ndarray  # UTF-8 bytes of that text

    @property
    def rows(self) -> int:
        return len(self.documents)

    @property
    def loss(self) -> float:
        """Mean NLL in nats per supervised token."""
        return float(self.nll.sum() / self.tokens.sum())

    @property
    def perplexity(self) -> float | None:
        return metrics.perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        return metrics.bits_per_byte(float(self.text_nll.sum()), int(self.text_bytes.sum()))

    def statistics(self, name: str, rows: np.ndarray | None = None) -> tuple[np.ndarray, Any]:
        """(``[rows, 2]``, value of their sums) of ``bits_per_byte``, ``loss`` or ``perplexity``."""
        top, below = (
            (self.text_nll / math.log(2), self.text_bytes) if name == "bits_per_byte" else (self.nll, self.tokens)
        )
        both = np.stack([top, below], axis=1)
        return (both if rows is None else both[rows]), _exp_ratio if name == "perplexity" else ratio

    def figures(self, rows: np.ndarray | None = None, *, replicates: bool = False) -> dict[str, Any]:
        """Figures of some rows (default: all) with bootstrap intervals over rows (95 %), ready for JSON."""
        chosen = np.arange(self.rows) if rows is None else rows
        out: dict[str, Any] = {}
        ci: dict[str, Any] = {}
        drawn: dict[str, str] = {}
        for name in metrics.LIKELIHOOD_METRICS:
            found = metrics.figure(*self.statistics(name, chosen))
            samples = found.replicates
            finite = samples is not None and bool(np.isfinite(samples).all())
            out[name] = found.value if found.value is not None and math.isfinite(found.value) else None
            ci[name] = found.ci if finite else None
            if replicates and finite and samples is not None:
                drawn[name] = packed(samples)
        out.update(
            rows=len(chosen),
            tokens=int(self.tokens[chosen].sum()),
            text_bytes=int(self.text_bytes[chosen].sum()),
            ci=ci,
        )
        return {**out, "replicates": drawn} if replicates else out


def _exp_ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.exp(ratio(sums))


def choose_rows(total: int, most: int) -> np.ndarray:
    """At most ``most`` of ``total`` documents, evenly spaced, so that every part of the set is represented."""
    if total <= most:
        return np.arange(total)
    return np.unique(np.linspace(0, total - 1, most).round().astype(np.int64))


def held_out(
    module: nn.Module,
    dataset: TokenDataset,
    *,
    max_rows: int,
    batching: str,
    pad_id: int,
    device: str,
    micro_batch_tokens: int,
    rank: int = 0,
    world_size: int = 1,
    autocast: torch.dtype | None = None,
) -> HeldOut:
    """Likelihood of at most ``max_rows`` documents; the result does not depend on the number of ranks.

    ``module`` is called like :meth:`CausalLM.forward` with ``reduce=False``, the same number of times on every rank (it may be
    wrapped by DDP or sharded). The model's mode is restored; dropout is off meanwhile.
    """
    documents = choose_rows(len(dataset), max_rows)
    if not len(documents):
        raise UserError("no held-out rows to evaluate", where=f"data.eval: {dataset.name}")
    batches = _micro_batches(dataset.lengths[documents], micro_batch_tokens, batching)
    sums = np.zeros((4, len(documents)))  # nll, tokens, text_nll, text_bytes
    was_training = module.training
    module.eval()
    try:
        for start in range(0, len(batches), world_size):
            mine = batches[start + rank] if start + rank < len(batches) else []
            _score(module, dataset, documents, mine, sums, batching, pad_id, device, autocast)
    finally:
        module.train(was_training)
    if world_size > 1:
        total = torch.from_numpy(sums)
        dist.all_reduce(total)  # each row was scored by one rank, the others hold zeros: exact
    return HeldOut(documents, *sums)


def _micro_batches(lengths: np.ndarray, most_tokens: int, batching: str) -> list[list[int]]:
    """Rows (indices into ``lengths``) of each micro-batch, longest first, none above ``most_tokens`` unless it is one row."""
    batches: list[list[int]] = []
    width = used = 0
    for row in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[row])
        cost = width * (len(batches[-1]) + 1) if batching == "padded" and batches else used + length
        if not batches or cost > most_tokens:
            batches.append([])
            width, used = length, 0
        batches[-1].append(row)
        used += length
    return batches


@torch.no_grad()
def _score(
    module: nn.Module,
    dataset: TokenDataset,
    documents: np.ndarray,
    rows: list[int],
    sums: np.ndarray,
    batching: str,
    pad_id: int,
    device: str,
    autocast: torch.dtype | None,
) -> None:
    """Add the figures of ``rows`` to their columns of ``sums``; without rows the module is called on one padding token."""
    batch = collate(dataset, [int(documents[r]) for r in rows], batching, pad_id)
    labels = batch.labels.flatten()
    positions = torch.nonzero(labels != -100).squeeze(1)
    context = torch.autocast(device.split(":")[0], dtype=autocast) if autocast is not None else contextlib.nullcontext()
    with context:
        nll = module(
            input_ids=batch.input_ids.to(device),
            position_ids=batch.position_ids.to(device),
            documents=Documents.of(batch.cu_seqlens, device),
            positions=positions.to(device),
            targets=labels[positions].to(device),
            reduce=False,
        )
    if not rows:
        return
    values = nll.double().cpu().numpy()
    edges = batch.cu_seqlens.numpy()
    where = positions.numpy()
    owner = np.searchsorted(edges, where, side="right") - 1  # one segment per document
    for k, row in enumerate(rows):
        mine = owner == k
        text = dataset.text_mask(int(documents[row]))[where[mine] - edges[k] + 1]  # of the target, not of its context
        sums[0, row] = values[mine].sum()
        sums[1, row] = mine.sum()
        sums[2, row] = values[mine][text].sum()
        sums[3, row] = dataset.text_bytes(int(documents[row]))


# ---- answers by generation


@dataclass
class Question:
    """What is asked of a row: token ids of the prompt, its text for people, and the expected answer."""

    row: int
    prompt_ids: list[int]
    prompt: str
    expected: str


def question(dataset: TokenDataset, index: int, tokenizer, template) -> Question | None:
    """The last supervised answer of a chat row with all that came before it, or the beginning of a text row.

    None where there is nothing to ask: the answer is a tool call, or the text is shorter than the beginning.
    """
    from aifactory_train.data.rows import supervised_turns
    from aifactory_train.data.template import TemplateRefused

    row = dataset.row(index)
    if "text" in row:
        ids = dataset.tokens(index).tolist()
        if len(ids) <= TEXT_PROMPT_TOKENS:
            return None
        head = ids[:TEXT_PROMPT_TOKENS]
        rest = tokenizer.decode(ids[TEXT_PROMPT_TOKENS:], skip_special_tokens=True)
        return Question(index, head, tokenizer.decode(head, skip_special_tokens=True), rest)
    messages = row["messages"]
    turns = [k for k in supervised_turns(messages) if not messages[k].get("tool_calls")]
    if not turns or turns[-1] == 0 or template is None:
        return None
    last = turns[-1]
    try:
        text = template.render(messages[:last], row.get("tools"), prompt=True)
    except TemplateRefused:
        return None
    ids = tokenizer(text, add_special_tokens=False).input_ids
    asked = next((m["content"] for m in reversed(messages[:last]) if m["role"] == "user"), text)
    return Question(index, ids, asked, messages[last]["content"])


def answers(
    module: nn.Module,
    tokenizer,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    pad_id: int,
    device: str,
    rank: int = 0,
    world_size: int = 1,
    autocast: torch.dtype | None = None,
) -> list[str]:
    """Greedy answers to all questions, on every rank. Ranks share the work unless the parameters are sharded."""
    ids = continuations(
        module,
        [q.prompt_ids for q in questions],
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        pad_id=pad_id,
        device=device,
        rank=rank,
        world_size=world_size,
        autocast=autocast,
    )
    return [tokenizer.decode(found, skip_special_tokens=True).strip() for found in ids]


def continuations(
    module: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    rank: int = 0,
    world_size: int = 1,
    device: str,
    autocast: torch.dtype | None = None,
    **options: Any,
) -> list[list[int]]:
    """Greedy token ids after each prompt (:func:`aifactory_train.generate.generate` with ``options``), on every rank."""
    context = torch.autocast(device.split(":")[0], dtype=autocast) if autocast is not None else contextlib.nullcontext()
    together = world_size == 1 or is_sharded(module)
    mine = list(range(len(prompts))) if together else list(range(rank, len(prompts), world_size))
    # DDP adds nothing to a forward without gradients
    target = module if together else getattr(module, "module", module)
    with context:
        ids = dict(zip(mine, generate(target, [prompts[i] for i in mine], device=device, **options), strict=True))
    if not together:
        boxes: list[Any] = [None] * world_size
        dist.all_gather_object(boxes, ids)
        ids = {i: found for box in boxes for i, found in box.items()}
    return [ids[i] for i in range(len(prompts))]


def is_sharded(module: nn.Module) -> bool:
    """Whether a forward of this module is collective: FSDP2 (DTensor parameters) or ZeRO-3 (partitioned parameters)."""
    return any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in module.parameters())


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
) -> dict[str, Any]:
    """Figures over all held-out rows at the top level, and of each evaluation set under ``sets``; the same on all ranks.

    ``bits_per_byte``, ``perplexity``, ``loss``, ``rows``, ``ci`` (95 % bootstrap over rows) always. With ``generate`` also the
    metrics of answers that ``eval.metrics`` asks for, with ``samples`` of prompt, expectation and answer, the ``slices``, the
    ``general`` text of the forgetting check, and ``replicates`` (:func:`aifactory_train.metrics.changes` pairs them; they do not
    belong into eval.json). Text rows (continued pre-training) have samples but no metrics of answers.
    """
    from aifactory_train.model import choose_precision

    precision, _ = choose_precision(recipe, device)
    mixed = precision.compute != precision.parameters or precision.compute != precision.frozen
    how: dict[str, Any] = {
        "device": device,
        "rank": rank,
        "world_size": world_size,
        "autocast": precision.compute if mixed else None,
        "pad_id": prepared.tokenizer_info["pad_id"],
    }
    scoring = {"batching": recipe.data.batching, "micro_batch_tokens": recipe.train.micro_batch_tokens, **how}
    found: list[SetResult] = []
    sets: dict[str, Any] = {}
    for name, dataset in prepared.evals.items():
        result = SetResult(dataset, held_out(module, dataset, max_rows=recipe.data.eval_rows, **scoring))
        for side in ("rejected", "exchanged"):  # of a preference method
            documents = getattr(dataset, side, None)
            if documents is not None:
                setattr(result, side, held_out(module, documents, max_rows=recipe.data.eval_rows, **scoring))
        if generate:
            result.asked, result.answers = _answered(module, tokenizer, result, recipe, prepared.tokenizer_info, how)
        found.append(result)
        sets[name] = _figures([result], recipe, generate=generate, pooled=False)
    figures = _figures(found, recipe, generate=generate, pooled=True)
    if generate and "memorisation" in recipe.eval.metrics:
        figures.update(_memorised(module, prepared, recipe, figures, how))
    if generate and recipe.eval.forgetting:
        general = general_documents(recipe, tokenizer)
        scored = held_out(module, general, max_rows=len(general), **scoring)  # type: ignore[arg-type]
        figures["general"] = scored.figures()
    return {**figures, "sets": sets}


@dataclass
class SetResult:
    """What is known of one evaluation set: likelihood of its rows, the questions asked of some of them, and their answers."""

    dataset: TokenDataset
    scored: HeldOut
    asked: list[Question] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    #: of pairs the other answers in the same order, of labelled ones the undesirable ones
    rejected: HeldOut | None = None
    exchanged: HeldOut | None = None  # of labelled answers: each question with another one's answer

    def rated(self) -> list[int]:
        """Questions (indices into ``asked``) whose answer can be compared with an expectation: those of chat rows."""
        return [i for i, q in enumerate(self.asked) if "text" not in self.dataset.row(q.row)]


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
    """Loss, rewards and log-probabilities of the held-out answers (:mod:`aifactory_train.methods.preference_eval`)."""
    from aifactory_train.methods.preference_eval import statistics

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


def _answered(
    module: nn.Module, tokenizer, result: SetResult, recipe: Recipe, info: dict[str, Any], how: dict[str, Any]
) -> tuple[list[Question], list[str]]:
    """The questions of one set and their generated answers."""
    wanted = set(metrics.ANSWER_METRICS) & set(recipe.eval.metrics)
    count = recipe.eval.generate_rows if wanted else min(recipe.eval.generate_rows, recipe.eval.samples)
    documents, template = result.scored.documents, chat_template(tokenizer)
    asked: list[Question] = []
    for index in documents[choose_rows(len(documents), count)].tolist() if count else []:
        found = question(result.dataset, index, tokenizer, template)
        if found is not None:
            asked.append(found)
    if not asked:
        return [], []
    given = answers(module, tokenizer, asked, max_new_tokens=recipe.eval.max_new_tokens, stop_ids=stop_ids(info), **how)
    return asked, given


# ---- memorisation

#: Tokens that must be reproduced, and the fewest that make a probe worthwhile.
MEMORY_TOKENS, MEMORY_LEAST = 32, 8


def memory_probe(dataset: TokenDataset, index: int) -> tuple[list[int], list[int]] | None:
    """(prompt, continuation) of a document, cut in the middle of what carries loss; None where that is too short."""
    tokens, mask = dataset.tokens(index), dataset.mask(index)
    places = np.flatnonzero(mask)
    if len(places) < 2 * MEMORY_LEAST:
        return None
    cut = int(places[len(places) // 2])
    return tokens[:cut].tolist(), tokens[cut : cut + MEMORY_TOKENS].tolist()


def _memorised(
    module: nn.Module, prepared: PreparedData, recipe: Recipe, figures: dict[str, Any], how: dict[str, Any]
) -> dict[str, Any]:
    """Share of training documents whose continuation the model gives word for word, and the same of held-out ones.

    Carlini et al. 2023 (arXiv 2202.07646): a text is extractable if its beginning makes the model continue it exactly. The held-out
    share is what can be guessed without having seen the text.
    """
    out: dict[str, Any] = {}
    for name, sets in (("memorisation", [prepared.train]), ("memorisation_held_out", list(prepared.evals.values()))):
        probes: list[tuple[list[int], list[int]]] = []
        for dataset in sets:
            for index in choose_rows(len(dataset), recipe.eval.generate_rows).tolist():
                probe = memory_probe(dataset, index)
                if probe is not None:
                    probes.append(probe)
        given = (
            continuations(module, [p for p, _ in probes], max_new_tokens=MEMORY_TOKENS, stop_ids=[], **how)
            if probes
            else []
        )
        hits = [[float(ids[: len(wanted)] == wanted), 1.0] for ids, (_, wanted) in zip(given, probes, strict=True)]
        found = metrics.figure(np.asarray(hits).reshape(-1, 2), ratio)
        out[name], out[f"{name}_rows"] = found.value, len(hits)
        figures["ci"][name] = found.ci
        if found.replicates is not None:
            figures["replicates"][name] = packed(found.replicates)
    return out


def results_file(results: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """``eval.json`` of the figures ``before`` and ``after``: with paired ``change`` of every metric and the ``forgetting`` check."""
    before, after = results.get("before"), results.get("after")
    out = without_replicates(results)
    if before and after:
        out["change"] = metrics.changes(before, after)
        found = forgetting(before.get("general"), after.get("general"), recipe.eval.forgetting_limit)
        if found is not None:
            out["forgetting"] = found
    return out


def stop_ids(info: dict[str, Any]) -> list[int]:
    """Tokens that end an answer: the supervised end of turn first, then the tokenizer's end of text."""
    found = [*info["stop_ids"]]
    if info["eos_id"] is not None and info["eos_id"] not in found:
        found.append(info["eos_id"])
    return found


def chat_template(tokenizer):
    """The tokenizer's chat template as the data path renders it (the same text as in training), or None."""
    from aifactory_train.data.template import ChatTemplate
    from aifactory_train.data.tokenizer import chat_template_of

    source = chat_template_of(tokenizer)
    if not source:
        return None
    specials = {name: str(value) for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return ChatTemplate(source, specials)
