"""Greedy answers from a :class:`~aifactory_train.model.causal_lm.CausalLM`: KV cache, prompts padded on the left, stops
at the token that was supervised as end of turn; rows that have ended leave the batch."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from aifactory_train.core.errors import UserError
from aifactory_train.model.attention import Documents
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

    if not caches(module):
        return _decode_anew(module, prompts, max_new_tokens, stops, pad_id, device)
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


def caches(module: nn.Module) -> bool:
    """Whether the model goes on from a cache of keys and values: not where it computes as transformers has it, where
    it takes no such cache (Mamba, RWKV), and where no layer of it keeps any.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    core = _core(module)
    if core.own or "past_key_values" not in inspect.signature(core.backbone.forward).parameters:
        return False
    if not core.stateful:
        return True
    return any(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=core.language_model.config).layers)


def _decode_anew(
    module: nn.Module, prompts: list[Sequence[int]], max_new_tokens: int, stops: set[int], pad_id: int, device: str
) -> list[list[int]]:
    """The same without a cache: every token reads the whole text again, in the way that training computes it."""
    texts = [list(prompt) for prompt in prompts]
    running = list(range(len(texts)))
    for _ in range(max_new_tokens):
        width = max(len(texts[i]) for i in running)
        rows = torch.full((len(running), width), pad_id, dtype=torch.int64)
        for row, i in zip(rows, running, strict=True):
            row[: len(texts[i])] = torch.tensor(texts[i], dtype=torch.int64)
        ends = torch.tensor([k * width + len(texts[i]) - 1 for k, i in enumerate(running)])
        places = torch.arange(width).expand(rows.shape)
        documents = Documents.of(torch.arange(len(running) + 1) * width, device)
        logits = module(rows.to(device), places.to(device), documents, ends.to(device), task=Forward.LOGITS)
        chosen = dict(zip(running, logits.argmax(dim=-1).tolist(), strict=True))
        running = [i for i in running if chosen[i] not in stops]
        for i in running:
            texts[i].append(chosen[i])
        if not running:
            break
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]


def _core(module: nn.Module) -> Any:
    inner: Any = module
    while hasattr(inner, "module"):
        inner = inner.module  # DDP, DeepSpeed
    return inner


def text_config(module: nn.Module) -> Any:
    """The transformers configuration inside a (wrapped) CausalLM."""
    return _core(module).language_model.config
