"""Rows as prompts: what GRPO asks, and what it expects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from aifactory_train.core.errors import UserError
from aifactory_train.data.store import TokenDataset
from aifactory_train.evaluation.answers import chat_template, question

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.evaluation.results import Question


class PromptTokens(TokenDataset):
    """Rows whose last answer is asked for. A unit is a prompt; as a data set it has room for the longest answer to it,
    whatever the row's own answer takes.

    ``questions``: one a unit. Rows without an answer in text, and prompts that leave no room for an answer, are left
    out and counted in ``left_out``. Raises :class:`UserError` where nothing stays.
    """

    def __init__(self, base: TokenDataset, recipe: Recipe, tokenizer: Any):
        grpo = recipe.methods.grpo
        assert grpo is not None
        template, longest = chat_template(tokenizer, recipe), recipe.data.sequence_length - grpo.max_new_tokens
        self.questions: list[Question] = []
        self.left_out = {"prompt too long": 0, "no answer in text": 0}
        kept: list[int] = []
        for index in range(len(base)):
            asked = None if "text" in base.row(index) else question(base, index, tokenizer, template)
            if asked is None or not asked.prompt_ids:
                self.left_out["no answer in text"] += 1
            elif len(asked.prompt_ids) > longest:
                self.left_out["prompt too long"] += 1
            else:
                kept.append(index)
                self.questions.append(asked)
        if not kept:
            long, none = self.left_out.values()
            raise UserError(
                f"no row can be asked: {long:,} prompts leave no room for methods.grpo.max_new_tokens "
                f"{grpo.max_new_tokens} in data.sequence_length {recipe.data.sequence_length}, {none:,} rows have no "
                "answer in text",
                where=f"data: {base.name}",
                fix="a longer data.sequence_length, fewer new tokens, or rows with prompt and completion",
            )
        super().__init__(base.store, base._docs[np.asarray(kept)], base.name, base.report)
        tokens = [len(asked.prompt_ids) + grpo.max_new_tokens for asked in self.questions]
        self.lengths = np.asarray(tokens, dtype=np.int32)
        self.supervised = np.full(len(kept), grpo.max_new_tokens, dtype=np.int32)

    def warning(self) -> str | None:
        """What was left out, in words."""
        said = [f"{count:,} ({why})" for why, count in self.left_out.items() if count]
        return f"rows that GRPO cannot ask are left out: {', '.join(said)}" if said else None
