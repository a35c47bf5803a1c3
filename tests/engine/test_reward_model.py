"""A reward model: Bradley-Terry on pairs, exported as transformers' classifier with one output."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import helpers
import numpy as np
import pytest
import torch
from test_heads import classifier_of, plainly
from test_methods import pair_rows
from test_preferences import trainer_of

from aifactory_train.config.loading import load_recipe
from aifactory_train.config.objective import objective
from aifactory_train.core.errors import UserError
from aifactory_train.evaluation.rewards import figures_of
from aifactory_train.planning.workload import documents_of_a_row, preference_of
from aifactory_train.training.start import train


def write_reward(folder: Path, model: Path, **settings: Any) -> Path:
    off = {"eval.before": False, "record.pack": False, "checkpoint.at_end": False, "train.epochs": 20}
    path = helpers.write_recipe(folder, model, settings={**off, "methods.head.kind": "reward", **settings})
    helpers.write_jsonl(folder / "train.jsonl", pair_rows(32))
    helpers.write_jsonl(folder / "eval.jsonl", pair_rows(8, start=500))
    return path


def test_the_loss_is_bradley_terry_on_transformers_rewards(tmp_path, tiny_model_dir):
    """Each answer alone through transformers' classifier, on what its own chat template gives."""
    path = write_reward(tmp_path, tiny_model_dir, **{"adapter.kind": "none"})
    with trainer_of(path, tmp_path / "run") as trainer:
        assert "Bradley-Terry" in objective(trainer.recipe)
        plain = classifier_of(trainer.engine.core, trainer.recipe)
        pairs, losses = trainer.ahead.shares(trainer.state.cursor)[0], []
        for pair in pairs.tolist():
            row = trainer.data.train.row(pair)
            rewards = []
            for key in ("messages", "rejected"):
                said = [{"role": m["role"], "content": m["content"]} for m in row[key]]
                ids = trainer.tokenizer.apply_chat_template(said, return_dict=True, return_tensors="pt").input_ids
                with torch.no_grad():
                    rewards.append(plain(ids).logits[0, 0].double().item())
            losses.append(np.logaddexp(0.0, -(rewards[0] - rewards[1])))
        step = trainer.train_step()
        assert step["loss"] == pytest.approx(float(np.mean(losses)), rel=1e-5)
        assert step["supervised_tokens"] == len(pairs) == 8


def test_a_reward_model_learns_the_order_and_its_export_gives_the_same_rewards(tmp_path, tiny_model_dir):
    settings = {"train.max_steps": 20, "train.learning_rate": 1e-2, "eval.before": True}
    path = write_reward(tmp_path, tiny_model_dir, **settings)
    assert train(load_recipe(str(path)), tmp_path / "run", quiet=True) == 0
    found = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert found["after"]["reward_accuracy"] > 0.9 and found["after"]["loss"] < 0.5 < found["before"]["loss"]
    assert found["change"]["reward_margin"]["better"] is True
    folder = tmp_path / "run" / "export" / "adapter"
    assert json.loads((folder / "head.json").read_text())["labels"] == ["reward"]
    assert json.loads((folder / "verification.json").read_text())["passed"]
    model, tokenizer = plainly(folder, tiny_model_dir)
    rewards = []
    for row in pair_rows(8, start=500):
        for answer in ("chosen", "rejected"):
            said = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[answer]}]
            with torch.no_grad():
                ids = tokenizer.apply_chat_template(said, return_dict=True, return_tensors="pt").input_ids
                rewards.append(model(ids).logits[0, 0].item())
    again = figures_of(np.asarray(rewards).reshape(-1, 2))
    assert again["loss"] == pytest.approx(found["after"]["loss"], rel=1e-4)


def test_figures_by_hand():
    found = figures_of(np.asarray([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]]))
    assert found["reward_accuracy"] == pytest.approx(0.5) and found["reward_margin"] == pytest.approx(-1 / 3)
    assert found["loss"] == pytest.approx(np.mean([np.log1p(np.exp(-1)), np.log(2), np.log1p(np.exp(2))]))


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.labels=[a, b]", "compares the two answers"),
        ("methods.head.class_weights=balanced", "compares the two answers"),
        ("eval.metrics=[accuracy]", "judges text"),
        ("data.train.0.format=feedback", "needs rows of format preference"),
    ],
)
def test_what_belongs_to_labels_is_refused(tmp_path, tiny_model_dir, setting, words):
    with pytest.raises(UserError, match=words):
        load_recipe(str(write_reward(tmp_path, tiny_model_dir)), [setting])


def test_a_plan_counts_both_answers_of_a_pair(tmp_path, tiny_model_dir):
    recipe = load_recipe(str(write_reward(tmp_path, tiny_model_dir)))
    assert preference_of(recipe) == "reward" and documents_of_a_row("reward") == 2
