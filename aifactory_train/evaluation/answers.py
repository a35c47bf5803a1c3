"""Questions of held-out rows, generated answers, and their metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from aifactory_train import metrics
from aifactory_train.core.figures import duration
from aifactory_train.evaluation.generate import generate
from aifactory_train.evaluation.likelihood import choose_rows
from aifactory_train.evaluation.results import Question, SetResult

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.data import TokenDataset


#: A text row asks for its own continuation after this many tokens (samples only; it is no question with an answer).
TEXT_PROMPT_TOKENS = 32


def question(dataset: TokenDataset, index: int, tokenizer, template) -> Question | None:
    """The last supervised answer of a chat row with all that came before it, or the beginning of a text row.

    None where there is nothing to ask: the answer is a tool call, or the text is shorter than the beginning.
    """
    from aifactory_train.data.template import TemplateRefused
    from aifactory_train.data.turns import supervised_turns

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
        text, ids = template.ask(messages[:last], row.get("tools"))
    except TemplateRefused:
        return None
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
    took: Callable[[float], None] | None = None,
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
        took=took,
    )
    return decoded(tokenizer, ids)


def decoded(tokenizer, ids: Sequence[Sequence[int]]) -> list[str]:
    """Answers as text."""
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
    """Greedy token ids after each prompt (:func:`aifactory_train.evaluation.generate.generate` with ``options``), on
    every rank.
    """
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


def answer_rows(
    module: nn.Module,
    tokenizer,
    result: SetResult,
    recipe: Recipe,
    info: dict[str, Any],
    how: dict[str, Any],
    tell: Callable[[str], None] | None = None,
) -> tuple[list[Question], list[str], list[bool]]:
    """The questions of one set, their generated answers, and which of them were cut off although the expected answer
    would have fit; ``tell`` hears how many, and about how long they take."""
    wanted = set(metrics.ANSWER_METRICS) & set(recipe.eval.metrics)
    count = recipe.eval.generate_rows if wanted else min(recipe.eval.generate_rows, recipe.eval.samples)
    documents, template = result.scored.documents, chat_template(tokenizer, recipe)
    asked: list[Question] = []
    for index in documents[choose_rows(len(documents), count)].tolist() if count else []:
        found = question(result.dataset, index, tokenizer, template)
        if found is not None:
            asked.append(found)
    if not asked:
        return [], [], []
    most = recipe.eval.max_new_tokens
    took: Callable[[float], None] | None = None
    if tell is not None:
        tell(f"answering {len(asked):,} questions, at most {most:,} tokens each")
        took = lambda seconds: tell(f"  they take at most about {duration(seconds)}")  # noqa: E731
    prompts = [q.prompt_ids for q in asked]
    ids = continuations(module, prompts, max_new_tokens=most, stop_ids=stop_ids(info), took=took, **how)
    cut_off = [
        len(found) >= most and len(tokenizer.encode(q.expected, add_special_tokens=False)) < most
        for q, found in zip(asked, ids, strict=True)
    ]
    return asked, decoded(tokenizer, ids), cut_off


def stop_ids(info: dict[str, Any]) -> list[int]:
    """Tokens that end an answer: the supervised end of turn first, then the tokenizer's end of text."""
    found = [*info["stop_ids"]]
    if info["eos_id"] is not None and info["eos_id"] not in found:
        found.append(info["eos_id"])
    return found


def chat_template(tokenizer, recipe: Recipe | None = None):
    """Conversations as the data path renders and tokenises them (:class:`aifactory_train.data.control_text.Prompts`),
    or None.
    """
    from aifactory_train.data.tokenizer import prompts_of

    return prompts_of(tokenizer, recipe)
