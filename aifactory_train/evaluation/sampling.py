"""Sampled answers: several to each prompt, each with a random stream of its own.

What is drawn for a token is a function of the stream's key, the token's place and the model's probabilities, so that
answers do not depend on who computes them. Prompts of unequal length are padded on the left and read once; their keys
and values are then copied for the answers of the group, in room that is reserved once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from aifactory_train.data.sampler import splitmix64
from aifactory_train.evaluation.generate import LEAVE, text_config
from aifactory_train.evaluation.kv_cache import reserved_cache
from aifactory_train.model.causal_lm import Forward


@dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from: logits over ``temperature``, of these the ``top_k`` likeliest (0:
    all), of these the likeliest that hold ``top_p`` of the probability.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0


@dataclass
class Sampled:
    """One answer. logps: of each token, under the logits over the temperature, before anything is cut off; ended: its
    last token is a stop token.
    """

    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    ended: bool = False


def stream_keys(*parts: int | np.ndarray) -> np.ndarray:
    """uint64: a key for each combination of ``parts`` (integers, or arrays of them that broadcast)."""
    key = np.zeros(1, dtype=np.uint64)
    for part in parts:
        key = splitmix64(key ^ splitmix64(np.asarray(part, dtype=np.uint64)))
    return key


def uniforms(keys: np.ndarray, place: int) -> np.ndarray:
    """float64 ``[B]`` in [0, 1): the number at ``place`` of the streams ``keys`` (uint64 ``[B]``)."""
    return (stream_keys(keys, place) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw(logits: torch.Tensor, numbers: torch.Tensor, how: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens int64 ``[B]``, their log-probabilities fp32 ``[B]``) of logits fp32 ``[B, V]`` by ``numbers`` float64
    ``[B]`` in [0, 1): the token in whose share of the distribution function the number lies.
    """
    logps = torch.log_softmax(logits / how.temperature, dim=-1)
    weights = logps.double().exp()
    order = None
    if how.top_k or how.top_p < 1:
        weights, order = weights.sort(dim=-1, descending=True, stable=True)
        if how.top_k:
            weights[:, how.top_k :] = 0.0
        if how.top_p < 1:
            before = weights.cumsum(-1) - weights
            weights = weights.masked_fill(before >= how.top_p * weights.sum(-1, keepdim=True), 0.0)
    summed = weights.cumsum(-1)
    total = summed[:, -1:]
    # below the total also where the product is rounded up to it
    wanted = torch.minimum(numbers.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    place = torch.searchsorted(summed, wanted, right=True).clamp_max(weights.shape[1] - 1)
    tokens = place if order is None else order.gather(1, place)
    return tokens.squeeze(1), logps.gather(1, tokens).squeeze(1)


class Decoding:
    """Answers to some prompts, a forward pass at a time (:meth:`advance`).

    Args:
        module: called like :meth:`CausalLM.forward` with ``cache``.
        prompts: token ids, none empty.
        keys: uint64 ``[prompts, group]``, the streams of the answers (:func:`stream_keys`).
        stop_ids: tokens that end an answer, and belong to it.

    ``answers``: ``[prompts][group]``. The result is a function of the arguments and the weights, to the bit.
    """

    def __init__(
        self,
        module: nn.Module,
        prompts: Sequence[Sequence[int]],
        keys: np.ndarray,
        *,
        how: Sampling,
        max_new_tokens: int,
        stop_ids: Collection[int],
        pad_id: int,
        device: str,
    ):
        self.module, self.how, self.most, self.stops, self.device = module, how, max_new_tokens, set(stop_ids), device
        self.group = keys.shape[1]
        self.answers = [[Sampled() for _ in range(self.group)] for _ in prompts]
        self.rows = [answer for group in self.answers for answer in group]  # in the order of the tensors
        self.keys = keys.reshape(-1)
        width = max(len(prompt) for prompt in prompts)
        tokens = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
        mask = torch.zeros_like(tokens)
        for i, prompt in enumerate(prompts):
            tokens[i, width - len(prompt) :] = torch.tensor(list(prompt), dtype=torch.int64)
            mask[i, width - len(prompt) :] = 1
        self.tokens, self.mask = tokens.to(device), mask.to(device)
        self.places = (self.mask.cumsum(1) - 1).clamp_min(0)
        self.cache = reserved_cache(text_config(module), width + max_new_tokens)
        self.done = 0

    @torch.no_grad()
    def advance(self) -> bool:
        """One forward pass, and a token for every answer that has not ended; whether any is left."""
        logits = self.module(self.tokens, self.places, attention_mask=self.mask, cache=self.cache, task=Forward.DECODE)
        self.places = self.places[:, -1:] + 1
        if not self.done:
            self._spread(logits)
            logits = logits.repeat_interleave(self.group, 0)
        numbers = torch.from_numpy(uniforms(self.keys, self.done)).to(self.device)
        chosen, logps = draw(logits, numbers, self.how)
        self.done += 1
        for answer, token, logp in zip(self.rows, chosen.tolist(), logps.tolist(), strict=True):
            if not answer.ended:
                answer.tokens.append(token)
                answer.logps.append(logp)
                answer.ended = token in self.stops
        left = [k for k, answer in enumerate(self.rows) if not answer.ended]
        if not left or self.done == self.most:
            return False
        self.tokens = chosen.unsqueeze(1)
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], dim=1)
        if len(self.rows) - len(left) >= LEAVE * len(self.rows):
            self._keep(left)
        return True

    def _spread(self, logits: torch.Tensor) -> None:
        """From a row a prompt to a row an answer."""
        rows = torch.arange(len(logits), device=self.device).repeat_interleave(self.group)
        self.places, self.mask = self.places[rows], self.mask[rows]
        self.cache.batch_select_indices(rows)

    def _keep(self, left: list[int]) -> None:
        """Answers that have ended leave the batch."""
        rows = torch.tensor(left, device=self.device)
        self.tokens, self.places, self.mask = self.tokens[rows], self.places[rows], self.mask[rows]
        self.cache.batch_select_indices(rows)
        self.rows, self.keys = [self.rows[k] for k in left], self.keys[left]


