"""What the figures of a run come to: one plain sentence for a person who knows no metric, and the next command.

The rules stand in docs/metrics.md. They are asked in this order, and the first that holds decides: nothing was judged,
the answers loop, the judged metric fell for certain, general text was forgotten, the training was too short, better,
undecided. So a run whose answers loop or whose judged metric fell is never called better, whatever its loss says.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aifactory_train.core.figures import FIGURES

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe

Word = Literal["better", "undecided", "worse", "too short", "loops", "forgot", "not judged"]

#: From this share of answers that loop on, the run is called so; from this one of answers that do not end or are empty.
LOOPING, UNFINISHED = 0.2, 0.5
#: A run of fewer steps that shows no certain gain was too short to tell anything.
FEW_STEPS = 50
#: How much longer the next run is, where this one was too short.
LONGER = 3

_SUCCESS: tuple[Word, ...] = ("better",)


@dataclass(frozen=True)
class Verdict:
    """``word`` for programs, ``sentence`` for people, ``reasons`` what it rests on, ``next`` the command that comes
    next.

    >>> import aifactory_train as af
    >>> verdict = af.TrainedRun.open("first").verdict
    >>> verdict.success
    False
    >>> verdict.word in ("undecided", "worse", "too short", "loops", "forgot")
    True
    """

    word: Word
    sentence: str
    next: str
    reasons: list[str] = field(default_factory=list)

    @property
    def success(self) -> bool:
        """Whether the run may be headlined as one that made the model better."""
        return self.word in _SUCCESS

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, results: dict[str, Any]) -> Verdict | None:
        """The verdict in ``eval.json``; None in one that has none (an older run, or one that has not ended)."""
        found = results.get("verdict")
        if not isinstance(found, dict) or not {"word", "sentence", "next"} <= found.keys():
            return None
        return cls(found["word"], str(found["sentence"]), str(found["next"]), list(found.get("reasons") or []))


# ---- facts about answers


def answer_facts(given: Sequence[str], expected: Sequence[str], cut_off: Sequence[bool]) -> dict[str, int]:
    """``eval.json``'s ``answers``: how many there are, how many loop, are ``cut_off`` although the expected one would
    have fit, or are empty. What the expected answer does, too, is no fault."""
    pairs = list(zip(given, expected, strict=True))
    return {
        "count": len(pairs),
        "looping": sum(loops(answer) and not loops(wanted) for answer, wanted in pairs),
        "cut_off": sum(cut_off),
        "empty": sum(not answer.strip() and bool(wanted.strip()) for answer, wanted in pairs),
    }


#: Characters that a repeated unit has at most, and that of a text are looked at from its end.
_UNIT, _TAIL = 40, 400


def loops(text: str) -> bool:
    """Whether an answer repeats itself: at least half of it, up to its end, is a short unit four times or more, or more
    than half of its three-word sequences (from ten on) stood in it before.

    >>> loops("Büro-Büro-Büro-Büro-Büro-Büro"), loops("The part costs 189 euros and is in stock.")
    (True, False)
    """
    words = re.findall(r"\w+", text.casefold())
    triples = list(zip(words, words[1:], words[2:], strict=False))
    if len(triples) >= 10 and len(set(triples)) < len(triples) / 2:
        return True
    tail = text.strip()[-_TAIL:]
    for period in range(1, _UNIT + 1):
        same = 0
        while same < len(tail) - period and tail[-1 - same] == tail[-1 - same - period]:
            same += 1
        if same + period >= max(16, 4 * period, len(tail) / 2):
            return True
    return False


# ---- the verdict


def judge(results: dict[str, Any], recipe: Recipe, run: Path, steps: int) -> Verdict:
    """The verdict on ``eval.json``'s ``results`` after so many optimizer ``steps`` of the run in ``run``."""
    before, after = results.get("before"), results.get("after")
    following = _Following(recipe, run, steps)
    if not after:
        return Verdict("not judged", "Not judged: nothing was evaluated after the training.", following.chat(False))
    facts = {"looping": 0, "cut_off": 0, "empty": 0, **(after.get("answers") or {})}
    count = int(facts.get("count", 0))
    reasons = _reasons(results, facts, count, steps)
    if count and facts["looping"] >= LOOPING * count:
        sentence = (
            f"It loops: {facts['looping']} of {count} answers to rows that it never saw repeat themselves, so it is "
            f"not fit for use, whatever the other figures say."
        )
        return Verdict("loops", sentence, following.after_loops(), reasons)
    if not before:
        sentence = "Not judged: the model was not evaluated before the training, so there is nothing to compare with."
        return Verdict("not judged", sentence, following.chat(True), reasons)
    names = _judged(results, recipe)
    change = {name: results.get("change", {}).get(name) or {} for name in names}
    certain = {name: found.get("better") for name, found in change.items()}
    fell = [name for name in names if certain[name] is False]
    if fell:
        sentence = f"Worse: {_said(fell[0], before, after)}. Use the model from before the training."
        return Verdict("worse", sentence, following.gentler(), reasons)
    answers = [name for name in names if _of_answers(name)]
    forgotten = results.get("forgetting") or {}
    gained = any(certain[name] is True for name in names)
    if forgotten.get("warning"):
        also = f"It learnt ({_said((answers or names)[0], before, after)}), but it forgot" if gained else "It forgot"
        sentence = f"{also}: text that has nothing to do with your rows is {forgotten['change']:.0%} harder for it now."
        return Verdict("forgot", sentence, following.gentler(), reasons)
    if count and max(facts["cut_off"], facts["empty"]) >= UNFINISHED * count:
        what = "are empty" if facts["empty"] > facts["cut_off"] else "do not end by themselves"
        sentence = (
            f"Too short: {max(facts['cut_off'], facts['empty'])} of {count} answers {what}; the model has not learnt "
            f"the form of your answers yet."
        )
        return Verdict("too short", sentence, following.longer(), reasons)
    slipped = [name for name in answers if _worse(name, change[name].get("difference"))]
    if gained and not slipped and _main_gained(names[0], answers, certain):
        shown = next(name for name in (*answers, *names) if certain[name] is True)
        return Verdict("better", f"Better: {_said(shown, before, after)}.", following.chat(True), reasons)
    if steps < FEW_STEPS:
        sentence = f"Too short: after {steps:,} steps nothing is certain yet"
        sentence += f" ({_said((slipped or names)[0], before, after)})." if names else "."
        return Verdict("too short", sentence, following.longer(), reasons)
    rows = after.get("answered_rows") if answers else after.get("rows")
    sentence = f"Undecided: {rows or 'the'} held-out rows do not show whether the model became better"
    sentence += f" ({_said((slipped or answers or names)[0], before, after)})." if names else "."
    return Verdict("undecided", sentence, following.more_rows(), reasons)


