"""What an answer is worth: metrics, regular expressions, functions of the user's.

A reward that raises, or returns what is no finite number, ends the run by name: an answer that was not judged would
otherwise be learnt from.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import numbers
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aifactory_train import metrics
from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.core.files import file_digest

if TYPE_CHECKING:
    from aifactory_train.config.grpo_block import RewardConfig
    from aifactory_train.config.schema import Recipe

#: (question, answer, expected answer) -> reward
Judge = Callable[[str, str, str], float]


@dataclass(frozen=True)
class Reward:
    """One reward of a recipe. origin: what the start-up report says of it; private: messages say nothing of texts."""

    name: str
    weight: float
    judge: Judge
    origin: str
    private: bool

    def __call__(self, prompt: str, answer: str, expected: str) -> float:
        """A finite number. Raises :class:`RunFailed` for anything else, and for a reward that raises."""
        fix = "a reward returns a number for every answer, however odd it is; go on with --resume auto once it does"
        try:
            found = self.judge(prompt, answer, expected)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            said = type(error).__name__ if self.private else f"{type(error).__name__}: {error}"
            raise RunFailed(
                f"the reward '{self.name}' raised {said}", where=f"{frame.filename}:{frame.lineno}", fix=fix
            ) from None
        if not isinstance(found, (numbers.Real, np.bool_)) or not math.isfinite(found):
            what = found if isinstance(found, numbers.Real) else type(found).__name__
            raise RunFailed(f"the reward '{self.name}' returned {what}", where="methods.grpo.reward", fix=fix)
        return float(found)


def rewards_of(recipe: Recipe) -> list[Reward]:
    """The rewards of the recipe, in its order. Raises :class:`UserError` for a file or a function that is none."""
    assert recipe.methods.grpo is not None
    private = recipe.privacy.profile != "open"
    return [
        Reward(how.name, how.weight, *_judge_of(how, recipe.eval.label_separator), private)
        for how in recipe.methods.grpo.reward
    ]


def _judge_of(how: RewardConfig, separator: str | None) -> tuple[Judge, str]:
    if how.metric is not None:
        metric = metrics.ANSWER_METRICS[how.metric]

        def score(prompt: str, answer: str, expected: str) -> float:
            return float(metric.value(metric.statistics([answer], [expected], separator)[0]))

        return score, "a metric of answers"
    if how.pattern is not None:
        pattern = re.compile(how.pattern)
        return (lambda prompt, answer, expected: float(pattern.search(answer) is not None)), f"found: {how.pattern}"
    assert how.file is not None
    path = Path(how.file)
    return _function(path, how.function), f"{path} (sha256 {file_digest(path)[:12]})"


def _function(path: Path, name: str) -> Judge:
    """The function ``name`` of a Python file of the user's."""
    where, usage = str(path), f"def {name}(prompt, answer, expected): ... returns a number"
    if not path.is_file():
        raise UserError("the file of a reward is not there", where=where, fix="methods.grpo.reward: file: PATH")
    spec = importlib.util.spec_from_file_location(f"reward_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError("the file of a reward is no Python file", where=where, fix=usage)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        said = f"the file of a reward cannot be imported: {type(error).__name__}: {error}"
        raise UserError(said, where=where, fix="python FILE says where") from None
    found = getattr(module, name, None)
    if not callable(found):
        raise UserError(f"has no function '{name}'", where=where, fix=usage)
    try:
        inspect.signature(found).bind("", "", "")
    except (TypeError, ValueError):
        raise UserError(f"'{name}' cannot be called with three texts", where=where, fix=usage) from None
    return found
