"""Greedy answers from a :class:`~aifactory_train.model.CausalLM`: KV cache, prompts padded on the left, stops at the token that
was supervised as end of turn."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from aifactory_train.errors import UserError

#: Prompts decoded together.
BATCH = 16


@torch.no_grad()
def generate(
    module: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop_ids: Collection[int],
    pad_id: int,
    device: str,
    batch: int = BATCH,
) -> list[list[int]]:
    """New token ids for each prompt, greedy, without the stop token.

    ``module`` is called like :meth:`CausalLM.forward` with ``cache``; under a sharded engine every rank must call this
    function with the same prompts (the forward passes are collective). ``prompts`` must not be empty lists.
    """
    if any(len(prompt) == 0 for prompt in prompts):
        raise UserError("a prompt without tokens cannot be answered")
    was_training = module.training
    module.eval()
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # like lengths together: little padding
    try:
        for start in range(0, len(order), batch):
            chosen = order[start : start + batch]
            found = _decode(module, [prompts[i] for i in chosen], max_new_tokens, set(stop_ids), pad_id, device)
            for i, answer in zip(chosen, found, strict=True):
                answers[i] = answer
    finally:
        module.train(was_training)
    return answers


def _decode(
    module: nn.Module, prompts: list[Sequence[int]], max_new_tokens: int, stops: set[int], pad_id: int, device: str
) -> list[list[int]]:
    """One batch: prefill, then a token at a time until every row has stopped."""
    from transformers import DynamicCache

    width = max(len(prompt) for prompt in prompts)
    tokens = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(prompts), width), dtype=torch.int64)
    for i, prompt in enumerate(prompts):
        tokens[i, width - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.int64)
        mask[i, width - len(prompt) :] = 1
    tokens, mask = tokens.to(device), mask.to(device)
    position_ids = (mask.cumsum(1) - 1).clamp_min(0)
    cache = DynamicCache(config=text_config(module))
    answers: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for _ in range(max_new_tokens):
        logits = module(tokens, position_ids, attention_mask=mask, cache=cache)
        chosen = logits.argmax(dim=-1)
        for i, token in enumerate(chosen.tolist()):
            if i not in open_rows:
                continue
            if token in stops:
                open_rows.discard(i)
            else:
                answers[i].append(token)
        if not open_rows:
            break
        tokens, position_ids = chosen.unsqueeze(1), position_ids[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return answers


def text_config(module: nn.Module) -> Any:
    """The transformers configuration inside a (wrapped) CausalLM."""
    inner: Any = module
    while hasattr(inner, "module"):
        inner = inner.module  # DDP, DeepSpeed
    return inner.language_model.config
