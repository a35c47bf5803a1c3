"""Greedy answers from a :class:`~aifactory_train.model.causal_lm.CausalLM`: KV cache, prompts padded on the left, stops
at the token that was supervised as end of turn; rows that have ended leave the batch."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from aifactory_train.core.errors import UserError
from aifactory_train.model.causal_lm import Forward

#: Prompts decoded together: at most this many, and no more than so many tokens with their answers (padding counts).
BATCH_ROWS, BATCH_TOKENS = 64, 32_768
#: Share of a batch that must have ended before its rows are taken out: taking them out copies the cache once.
LEAVE = 0.25


@torch.no_grad()
def generate(
    module: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    pad_id: int,
    device: str,
    batch: int = BATCH_ROWS,
    took: Callable[[float], None] | None = None,
) -> list[list[int]]:
    """New token ids for each prompt, greedy, without the stop token; at most ``batch`` prompts at a time.

    ``module`` is called like :meth:`CausalLM.forward` with ``cache``; under a sharded engine every rank must call this
    function with the same prompts (the forward passes are collective). ``prompts`` must not be empty lists. The answer
    to a prompt does not depend on the prompts beside it, except for the rounding of sums whose order the batch changes.
    ``took`` hears, once the first tokens are there, how many seconds all answers take if none stops early.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise UserError("a prompt without tokens cannot be answered")
    was_training = module.training
    module.eval()
    answers: list[list[int]] = [[] for _ in prompts]
    try:
        together = batches([len(prompt) for prompt in prompts], max_new_tokens, batch)
        for number, chosen in enumerate(together):
            first = (lambda s: took(s * len(together))) if took is not None and number == 0 else None
            found = _decode(module, [prompts[i] for i in chosen], max_new_tokens, set(stop_ids), pad_id, device, first)
            for i, answer in zip(chosen, found, strict=True):
                answers[i] = answer
    finally:
        module.train(was_training)
    return answers


def batches(lengths: Sequence[int], max_new_tokens: int, most: int = BATCH_ROWS) -> list[list[int]]:
    """Prompts (indices into ``lengths``) of each batch: like lengths together, so that little is padded."""
    found: list[list[int]] = []
    for i in sorted(
        range(len(lengths)), key=lambda i: lengths[i]
    ):  # the newcomer is the longest: the width of its batch
        full = not found or len(found[-1]) == most
        if full or (len(found[-1]) + 1) * (lengths[i] + max_new_tokens) > BATCH_TOKENS:
            found.append([])
        found[-1].append(i)
    return found


def _decode(
    module: nn.Module,
    prompts: list[Sequence[int]],
    max_new_tokens: int,
    stops: set[int],
    pad_id: int,
    device: str,
    took: Callable[[float], None] | None,
) -> list[list[int]]:
    """One batch: prefill, then a token at a time until every row has stopped."""
    from aifactory_train.evaluation.kv_cache import reserved_cache

    width = max(len(prompt) for prompt in prompts)
    tokens = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        tokens[i, width - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.int64)
        mask[i, width - len(prompt) :] = 1
    tokens, mask = tokens.to(device), mask.to(device)
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    cache = reserved_cache(text_config(module), width + max_new_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # of the prompts, in the order of the tensors
    running = set(rows)
    began = step = time.monotonic()
    for left in range(max_new_tokens, 0, -1):
        if took is not None and left == max_new_tokens - 2:  # the prompt was read, and one token followed
            took((time.monotonic() - began) / 2 + (time.monotonic() - step) * max_new_tokens)
        step = time.monotonic()
        logits = module(tokens, position_ids, attention_mask=mask, cache=cache, task=Forward.DECODE)
        chosen = logits.argmax(dim=-1)
        for i, token in zip(rows, chosen.tolist(), strict=True):
            if i not in running:
                continue
            if token in stops:
                running.discard(i)
            else:
                answers[i].append(token)
        if not running or left == 1:
            break
        tokens, position_ids = chosen.unsqueeze(1), position_ids[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        if len(rows) - len(running) >= LEAVE * len(rows):
            kept = torch.tensor([k for k, i in enumerate(rows) if i in running], device=device)
            tokens, position_ids, mask = tokens[kept], position_ids[kept], mask[kept]
            cache.batch_select_indices(kept)
            rows = [i for i in rows if i in running]
    return answers


def text_config(module: nn.Module) -> Any:
    """The transformers configuration inside a (wrapped) CausalLM."""
    inner: Any = module
    while hasattr(inner, "module"):
        inner = inner.module  # DDP, DeepSpeed
    return inner.language_model.config
