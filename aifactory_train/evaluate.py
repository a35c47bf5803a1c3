"""Held-out evaluation: likelihood of the rows' own answers, and answers by generation where the recipe is a question.

Bits per byte is the NLL of the assistant's *text* tokens over the UTF-8 bytes of that text: it compares models with different
tokenizers, and format tokens (end of turn, headers) buy nothing. Perplexity and loss are over all supervised tokens.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
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

    def figures(self) -> dict[str, Any]:
        """Figures with bootstrap intervals over rows (95 %), ready for JSON."""
        bits = metrics.bootstrap_ratio(self.text_nll / math.log(2), self.text_bytes)
        loss = metrics.bootstrap_ratio(self.nll, self.tokens)
        return {
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "loss": self.loss,
            "rows": self.rows,
            "tokens": int(self.tokens.sum()),
            "text_bytes": int(self.text_bytes.sum()),
            "ci": {
                "bits_per_byte": bits,
                "loss": loss,
                "perplexity": None if loss is None else tuple(metrics.perplexity(x) for x in loss),
            },
        }


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
    context = torch.autocast(device.split(":")[0], dtype=autocast) if autocast is not None else contextlib.nullcontext()
    together = world_size == 1 or is_sharded(module)
    mine = list(range(len(questions))) if together else list(range(rank, len(questions), world_size))
    target = (
        module if together else getattr(module, "module", module)
    )  # DDP adds nothing to a forward without gradients
    with context:
        ids = generate(
            target,
            [questions[i].prompt_ids for i in mine],
            max_new_tokens=max_new_tokens,
            stop_ids=stop_ids,
            pad_id=pad_id,
            device=device,
        )
    texts = {i: tokenizer.decode(found, skip_special_tokens=True).strip() for i, found in zip(mine, ids, strict=True)}
    if not together:
        boxes: list[Any] = [None] * world_size
        dist.all_gather_object(boxes, texts)
        texts = {i: text for box in boxes for i, text in box.items()}
    return [texts[i] for i in range(len(questions))]


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

    ``bits_per_byte``, ``perplexity``, ``loss``, ``rows``, ``ci`` (95 % bootstrap over rows) always; ``exact_match`` and
    ``token_f1`` where ``eval.metrics`` asks for them and ``generate`` is set, with ``samples`` of prompt, expectation and
    answer. Text rows (continued pre-training) have samples but no exact match.
    """
    from aifactory_train.model import choose_precision

    precision, _ = choose_precision(recipe, device)
    mixed = precision.compute != precision.parameters or precision.compute != precision.frozen
    autocast = precision.compute if mixed else None
    info = prepared.tokenizer_info
    scored: dict[str, HeldOut] = {}
    sets: dict[str, Any] = {}
    by_row: dict[str, list[float]] = {"exact_match": [], "token_f1": []}
    samples: list[dict[str, str]] = []
    for name, dataset in prepared.evals.items():
        scored[name] = held_out(
            module,
            dataset,
            max_rows=recipe.data.eval_rows,
            batching=recipe.data.batching,
            pad_id=info["pad_id"],
            device=device,
            micro_batch_tokens=recipe.train.micro_batch_tokens,
            rank=rank,
            world_size=world_size,
            autocast=autocast,
        )
        sets[name] = scored[name].figures()
        if generate:
            answered = _answered(
                module, tokenizer, dataset, scored[name].documents, recipe, info, device, rank, world_size, autocast
            )
            sets[name].update(_agreement(answered["scores"], recipe))
            sets[name]["samples"] = answered["samples"]
            samples += answered["samples"]
            for key, values in answered["scores"].items():
                by_row[key] += values
    merged = HeldOut(*(np.concatenate([getattr(s, f) for s in scored.values()]) for f in HeldOut.__dataclass_fields__))
    figures = merged.figures()
    if generate:
        figures.update(_agreement(by_row, recipe))
        figures["samples"] = samples[: recipe.eval.samples]
    for block in (figures, *sets.values()):
        if "ci_answers" in block:
            block["ci"].update(block.pop("ci_answers"))
    return {**figures, "sets": sets}


def _answered(
    module, tokenizer, dataset, documents, recipe, info, device, rank, world_size, autocast
) -> dict[str, Any]:
    """Generated answers of one set: scores of each chat row, and a few samples."""
    wanted = {"exact_match", "token_f1"} & set(recipe.eval.metrics)
    count = recipe.eval.generate_rows if wanted else min(recipe.eval.generate_rows, recipe.eval.samples)
    template = chat_template(tokenizer)
    asked: list[Question] = []
    for index in documents[choose_rows(len(documents), count)].tolist() if count else []:
        found = question(dataset, index, tokenizer, template)
        if found is not None:
            asked.append(found)
    texts = (
        answers(
            module,
            tokenizer,
            asked,
            max_new_tokens=recipe.eval.max_new_tokens,
            stop_ids=stop_ids(info),
            pad_id=info["pad_id"],
            device=device,
            rank=rank,
            world_size=world_size,
            autocast=autocast,
        )
        if asked
        else []
    )
    scores: dict[str, list[float]] = {name: [] for name in ("exact_match", "token_f1")}
    for q, answer in zip(asked, texts, strict=True):
        if "text" not in dataset.row(q.row):
            scores["exact_match"].append(metrics.exact_match(answer, q.expected))
            scores["token_f1"].append(metrics.token_f1(answer, q.expected))
    samples = [
        {"prompt": q.prompt, "expected": q.expected, "answer": answer}
        for q, answer in list(zip(asked, texts, strict=True))[: recipe.eval.samples]
    ]
    return {"scores": scores, "samples": samples}


def _agreement(scores: dict[str, list[float]], recipe: Recipe) -> dict[str, Any]:
    """Means of the wanted answer metrics with their intervals; None where no row could be asked."""
    out: dict[str, Any] = {"ci_answers": {}}
    for name in ("exact_match", "token_f1"):
        if name in recipe.eval.metrics:
            values = scores[name]
            out[name] = float(np.mean(values)) if values else None
            out["ci_answers"][name] = metrics.bootstrap_mean(values) if values else None
            out["answered_rows"] = len(values)
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
