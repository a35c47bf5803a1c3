"""The recipe's ``methods.grpo``: a model that learns from rewards of its own answers."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator, model_validator

from aifactory_train.config.strict import Strict

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe

#: Metrics of answers (metrics/registry.py) that judge one answer by itself.
RewardMetric = Literal[
    "exact_match",
    "token_f1",
    "accuracy",
    "micro_f1",
    "macro_f1",
    "chrf",
    "chrf_pp",
    "rouge_l",
    "numeric_match",
    "valid_json",
    "valid_xml",
]

#: Kinds of rewards that are not built, and why.
_NOT_BUILT = {
    "python_tests": "unit tests run answers as programs, and there is no locked-down process for that here: check the "
    "answer without running it, by a function (file, function)",
    "model": "a reward model would be a second model in memory at every step: score with a function (file, function), "
    "or train on its verdicts with methods.preference",
}


class RewardConfig(Strict):
    """One reward of an answer: a metric, a regular expression, or a function of yours."""

    metric: RewardMetric | None = Field(None, description="A metric of answers (docs/metrics.md), 0 to 1.")
    pattern: str | None = Field(
        None, description="A regular expression of Python: 1 where it is found in the answer, else 0."
    )
    file: str | None = Field(
        None, description="A Python file of yours, whose function is called as function(prompt, answer, expected)."
    )
    function: str = Field("reward", pattern=r"^[A-Za-z_]\w*$", description="Its name in that file; returns a number.")
    weight: float = Field(1.0, description="The reward of an answer is the sum of all rewards times their weights.")

    @model_validator(mode="before")
    @classmethod
    def _built(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"metric": value}
        for kind, why in _NOT_BUILT.items():
            if isinstance(value, dict) and kind in value:
                raise ValueError(f"{kind} is no reward here: {why}")
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> RewardConfig:
        given = [name for name in ("metric", "pattern", "file") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a reward is one of metric, pattern and file; {' and '.join(given) or 'none'} given")
        if self.function != "reward" and self.file is None:
            raise ValueError("function: belongs to file")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"pattern is no regular expression: {error}") from None
        if not self.weight:
            raise ValueError("weight: a reward of weight 0 does nothing; leave it out")
        return self

    @property
    def name(self) -> str:
        """What figures and messages call it."""
        return self.metric or (self.function if self.file else "pattern")


class GrpoConfig(Strict):
    """Reinforcement learning from rewards of groups of sampled answers (docs/methods.md)."""

    reward: list[RewardConfig] = Field(min_length=1, description="What an answer is worth: one reward, or several.")
    group: int = Field(8, ge=1, description="Answers sampled to each prompt, which are compared with one another.")
    loss: Literal["grpo", "dapo", "dr_grpo"] = Field(
        "dapo",
        description="What a step's loss is a mean over. grpo: answers, each a mean over its tokens; dapo: tokens; "
        "dr_grpo: answers, each a sum over its tokens divided by max_new_tokens.",
    )
    scale: Literal["group", "none"] = Field(
        "group", description="Whether an advantage is divided by the standard deviation of its group's rewards."
    )
    ratio: Literal["token", "sequence"] = Field(
        "token",
        description="Importance ratio to the policy that sampled: of each token, or of the whole answer (GSPO: the "
        "geometric mean over its tokens).",
    )
    clip: float = Field(0.2, gt=0, lt=1, description="The ratio counts down to 1 - clip.")
    clip_high: float | None = Field(None, gt=0, description="The ratio counts up to 1 + clip_high; null: clip.")
    kl: float = Field(
        0.0, ge=0, description="Weight of the KL divergence from the model before its first step; 0: no reference."
    )
    temperature: float = Field(1.0, gt=0, description="Of sampling, and of the probabilities in the loss.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens that hold this probability.")
    top_k: int = Field(0, ge=0, description="Sample from so many likeliest tokens; 0: all.")
    max_new_tokens: int = Field(256, ge=1, description="Longer answers are cut off.")
    stop: list[str] = Field(
        default_factory=list, description="Tokens that end an answer beside the end of turn, as text; each one token."
    )
    truncated: Literal["lowest", "leave_out"] = Field(
        "lowest",
        description="Answers that were cut off or are empty are not judged. lowest: they count as the worst of their "
        "group, and no more than 0; leave_out: they take no part in the step.",
    )
    rollouts: Literal["model"] = Field("model", description="What samples: the model in training itself.")
    rollout_prompts: int = Field(
        4, ge=1, description="Prompts that are answered together; what is sampled is the same on any number of ranks."
    )
    rollout_steps: int = Field(
        1,
        ge=1,
        description="Steps whose answers are sampled at once, with the weights of the first of them; the ratio is of "
        "the weights since.",
    )
    no_signal_steps: int = Field(
        20, ge=1, description="The run stops after so many steps in a row in which every group's rewards were equal."
    )
    keep: int = Field(
        2, ge=0, description="Answers of each step that are kept in completions.jsonl; none under a privacy profile."
    )

    @field_validator("reward", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return [value] if isinstance(value, (str, dict)) else value

    @field_validator("rollouts", mode="before")
    @classmethod
    def _from_the_model(cls, value: Any) -> Any:
        if value == "vllm":
            raise ValueError(
                "vllm is not offered: what it samples depends on the requests beside each other, so a resumed run, or "
                "one on other ranks, would learn from other answers; leave rollouts out"
            )
        return value

    @property
    def high(self) -> float:
        """How far above 1 the ratio counts."""
        return self.clip if self.clip_high is None else self.clip_high


def check_grpo(recipe: Recipe) -> None:
    """Rules of ``methods.grpo`` with other keys. Raises :class:`ValueError`."""
    grpo, data, methods = recipe.methods.grpo, recipe.data, recipe.methods
    assert grpo is not None
    if grpo.group < 2:
        raise ValueError("methods.grpo.group: a group of one has nothing to be compared with; 2 or more, best 8")
    if grpo.max_new_tokens >= data.sequence_length:
        raise ValueError(
            f"methods.grpo.max_new_tokens: {grpo.max_new_tokens} leaves no room for a prompt in data.sequence_length "
            f"{data.sequence_length}"
        )
    names = [reward.name for reward in grpo.reward]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"methods.grpo.reward: '{twice}' stands there twice; put both into one, or into a function")
    for source in [*data.train, *(data.eval or [])]:
        if source.share is not None:
            raise ValueError("data.train: GRPO learns from its own answers, so nothing is replayed (share)")
        if source.format in ("preference", "feedback", "text"):
            raise ValueError(f"methods.grpo: needs questions with their answers, not rows of format {source.format}")
    if data.long_documents in ("split", "paragraphs"):
        raise ValueError(f"data.long_documents: {data.long_documents} would ask pieces of questions; drop or truncate")
    if recipe.train.batch_tokens is not None:
        raise ValueError("train.batch_tokens: a step of GRPO is a number of prompts: give train.batch_rows")
    for block, why in (
        ("goldfish", "withholds tokens from next-token loss, which GRPO has not"),
        ("neftune", "would train on another model than the one that sampled"),
    ):
        if getattr(methods, block) is not None:
            raise ValueError(f"methods.{block}: {why}")
    if recipe.guard.spike_factor is not None:
        raise ValueError("guard.spike_factor: the loss of GRPO lies around 0, so a multiple of it says nothing")
    if recipe.eval.early_stopping is not None:
        raise ValueError("eval.early_stopping: held-out likelihood does not follow rewards; leave it out with GRPO")
