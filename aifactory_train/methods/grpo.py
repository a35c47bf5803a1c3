"""Learning from rewards of sampled answers: GRPO and its variants, on the loop and the batches of supervised
fine-tuning.

The parts: :mod:`prompts` (what is asked), :mod:`rollouts` (answers, sampled and judged), :mod:`rewards`,
:mod:`grpo_loss` (formulas), :mod:`frozen` (the reference), :mod:`completions` (what is kept of the answers). This file
puts them into the run.

A step is its prompts. Their answers are made before its batches, as a function of seed, step, prompts and weights; the
step's documents are then those answers, dealt to the ranks like any others.
"""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.data import Cursor, load_tokenizer
from aifactory_train.evaluation.answers import stop_ids
from aifactory_train.evaluation.generate import caches
from aifactory_train.methods.base import MadeDocuments
from aifactory_train.methods.completions import Completions
from aifactory_train.methods.frozen import FrozenWeights
from aifactory_train.methods.grpo_loss import SUMS, GroupObjective, advantages, spread, token_weights, units_of
from aifactory_train.methods.prompts import PromptTokens
from aifactory_train.methods.reference import score_tokens
from aifactory_train.methods.rewards import Reward, rewards_of
from aifactory_train.methods.rollouts import Rollouts, RolloutSampler, SampledAnswer
from aifactory_train.methods.supervised import Supervised
from aifactory_train.parallel.batches import micro_batch, to_device

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.data import PreparedData
    from aifactory_train.methods.base import RunContext, StepContext
    from aifactory_train.parallel.engine import DeviceBatch