def idle(module: nn.Module, pad_id: int, device: str) -> None:
    """A forward pass of one token, by a rank that has nothing to answer while the others have."""
    one = torch.full((1, 1), pad_id, dtype=torch.int64, device=device)
    with torch.no_grad():
        module(
            one,
            torch.zeros_like(one),
            attention_mask=torch.ones_like(one),
            cache=reserved_cache(text_config(module), 1),
            task=Forward.DECODE,
        )


@contextlib.contextmanager
def answering(module: nn.Module, device: str, autocast: torch.dtype | None) -> Iterator[None]:
    """Within it ``module`` is in the mode and the type in which it answers."""
    was_training = module.training
    module.eval()
    types = torch.autocast(device.split(":")[0], dtype=autocast) if autocast is not None else contextlib.nullcontext()
    try:
        with types:
            yield
    finally:
        module.train(was_training)


def run_all(
    module: nn.Module,
    mine: Sequence[Callable[[], Decoding]],
    rounds: int,
    *,
    together: Callable[[bool], bool] | None,
    pad_id: int,
    device: str,
    beat: Callable[[], None],
) -> list[Decoding]:
    """Carry out the decodings ``mine`` of this rank, one after another.

    ``together``: where forward passes are collective, what tells whether any rank goes on; every rank then makes
    ``rounds`` decodings, idle ones where it has fewer, each of as many passes as the longest of the ranks. ``beat`` is
    called now and then.
    """
    found: list[Decoding] = []
    for number in range(len(mine) if together is None else rounds):
        decoding = mine[number]() if number < len(mine) else None
        going, passes = decoding is not None, 0
        while True:
            if decoding is not None and going:
                going = decoding.advance()
            else:
                idle(module, pad_id, device)
            if passes % 16 == 0:
                beat()
            passes += 1
            if not (going if together is None else together(going)):
                break
        found += [decoding] if decoding is not None else []
    return found