def _judged(results: dict[str, Any], recipe: Recipe) -> list[str]:
    """Metrics that decide, the recipe's first one first: those that it names and that were measured twice. Perplexity
    and loss stand for bits per byte."""
    change = results.get("change") or {}
    wanted = ["reward_accuracy", "preference_loss"] if recipe.methods.preference is not None else []
    head = recipe.methods.head
    if head is not None and head.kind == "embedding":
        wanted = ["ndcg_at_10"]
    wanted += recipe.eval.metrics if not wanted else []
    named = ["bits_per_byte" if name in ("perplexity", "loss") else name for name in wanted]
    found = [name for name in dict.fromkeys(named) if name in change and name in FIGURES and name != "memorisation"]
    return found or [name for name in ("bits_per_byte",) if name in change]


def _main_gained(main: str, answers: list[str], certain: dict[str, bool | None]) -> bool:
    """Where the recipe judges by answers, some metric of answers has to be better for certain; a likelihood alone
    decides only where it comes first."""
    return certain[main] is True or any(certain[name] is True for name in answers)


def _of_answers(name: str) -> bool:
    from aifactory_train.metrics import ANSWER_METRICS  # numpy: a login node that shows a report may have none

    return name in ANSWER_METRICS


def _worse(name: str, difference: float | None) -> bool:
    from aifactory_train.metrics import higher_is_better

    return bool(difference) and (difference > 0) != higher_is_better(name)  # type: ignore[operator]