class Grpo(Supervised):
    """Group-relative policy optimisation of a run."""

    def __init__(self, recipe: Recipe):
        assert recipe.methods.grpo is not None
        super().__init__(recipe)
        self.settings = recipe.methods.grpo
        self.rewards: list[Reward] = rewards_of(recipe)
        self.tokenizer: Any = None
        self.sampler: RolloutSampler | None = None
        self.reference: FrozenWeights | None = None
        self.completions: Completions | None = None
        self.waiting: dict[int, Rollouts] = {}  # by step; those that a checkpoint keeps
        self.packed: dict[str, list[Any]] = {}
        self.now: Rollouts | None = None
        self.worth = np.zeros((0, self.settings.group))
        self.reference_logps: list[np.ndarray] | None = None
        self.flat_steps = 0  # in a row, without a difference between the rewards of any group
        self.seconds = 0.0
        self.place = (0, Cursor())  # (step, cursor before it)
        self.sums = torch.zeros(len(SUMS), dtype=torch.float64)

    # ---- data

    def view(self, data: PreparedData) -> PreparedData:
        """The prepared data as prompts. Raises :class:`UserError` where no row can be asked, and for a stop that is no
        token."""
        self.tokenizer = load_tokenizer(self.recipe)
        self.stops = stop_ids(data.tokenizer_info)
        for text in self.settings.stop:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            if len(ids) != 1:
                raise UserError(
                    f"'{text}' is {len(ids)} tokens of this tokenizer, and answers end at one",
                    where="methods.grpo.stop",
                    fix="leave it out: the end of turn ends answers anyway",
                )
            self.stops += [token for token in ids if token not in self.stops]
        if not self.stops:
            raise UserError("this tokenizer has no token that ends an answer", where="model.base", fix="name one: stop")
        train = PromptTokens(data.train, self.recipe, self.tokenizer)
        warning, report = train.warning(), data.report
        if warning is not None:
            report = {**report, "warnings": [*report.get("warnings", []), warning]}
        return dataclasses.replace(data, train=train, report=report)

    # ---- before the first step

    def begin(self, run: RunContext) -> None:
        """Keep the weights as they are before the first step, where a reference is asked for."""
        if self.settings.kl:
            self.reference = FrozenWeights(run.engine)

    def prepare(self, run: RunContext, *, resumed: bool) -> list[tuple[str, str, str]]:
        """What samples, judges and keeps. Raises :class:`UserError` for a model that keeps no keys and values."""
        if not caches(run.engine.module):
            raise UserError(
                "this model keeps no cache of keys and values, so that each token of an answer would read the whole "
                "text anew",
                where="methods.grpo",
                fix="a base with attention as transformers' Llama or Qwen have it",
            )
        how, self.sums = self.settings, self.sums.to(run.world.device)
        self.sampler = RolloutSampler(run, how, self.rewards, self.tokenizer, self.stops)
        self.completions = Completions(run, how.keep)
        self.waiting = {
            int(step): self._rollouts(run, [SampledAnswer.unpacked(values) for values in answers])
            for step, answers in self.packed.items()
        }
        self.packed = {}
        lines = [(f"reward {r.name}", f"weight {r.weight:g}", r.origin) for r in self.rewards]
        if self.reference is not None:
            size = f"{self.reference.nbytes() / 2**20:.3g} MiB a rank for its trained parameters"
            lines.append(("reference", "the model before its first step", size))
        return lines

    def _rollouts(self, run: RunContext, answers: list[SampledAnswer]) -> Rollouts:
        train: Any = run.data.train
        return Rollouts(self.settings, train, answers, [reward.weight for reward in self.rewards])

    # ---- a step

    def before_step(self, step: StepContext) -> None:
        """Answers to the step's prompts, unless an earlier step had them sampled; their advantages, and what the
        reference says of them. Raises :class:`RunFailed` for rewards that fail, or tell nothing apart."""
        assert self.sampler is not None and self.completions is not None
        began = time.perf_counter()
        self.sums.zero_()
        if step.step not in self.waiting:
            self.waiting = self.sampler.sample(self._steps_from(step))
        self.now = self.waiting.pop(step.step)
        self.worth = advantages(self.now.totals, self.settings.scale)
        self._look_for_signal(step)
        self.reference_logps = None
        if self.reference is not None and len(self.now):
            with self.reference.in_place():
                self.reference_logps = score_tokens(step.run, self.now, self.settings.temperature)
        self.seconds = time.perf_counter() - began
        self.completions.write(step, self.now, self.worth, [reward.name for reward in self.rewards])

    def _steps_from(self, step: StepContext) -> dict[int, np.ndarray]:
        """The prompts of this step and of those that are sampled with it."""
        every, run = self.settings.rollout_steps, step.run
        steps = {step.step: step.documents}
        last = min(run.total_steps, (step.step // every + 1) * every)
        number, cursor = self.place if self.place[0] <= step.step else (0, Cursor())
        while every > 1 and number < last:
            documents, following = run.sampler.step(cursor)
            if number >= step.step:
                steps[number] = documents
                if number == step.step:
                    self.place = (number, cursor)
            number, cursor = number + 1, following
        return steps

    def _look_for_signal(self, step: StepContext) -> None:
        assert self.now is not None
        if spread(self.now.totals).any():
            self.flat_steps = 0
            return
        self.flat_steps += 1
        if self.flat_steps < self.settings.no_signal_steps:
            return
        seen = [f"{name} {value:g}" for name, value in self._means(self.now).items()]
        failed = sum(answer.failed for answer in self.now.answers)
        raise RunFailed(
            f"for {self.flat_steps} steps the answers to every prompt had the same reward, so nothing is learnt; in "
            f"the last one: {', '.join(seen) or 'none judged'}; {failed} of {len(self.now.answers)} answers cut off or "
            "empty",
            where=f"methods.grpo.reward, step {step.step + 1}",
            fix="a reward that is met now and then (a supervised run first, an easier reward beside it), a larger "
            "methods.grpo.group or temperature, longer max_new_tokens",
        )

    def _means(self, now: Rollouts) -> dict[str, float]:
        """By reward, its mean over the answers that were judged."""
        found = [answer.rewards for answer in now.answers if answer.rewards is not None]
        return {r.name: float(np.mean([one[k] for one in found])) for k, r in enumerate(self.rewards) if found}

    def made(self, step: StepContext) -> MadeDocuments | None:
        """The step's documents are its answers."""
        assert self.now is not None
        return MadeDocuments(self.now.lengths, self.now.supervised)

    def micro_batch(self, run: RunContext, share: np.ndarray) -> tuple[DeviceBatch, np.ndarray, np.ndarray]:
        """(batch, its documents, their lengths) of the answers ``share``. Before the first step, when only memory is
        tried, ``share`` are prompts, and each has a longest answer."""
        now, device = self.now, run.world.device
        if now is None:
            now = self._longest(run, share)
            share = np.arange(len(now))
        batch = micro_batch(now, share, self.recipe.data.batching, run.pad_id, device)  # type: ignore[arg-type]
        counts = [int(n) for n in now.supervised[share]]
        numbers = now.taking[share]
        worth = self.worth.ravel()[numbers] if self.now is not None else np.ones(len(numbers))
        if self.settings.ratio == "token":
            worth = np.repeat(worth, counts)
        sampled = [now.answers[int(i)].logps for i in numbers]
        reference = None if self.reference_logps is None else [self.reference_logps[int(i)] for i in share]

        def placed(values: np.ndarray) -> torch.Tensor:
            return to_device(torch.from_numpy(values.astype(np.float32)), device)

        def joined(parts: list[np.ndarray]) -> torch.Tensor:
            return placed(np.concatenate(parts) if parts else np.zeros(0))

        batch.objective = GroupObjective(
            settings=self.settings,
            counts=counts,
            advantages=placed(worth),
            sampled=joined(sampled),
            reference=None if reference is None else joined(reference),
            weights=placed(token_weights(self.settings, counts)),
            sums=self.sums,
        )
        return batch, share, now.lengths[share]

    def _longest(self, run: RunContext, units: np.ndarray) -> Rollouts:
        count = self.settings.max_new_tokens
        tokens, logps = np.full(count, run.pad_id, dtype=np.int32), np.zeros(count, dtype=np.float32)
        each = [SampledAnswer(int(u), tokens, logps, True, "-", [0.0] * len(self.rewards)) for u in units]
        group = self.settings.group
        full = self._rollouts(run, [answer for answer in each for _ in range(group)])
        full.taking = full.taking[::group]
        full.lengths, full.supervised = full.lengths[::group], full.supervised[::group]
        return full

    def units(self, supervised: int) -> int:
        """See ``methods.grpo.loss``."""
        assert self.now is not None
        return units_of(self.settings, self.now.supervised)

    # ---- what is said of it

    def figures(self) -> dict[str, float]:
        """Of the step, over all ranks: ``reward`` (mean over answers of the weighted sum of rewards), ``reward_std``
        (mean over prompts of the standard deviation within a group), each ``reward_NAME`` (mean over judged answers),
        ``flat_groups`` (share of prompts whose answers all had one reward), ``kl`` (nats a token, from the reference;
        without one from the policy that sampled), ``clipped`` (share of ratios that were cut), ``completion_tokens``
        (mean), ``truncated`` and ``empty`` (numbers of answers), ``rollout_seconds``.
        """
        assert self.now is not None
        sums = self.sums.clone()
        dist.all_reduce(sums)
        found = dict(zip(SUMS, sums.tolist(), strict=True))
        answers, deviation = self.now.answers, spread(self.now.totals)
        taking = self.now.totals[np.isfinite(self.now.totals)]
        return {
            "reward": float(taking.mean()) if len(taking) else 0.0,
            "reward_std": float(deviation.mean()),
            **{f"reward_{name}": value for name, value in self._means(self.now).items()},
            "flat_groups": float((deviation == 0).mean()),
            "kl": found["kl"] / max(1.0, found["tokens"]),
            "clipped": found["clipped"] / max(1.0, found["ratios"]),
            "completion_tokens": float(np.mean([len(answer.tokens) for answer in answers])),
            "truncated": sum(not answer.ended for answer in answers),
            "empty": sum(answer.ended and not answer.text for answer in answers),
            "rollout_seconds": round(self.seconds, 4),
        }

    def state(self) -> dict[str, Any]:
        """Answers that later steps will learn from, and how long rewards have told nothing apart."""
        waiting = {str(step): [a.packed() for a in rollouts.answers] for step, rollouts in self.waiting.items()}
        return {"flat_steps": self.flat_steps, "waiting": waiting}

    def load(self, state: dict[str, Any]) -> None:
        """See :meth:`state`."""
        self.flat_steps = int(state.get("flat_steps", 0))
        self.packed = dict(state.get("waiting", {}))
