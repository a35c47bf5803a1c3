"""What one evaluation set gave: scores of its rows, questions and answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aifactory_train.evaluation.likelihood import HeldOut

if TYPE_CHECKING:
    from aifactory_train.data import TokenDataset


@dataclass
class Question:
    """What is asked of a row: token ids of the prompt, its text for people, and the expected answer."""

    row: int
    prompt_ids: list[int]
    prompt: str
    expected: str


@dataclass
class SetResult:
    """What is known of one evaluation set: likelihood of its rows, the questions asked of some of them, and their
    answers.
    """

    dataset: TokenDataset
    scored: HeldOut
    asked: list[Question] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    #: answers that did not end, although the expected ones would have fit
    cut_off: list[bool] = field(default_factory=list)
    #: of pairs the other answers in the same order, of labelled ones the undesirable ones
    rejected: HeldOut | None = None
    exchanged: HeldOut | None = None  # of labelled answers: each question with another one's answer

    def rated(self) -> list[int]:
        """Questions (indices into ``asked``) whose answer can be compared with an expectation: those of chat rows."""
        return [i for i, q in enumerate(self.asked) if "text" not in self.dataset.row(q.row)]