def _said(name: str, before: dict[str, Any], after: dict[str, Any]) -> str:
    """A metric before and after in words."""
    old, new = before.get(name), after.get(name)
    if not isinstance(old, (int, float)) or not isinstance(new, (int, float)):
        return f"{FIGURES.get(name, (name,))[0]} was not measured"
    count = after.get("answered_rows")
    if name in ("exact_match", "accuracy", "numeric_match") and count:
        return f"{round(new * count)} of {count} answers are right, {round(old * count)} before the training"
    if name in ("valid_json", "valid_xml") and count:
        form = FIGURES[name][0]
        return f"{round(new * count)} of {count} answers are {form}, {round(old * count)} before the training"
    if name == "reward_accuracy":
        return f"the good answer is preferred in {new:.0%} of the pairs, {old:.0%} before the training"
    way = "nearer to" if not _worse(name, new - old) else "further from"
    if new == old:
        way = "as near to"
    what = f"{FIGURES[name][0]} {old:.4g} before, {new:.4g} now"
    if _of_answers(name):
        return f"its answers are {way} the expected ones ({what})"
    if name == "ndcg_at_10":
        how = "as well" if new == old else ("worse" if _worse(name, new - old) else "better")
        return f"it finds what belongs to a query {how} ({what})"
    easier = "as well as before" if new == old else ("worse" if _worse(name, new - old) else "better")
    return f"it foresees rows that it never saw {easier} ({what})"


def _reasons(results: dict[str, Any], facts: dict[str, Any], count: int, steps: int) -> list[str]:
    before, after = results.get("before") or {}, results.get("after") or {}
    found = [f"{steps:,} steps"]
    if count:
        told = {"looping": "loop", "cut_off": "do not end", "empty": "are empty"}
        found.append(f"of {count} answers " + ", ".join(f"{facts[key]} {word}" for key, word in told.items()))
    for name, change in (results.get("change") or {}).items():
        if name in FIGURES:
            certain = {True: "better", False: "worse", None: "undecided"}[change.get("better")]
            found.append(f"{FIGURES[name][0]} {before[name]:.4g} to {after[name]:.4g}: {certain}")
    return found


@dataclass(frozen=True)
class _Following:
    """The command that comes next, for a shell."""

    recipe: Recipe
    run: Path
    steps: int

    def chat(self, there: bool) -> str:
        if not there:
            return self._again({"eval.after": "true"}, "judged")
        head = self.recipe.methods.head
        if head is not None and head.kind == "embedding":  # it writes no answers
            return f"aifactory predict {shlex.quote(str(self.run))} --data FILE"
        return f"aifactory chat {shlex.quote(str(self.run))}"

    def longer(self) -> str:
        train = self.recipe.train
        settings = {"train.epochs": f"{train.epochs * LONGER:g}"}
        if train.max_steps is not None:
            settings["train.max_steps"] = str(train.max_steps * LONGER)
        return self._again(settings, "longer")

    def gentler(self) -> str:
        return self._again({"train.learning_rate": f"{self.recipe.train.learning_rate / 2:.3g}"}, "gentler")

    def after_loops(self) -> str:
        """More steps where there were few, else a lower rate."""
        return self.longer() if self.steps < LONGER * FEW_STEPS else self.gentler()

    def more_rows(self) -> str:
        """More rows to judge by: a larger part held out, where the recipe names no rows for it, and more answers."""
        data, settings = self.recipe.data, {"eval.generate_rows": str(max(200, self.recipe.eval.generate_rows))}
        if not data.eval:
            settings["data.eval_fraction"] = f"{min(0.5, 2 * data.eval_fraction):g}"
        return self._again(settings, "judged")

    def _again(self, settings: dict[str, str], suffix: str) -> str:
        words = ["aifactory", "train", str(self.run / "run.yaml"), "--name", f"{self.run.name}-{suffix}"]
        words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        return shlex.join(words)
