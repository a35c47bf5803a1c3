"""The key/value cache of :mod:`aifactory_train.evaluation.generate`: room is reserved once, and rows that have ended
give theirs back.

transformers' ``DynamicCache`` concatenates every layer anew for each token: in a profile of 40 answers of a 135M model
on a busy CPU that was 37 % of the time. Here a token is written behind the others in a buffer, and attention reads
views of it.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class ReservedLayer(DynamicLayer):
    """One layer's keys and values ``[B, H, T, D]``: views of buffers with room for ``reserve`` tokens (more: they grow
    by half).
    """

    def __init__(self, reserve: int):
        super().__init__()
        self.reserve = reserve
        self.buffers: list[torch.Tensor] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append states ``[B, H, t, D]``; returns all of them so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if not self.buffers or end > self.buffers[0].shape[-2]:
            room = max(self.reserve, end if not self.buffers else end + end // 2)
            self.buffers = [self._moved(old, new, start, room) for old, new in self._pairs(key_states, value_states)]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:end] = states
        return self._show(end)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices`` (int64 ``[b]``) alone."""
        length = self.get_seq_length()
        if length:
            kept = [buffer[:, :, :length].index_select(0, indices) for buffer in self.buffers]
            self.buffers = [self._moved(k, k, length, b.shape[-2]) for k, b in zip(kept, self.buffers, strict=True)]
            self._show(length)

    def _show(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = (buffer[:, :, :length] for buffer in self.buffers)
        self.keys, self.values = keys, values
        return keys, values

    def _pairs(self, *states: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self.buffers or states, states, strict=True))

    @staticmethod
    def _moved(old: torch.Tensor, like: torch.Tensor, length: int, room: int) -> torch.Tensor:
        """A new buffer in the form of ``like`` with the first ``length`` tokens of ``old``."""
        buffer = like.new_empty(*like.shape[:2], room, like.shape[-1])
        if length:
            buffer[:, :, :length] = old[:, :, :length]
        return buffer


def reserved_cache(config: Any, reserve: int) -> DynamicCache:
    """transformers' cache for ``config``, with room for ``reserve`` tokens in every layer that keeps all of them."""
    cache = DynamicCache(config=config)
    # layers with a window or a state of their own stay as transformers builds them
    cache.layers = [ReservedLayer(reserve) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache
