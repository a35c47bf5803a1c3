"""lm-evaluation-harness on a trained run: the recipe's own rows as tasks, and refusals of what is not here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import helpers
import pytest
import yaml
from test_export import Trained

from aifactory_train import metrics
from aifactory_train.core.errors import UserError
from aifactory_train.evaluation import harness

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="the extra harness is not installed"
)


def label_rows(count, start):
    """One of three labels each, told by the thing that is asked for."""
    labels = ("red", "green", "blue")
    return [
        {
            "id": f"{start + i}",
            "messages": [
                {"role": "user", "content": f"Box {start + i} of shelf {'ABC'[i % 3]}?"},
                {"role": "assistant", "content": labels[i % 3]},
            ],
        }
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def case(tmp_path_factory, tiny_model_dir) -> Trained:
    folder = tmp_path_factory.mktemp("harness")
    settings = {"eval.metrics": ["accuracy", "exact_match"], "eval.max_new_tokens": 6, "eval.generate_rows": 12}
    recipe = helpers.write_recipe(folder, tiny_model_dir, settings=settings)
    for name, start in (("train", 0), ("eval", 500)):
        helpers.write_jsonl(recipe.with_name(f"{name}.jsonl"), label_rows(24 if name == "train" else 9, start))
    trained = Trained(folder, tiny_model_dir, keep_rows=True)
    trained.export(verify=False)
    return trained


def test_without_the_extra_it_is_refused(case, monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed") as error:
        harness.run_harness(case.run, case.recipe, ["own"], rows=None, device="cpu")
    assert "aifactory-train[harness]" in str(error.value)


def test_arguments_that_do_not_fit(case, tmp_path):
    for flags, word in (
        (["--harness", ","], "names no task"),
        (["--harness", "own", "--rows", "0"], "at least 1"),
        (["--harness", "own", "--no-generate"], "--no-generate"),
        (["--harness", "own", "--data", "x"], "not allowed with"),
        ([], "--data"),
    ):
        helpers.refused(helpers.cli("eval", case.run.path, *flags, cwd=tmp_path), word)


@needs_harness
def test_protected_rows_are_not_written(case):
    protected = case.recipe.model_copy(deep=True)
    protected.privacy.profile = "sensitive"
    with pytest.raises(UserError, match="would write held-out rows"):
        harness.run_harness(case.run, protected, ["own"], rows=None, device="cpu")
    assert not (case.run.path / "harness").exists()


@needs_harness
def test_own_rows_agree_with_our_metric(case):
    """The harness's answers are ours to the letter, and so is its exact match; a third of the rows is what the model
    says.
    """
    from aifactory_train.data import prepare
    from aifactory_train.evaluation.answers import answers, chat_template, question, stop_ids
    from aifactory_train.model.trained import load_trained

    model, tokenizer, _ = load_trained(case.run, "cpu")
    info = case.data.tokenizer_info

    def ask(data):
        dataset = next(iter(data.evals.values()))
        asked = [question(dataset, i, tokenizer, chat_template(tokenizer)) for i in range(len(dataset))]
        how = {"stop_ids": stop_ids(info), "pad_id": info["pad_id"], "device": "cpu"}
        return asked, answers(model, tokenizer, asked, max_new_tokens=6, **how)

    _, said = ask(case.data)
    rows = label_rows(9, 500)
    for row, answer in list(zip(rows, said, strict=True))[::3]:
        row["messages"][1]["content"] = answer
    helpers.write_jsonl(case.run.path.parent / "eval.jsonl", rows)
    asked, ours = ask(prepare(case.recipe, tokenizer))
    exact = sum(metrics.exact_match(a, q.expected) for a, q in zip(ours, asked, strict=True)) / len(asked)
    assert 0 < exact < 1

    found = harness.run_harness(case.run, case.recipe, ["own"], rows=None, device="cpu")
    folder = case.run.path / "harness"
    assert json.loads((folder / "results.json").read_text()) == found
    assert found["rows"] == {harness.GENERATE: 9, harness.CHOICE: 9} and found["versions"]["lm_eval"]
    lines = [json.loads(line) for line in (folder / f"{harness.GENERATE}.samples.jsonl").read_text().splitlines()]
    assert [line["target"] for line in lines] == [q.expected for q in asked]
    assert [line["answers"][0].strip() for line in lines] == ours
    assert found["tasks"][harness.GENERATE]["exact_match"] == pytest.approx(exact, abs=1e-12)
    assert 0 <= found["tasks"][harness.CHOICE]["acc"] <= 1
    task = yaml.safe_load((folder / f"{harness.GENERATE}.yaml").read_text())
    assert task["generation_kwargs"]["until"][0] == "<|im_end|>" and "cache_dir" not in task["dataset_kwargs"]


@needs_harness
def test_tasks_that_are_not_here_are_refused(case, monkeypatch):
    import lm_eval.tasks

    with pytest.raises(UserError, match=r"no task 'arc_eazy'.*did you mean 'arc_easy'"):
        harness.run_harness(case.run, case.recipe, ["arc_eazy"], rows=None, device="cpu")
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True, raising=False)
    with pytest.raises(UserError, match=r"arc_easy.* not in the local cache") as error:
        arc = Path(lm_eval.tasks.__file__).with_name("arc")
        harness._loaded(lm_eval.tasks.TaskManager(include_path=arc, include_defaults=False), "arc_easy")
    assert "lm-eval --model dummy --tasks arc_easy --limit 1" in str(error.value)
