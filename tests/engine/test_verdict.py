"""The verdict on a run, by constructed evaluations: each rule of docs/metrics.md, and that no run whose answers loop or
whose judged metric fell is called better."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path
from typing import Any

import pytest

from aifactory_train import cli
from aifactory_train.config.loading import from_tree, load_recipe, to_tree
from aifactory_train.config.schema import Recipe
from aifactory_train.evaluation.verdict import Verdict, answer_facts, judge, loops

RUN = Path("runs/tickets")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    tree = to_tree(load_recipe("health/phenotype-terms"))
    tree["eval"]["metrics"] = ["bits_per_byte", "rouge_l", "chrf"]
    tree["train"] |= {"max_steps": None, "epochs": 2.0, "learning_rate": 5e-4}
    tree["data"]["eval"] = None
    return from_tree(tree, "a test")


def results(
    *,
    bits: tuple[float, float, bool | None] = (2.2, 1.3, True),
    forgot: bool = False,
    facts: Any = None,
    **metrics: Any,
) -> dict[str, Any]:
    """An ``eval.json``: ``name=(before, after, better)``."""
    before: dict[str, Any] = {"rows": 40, "answered_rows": 20}
    after = dict(before)
    change = {}
    for name, (old, new, better) in {"bits_per_byte": bits, **metrics}.items():
        before[name], after[name] = old, new
        change[name] = {"difference": new - old, "ci": [new - old - 0.1, new - old + 0.1], "better": better}
    after["answers"] = {"count": 20, "looping": 0, "cut_off": 0, "empty": 0, **(facts or {})}
    out = {"before": before, "after": after, "change": change}
    if forgot:
        out["forgetting"] = {"before": 1.0, "after": 1.2, "change": 0.2, "limit": 0.05, "warning": "harder"}
    return out


GOOD = {"chrf": (20.0, 40.0, True), "rouge_l": (0.1, 0.4, True)}
CASES = {
    "better": (results(**GOOD), 400, "better", ["nearer to", "rouge-l"], "aifactory chat"),
    "loops, fewer bits": (
        results(**GOOD, facts={"looping": 4}),
        400,
        "loops",
        ["4 of 20"],
        "learning_rate",
    ),
    "loops after few steps": (results(facts={"looping": 20}), 16, "loops", ["20 of 20"], "train.epochs=6"),
    "a metric fell for certain": (results(chrf=(40.0, 20.0, False)), 400, "worse", ["further from"], "learning_rate"),
    "likelihood fell for certain": (results(bits=(1.0, 2.0, False)), 400, "worse", ["worse"], "learning_rate"),
    "one rose, one fell": (results(**{**GOOD, "rouge_l": (0.4, 0.1, False)}), 400, "worse", ["ROUGE-L"], "--set"),
    "forgot, and learnt": (results(**GOOD, forgot=True), 400, "forgot", ["It learnt", "20%"], "learning_rate"),
    "forgot, and learnt nothing": (results(bits=(1.0, 1.0, None), forgot=True), 400, "forgot", ["It forgot"], "--set"),
    "answers without end": (results(**GOOD, facts={"cut_off": 12}), 400, "too short", ["12 of 20"], "train.epochs=6"),
    "empty answers": (results(**GOOD, facts={"empty": 11}), 400, "too short", ["11 of 20", "empty"], "train.epochs=6"),
    "few steps, nothing certain": (results(bits=(2.0, 1.9, None)), 16, "too short", ["16 steps"], "train.epochs=6"),
    "many steps, nothing certain": (results(bits=(2.0, 1.9, None)), 400, "undecided", ["40 held-out"], "eval_fraction"),
    "the judged metric slipped": (results(chrf=(21.3, 17.3, None)), 400, "undecided", ["further from"], "--set"),
    "the judged metric slipped soon": (results(chrf=(21.3, 17.3, None)), 16, "too short", ["further"], "train.epochs"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_rule(case: str, recipe: Recipe) -> None:
    figures, steps, word, said, following = CASES[case]
    found = judge(figures, recipe, RUN, steps)
    assert found.word == word, found
    assert all(text.casefold() in found.sentence.casefold() for text in said), found.sentence
    assert following in found.next and found.success is (word == "better")
    assert found.sentence.endswith(".") and "\n" not in found.sentence
    assert Verdict.read({"verdict": found.as_dict()}) == found


def test_no_run_that_loops_or_fell_is_a_success(recipe: Recipe) -> None:
    """Over all combinations of what can be measured."""
    tried = 0
    for bits, chrf, rouge, looping, forgot, steps in itertools.product(
        (True, None, False), (True, None, False), (True, None, False), (0, 3, 4, 20), (True, False), (1, 49, 50, 5000)
    ):
        ends = {True: (20.0, 40.0), None: (21.3, 17.3), False: (40.0, 20.0)}
        figures = results(
            bits=({True: (2.0, 1.0), None: (1.0, 1.0), False: (1.0, 2.0)}[bits] + (bits,)),  # type: ignore[arg-type]
            chrf=(*ends[chrf], chrf),
            rouge_l=(*ends[rouge], rouge),
            facts={"looping": looping},
            forgot=forgot,
        )
        found = judge(figures, recipe, RUN, steps)
        assert found.success is (found.word == "better") is found.sentence.startswith("Better")
        if looping >= 4 or forgot or False in (bits, chrf, rouge) or None in (chrf, rouge):
            assert not found.success, (bits, chrf, rouge, looping, forgot, steps, found)
        tried += found.success
    assert tried


def test_answers_that_are_right_are_counted(recipe: Recipe) -> None:
    tree = to_tree(recipe)
    tree["eval"]["metrics"] = ["exact_match", "bits_per_byte"]
    exact = from_tree(tree, "a test")
    found = judge(results(exact_match=(0.1, 0.75, True)), exact, RUN, 400)
    assert (found.word, found.sentence) == ("better", "Better: 15 of 20 answers are right, 2 before the training.")
    # the texts are foreseen better, and not one answer more is right
    assert judge(results(exact_match=(0.1, 0.1, None)), exact, RUN, 400).word == "undecided"


def test_preferences_are_judged_by_their_own_figures(recipe: Recipe) -> None:
    tree = to_tree(recipe)
    tree["methods"]["preference"] = {"kind": "dpo"}
    dpo = from_tree(tree, "a test")
    found = judge(results(bits=(1.0, 1.1, False), reward_accuracy=(0.5, 0.9, True)), dpo, RUN, 400)
    assert found.word == "better" and "90%" in found.sentence


def test_what_was_not_measured(recipe: Recipe) -> None:
    assert judge({}, recipe, RUN, 5).word == "not judged"
    only_after = {"after": results()["after"]}
    assert judge(only_after, recipe, RUN, 500).word == "not judged"
    only_after["after"]["answers"]["looping"] = 19
    assert judge(only_after, recipe, RUN, 500).word == "loops"
    assert Verdict.read({}) is None and Verdict.read({"verdict": "good"}) is None
    empty = judge({"before": {"rows": 1}, "after": {"rows": 1}, "change": {}}, recipe, RUN, 500)
    assert empty.word == "undecided"


def test_the_next_command_parses_and_its_settings_are_taken(recipe: Recipe, tmp_path: Path) -> None:
    """Every command that a verdict names is one of the program's, and its settings are values that the recipe takes."""
    run = tmp_path / "runs" / "a run; $(rm -rf x)"
    seen = set()
    for figures, steps, *_ in CASES.values():
        words = shlex.split(judge(figures, recipe, run, steps).next)
        assert words[0] == "aifactory" and str(run) in words[2]
        args = cli.build_parser(words[1]).parse_args(words[1:])
        if words[1] == "train":
            load_recipe("health/phenotype-terms", args.overrides)
            seen.update(text.partition("=")[0] for text in args.overrides)
    assert {"train.epochs", "train.learning_rate", "data.eval_fraction"} <= seen


