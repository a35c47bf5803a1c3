"""Rollouts: answers of the model as it is, sampled for the prompts of a step and judged.

They are a function of seed, step, prompts and weights. Prompts are answered in batches that a step alone decides, each
by one rank; which one changes nothing. Every rank then holds all answers, so that a step can be dealt out anew.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.evaluation.answers import is_sharded
from aifactory_train.evaluation.sampling import Decoding, Sampled, Sampling, answering, run_all, stream_keys
from aifactory_train.methods.reference import autocast_of

if TYPE_CHECKING:
    from aifactory_train.config.grpo_block import GrpoConfig
    from aifactory_train.methods.base import RunContext
    from aifactory_train.methods.prompts import PromptTokens
    from aifactory_train.methods.rewards import Reward


@dataclasses.dataclass
class SampledAnswer:
    """One sampled answer to the prompt ``unit``. tokens int32, logps fp32 ``[n]``, n at least 1; text: without the stop
    token and special tokens; rewards: unweighted, one for each reward, None where it was not judged.
    """

    unit: int
    tokens: np.ndarray
    logps: np.ndarray
    ended: bool
    text: str
    rewards: list[float] | None = None

    @property
    def failed(self) -> bool:
        """Whether it was cut off or says nothing: it is not judged then."""
        return not self.ended or not self.text

    def packed(self) -> list[Any]:
        """As JSON values, to the bit."""
        arrays = (self.tokens.astype("<i4"), self.logps.astype("<f4"))
        return [
            self.unit,
            *(base64.b64encode(a.tobytes()).decode() for a in arrays),
            self.ended,
            self.text,
            self.rewards,
        ]

    @classmethod
    def unpacked(cls, values: list[Any]) -> SampledAnswer:
        """What :meth:`packed` gave."""
        unit, tokens, logps, *rest = values
        read, data = np.frombuffer, base64.b64decode
        return cls(unit, read(data(tokens), dtype="<i4"), read(data(logps), dtype="<f4"), *rest)


class Rollouts:
    """The answers of one step, ``group`` to each prompt in the order of the step's documents, as documents to learn
    from (the part of :class:`TokenDataset` that collating and scoring read).

    totals float64 ``[prompts, group]``: rewards times weights, NaN where an answer takes no part; taking: int64, the
    answers that are documents, by their number.
    """

    name = "rollouts"

    def __init__(self, how: GrpoConfig, train: PromptTokens, answers: list[SampledAnswer], weights: Sequence[float]):
        self.answers, self.prompts = answers, [train.questions[answer.unit].prompt_ids for answer in answers]
        found = np.asarray(
            [np.nan if a.rewards is None else float(np.dot(a.rewards, weights)) for a in answers], dtype=np.float64
        ).reshape(-1, how.group)
        if how.truncated == "lowest":
            for group in found:
                judged = group[np.isfinite(group)]
                group[~np.isfinite(group)] = min(0.0, judged.min()) if len(judged) else 0.0
        self.totals = found
        self.taking = np.flatnonzero(np.isfinite(found.ravel()))
        self.supervised = np.asarray([len(answers[i].tokens) for i in self.taking], dtype=np.int32)
        asked = np.asarray([len(self.prompts[i]) for i in self.taking], dtype=np.int32)
        self.lengths = asked + self.supervised

    def __len__(self) -> int:
        return len(self.taking)

    def tokens(self, i: int) -> np.ndarray:
        number = int(self.taking[i])
        return np.concatenate([np.asarray(self.prompts[number], dtype=np.int64), self.answers[number].tokens])

    def mask(self, i: int) -> np.ndarray:
        carries = np.ones(int(self.lengths[i]), dtype=bool)
        carries[: -int(self.supervised[i])] = False
        return carries

    def text_mask(self, i: int) -> np.ndarray:
        return self.mask(i)

    def text_bytes(self, i: int) -> int:
        return len(self.answers[int(self.taking[i])].text.encode())


class RolloutSampler:
    """Makes rollouts; see the module. stop_ids: tokens that end an answer."""

    def __init__(self, run: RunContext, how: GrpoConfig, rewards: list[Reward], tokenizer: Any, stop_ids: list[int]):
        self.run, self.how, self.rewards, self.tokenizer, self.stop_ids = run, how, rewards, tokenizer, stop_ids
        self.train: PromptTokens = run.data.train  # type: ignore[assignment]

    def sample(self, steps: dict[int, np.ndarray]) -> dict[int, Rollouts]:
        """Rollouts of some steps by the weights of now; ``steps``: by step, its prompts. Collective. Raises
        :class:`RunFailed` on every rank where a reward fails on one."""
        world = self.run.world
        batches = [(step, part) for step, units in steps.items() for part in self._batches(units)]
        mine = batches[world.rank :: world.size]
        error: UserError | None = None
        found: list[tuple[int, int, SampledAnswer]] = []
        decodings = self._decode([(step, steps[step][part]) for step, part in mine], -(-len(batches) // world.size))
        try:
            for (step, places), decoding in zip(mine, decodings, strict=True):
                for place, group in zip(places, decoding.answers, strict=True):
                    found += [(step, place, self._judged(int(steps[step][place]), one)) for one in group]
        except UserError as failed:
            error = failed
        boxes: list[Any] = [(found, error)]
        if world.size > 1:
            boxes = [None] * world.size
            dist.all_gather_object(boxes, (found, error))
        for rank, (_, failed_there) in enumerate(boxes):
            if failed_there is not None:
                raise failed_there.of(rank if world.size > 1 else None)
        groups: dict[tuple[int, int], list[SampledAnswer]] = {}
        for there, _ in boxes:
            for step, place, answer in there:
                groups.setdefault((step, place), []).append(answer)
        weights = [reward.weight for reward in self.rewards]
        return {
            step: Rollouts(
                self.how, self.train, [a for place in range(len(units)) for a in groups[step, place]], weights
            )
            for step, units in steps.items()
        }

    def _batches(self, units: np.ndarray) -> list[list[int]]:
        """Places in ``units`` of the prompts that are answered together: like lengths, so that little is padded."""
        lengths = [len(self.train.questions[int(unit)].prompt_ids) for unit in units]
        order = sorted(range(len(units)), key=lambda place: lengths[place])
        most = self.how.rollout_prompts
        return [order[start : start + most] for start in range(0, len(order), most)]

    def _decode(self, mine: list[tuple[int, np.ndarray]], rounds: int) -> list[Decoding]:
        """The answers to the batches ``mine`` (step, prompts)."""
        run, how, device = self.run, self.how, self.run.world.device
        module = run.engine.module
        sharded = is_sharded(module)
        # DDP adds nothing to a forward without gradients
        target = module if sharded else getattr(module, "module", module)
        members = np.arange(how.group)

        def begun(step: int, units: np.ndarray) -> Decoding:
            return Decoding(
                target,
                [self.train.questions[int(unit)].prompt_ids for unit in units],
                np.stack([stream_keys(run.recipe.train.seed, step, int(unit), members) for unit in units]),
                how=Sampling(how.temperature, how.top_p, how.top_k),
                max_new_tokens=how.max_new_tokens,
                stop_ids=self.stop_ids,
                pad_id=run.pad_id,
                device=device,
            )

        def any_rank(going: bool) -> bool:
            flag = torch.tensor([int(going)], device=device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            return bool(flag.item())

        with answering(target, device, autocast_of(run)):
            return run_all(
                target,
                [functools.partial(begun, step, units) for step, units in mine],
                rounds,
                together=any_rank if sharded and run.world.size > 1 else None,
                pad_id=run.pad_id,
                device=device,
                beat=lambda: run.beat("rollout"),
            )

    def _judged(self, unit: int, one: Sampled) -> SampledAnswer:
        if not np.isfinite(one.logps).all():
            raise RunFailed("the model gives no probabilities any more: its logits are not finite")
        said = one.tokens[:-1] if one.ended else one.tokens
        text = self.tokenizer.decode(said, skip_special_tokens=True).strip()
        tokens, logps = np.asarray(one.tokens, dtype=np.int32), np.asarray(one.logps, dtype=np.float32)
        answer = SampledAnswer(unit, tokens, logps, one.ended, text)
        if not answer.failed:
            asked = self.train.questions[unit]
            answer.rewards = [reward(asked.prompt, text, asked.expected) for reward in self.rewards]
        return answer