# ---- answers


@pytest.mark.parametrize(
    "text",
    [
        "Büro-Büro-Büro-Büro-Büro-Büro-Bü",
        "Ich wei aus, weil Sie die " + "Müller-Büller-" * 8,
        "the the the the the the the",
        "I am sorry. " * 6,
        "We sent it to you and we sent it to you and we sent it to you and we sent it to you and we",
        "はいはいはいはいはいはいはいはい",
        "a" * 64,
    ],
)
def test_loops_are_seen(text: str) -> None:
    assert loops(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "ja",
        "aaaaaaaa",
        "The spare part HM-3 costs 189,00 € and is in stock; it is sent within two working days.",
        "1. open the cover\n2. take out the belt\n3. clean it\n4. put in the new belt\n5. close the cover",
        "| part | price |\n| --- | --- |\n| belt | 12 |\n| blade | 30 |\n| cover | 14 |",
        '{"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "f": 6}',
        "no, no, no, I said that the door of the third lamp is red and that nobody ever changed it",
    ],
)
def test_ordinary_answers_do_not_loop(text: str) -> None:
    assert not loops(text)


def test_what_the_expected_answer_does_is_no_fault() -> None:
    looping, plain = "ha " * 20, "The door is red."
    found = answer_facts([looping, looping, "", "x"], [plain, looping, plain, ""], [True, False, False, True])
    assert found == {"count": 4, "looping": 1, "cut_off": 2, "empty": 1}


# ---- where it is said


def test_the_report_leads_with_it(recipe: Recipe, tmp_path: Path) -> None:
    import json

    from aifactory_train.report.build import build
    from aifactory_train.run.folder import RunFolder

    run = RunFolder(tmp_path / "tickets")
    run.path.mkdir()
    figures = results(**GOOD, facts={"looping": 20})
    figures["after"]["samples"] = [{"prompt": "Wann?", "expected": "Morgen.", "answer": "Büro-<b>Büro</b>"}]
    figures["verdict"] = judge(figures, recipe, run.path, 16).as_dict()
    run.eval_file.write_text(json.dumps(figures))
    run.metrics_file.write_text(json.dumps({"kind": "train", "step": 1, "loss": 2.0, "learning_rate": 1e-3}) + "\n")
    page = build(run, {"run": {}, "log": {"events": 1, "head_sha256": "0" * 64}})
    verdict, answers, curves = (page.index(text) for text in ("It loops: 20 of 20", "answer after training", "<figure"))
    assert verdict < answers < curves
    assert page.index("It loops") < page.index('class="cards"') and "<b>Büro" not in page
    assert "95 % of the difference" in page


def test_the_console_ends_with_it(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from aifactory_train.run.folder import RunFolder
    from aifactory_train.training.metrics_log import print_comparison

    run = RunFolder(tmp_path / "tickets")
    figures = results(facts={"looping": 20})
    verdict = judge(figures, recipe, run.path, 16)
    print_comparison({**figures, "verdict": verdict.as_dict()}, run, None)
    assert capsys.readouterr().out.splitlines()[-2:] == [f"verdict: {verdict.sentence}", f"next: {verdict.next}"]
    print_comparison(figures, run, None)  # of an older run
    assert "verdict" not in capsys.readouterr().out
