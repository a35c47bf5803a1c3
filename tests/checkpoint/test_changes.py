"""What may change between attempts, and what would make it another run."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch

from aifactory_train.config.loading import to_tree
from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.parallel.changes import changes, check_changes, config_digest
from aifactory_train.training.random_state import random_state, set_random_state


def tree() -> dict:
    return to_tree(Recipe.model_validate({"model": {"base": "m"}, "data": {"train": ["rows.jsonl"]}}))


def changed(key: str, value: object) -> dict:
    new = copy.deepcopy(tree())
    *blocks, last = key.split(".")
    node = new
    for block in blocks:
        node = node[block]
    assert node[last] != value
    node[last] = value
    return new


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("parallel.engine", "zero3"),
        ("parallel.threads", 3),
        ("train.grad_accum", 4),
        ("train.micro_batch_tokens", 8192),
        ("data.batching", "padded"),
        ("checkpoint.keep", 5),
        ("logging.row_ids", True),
        ("guard.spike_factor", 4.0),
        ("record.pack", False),
        ("tracking.mlflow", True),
        ("about.title", "another"),
    ],
)
def test_how_a_run_is_carried_out_may_change(key: str, value: object) -> None:
    lines = check_changes(tree(), changed(key, value), same_rates=False)
    assert len(lines) == 1 and lines[0].startswith(f"{key}: ")
    assert config_digest(tree()) == config_digest(changed(key, value))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.seed", 18),
        ("train.learning_rate", 1e-3),
        ("train.batch_rows", 32),
        ("model.base", "other"),
        ("adapter.rank", 8),
        ("data.sequence_length", 64),
        ("data.supervise", "all"),
        ("precision.compute", "bf16"),
        ("train.optimizer", "sgd"),
    ],
)
def test_what_a_run_computes_may_not(key: str, value: object) -> None:
    with pytest.raises(UserError) as refused:
        check_changes(tree(), changed(key, value), same_rates=True)
    assert key in str(refused.value) and "->" in str(refused.value) and "--run-dir" in str(refused.value)
    assert config_digest(tree()) != config_digest(changed(key, value))


def at(**paths: str) -> dict:
    new = copy.deepcopy(tree())
    new["model"]["base"] = paths.get("base", "org/model")
    new["data"]["train"][0]["source"] = paths.get("rows", "rows.jsonl")
    return new


def test_a_path_may_be_written_otherwise_or_have_moved(tmp_path, monkeypatch) -> None:
    """An earlier version kept paths as they were written; a moved project has others, and says so."""
    (tmp_path / "model").mkdir()
    (tmp_path / "rows.jsonl").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path / "model")
    assert (
        check_changes(
            at(base="model", rows="rows.jsonl"), at(base=here, rows=str(tmp_path / "rows.jsonl")), same_rates=False
        )
        == []
    )
    assert check_changes(at(base=str(tmp_path / "link")), at(base=here), same_rates=False) == []
    moved = check_changes(at(base="/gone/before/model"), at(base=here), same_rates=False)
    assert moved == [f"model.base: /gone/before/model -> {here}"]
    for old in ("org/model", "pypi:x==1#model", "/gone/before/another", str(tmp_path / "else" / "model")):
        with pytest.raises(UserError, match=r"model\.base"):
            check_changes(at(base=old), at(base=here), same_rates=False)


def test_a_run_is_prolonged_only_if_its_rates_stay() -> None:
    longer = changed("train.epochs", 3.0)
    assert check_changes(tree(), longer, same_rates=True) == ["train.epochs: 1.0 -> 3.0"]
    with pytest.raises(UserError, match="constant"):
        check_changes(tree(), longer, same_rates=False)


def test_the_diff_shows_added_and_removed_rows() -> None:
    more = tree()
    more["data"]["train"].append({**more["data"]["train"][0], "source": "more.jsonl"})
    found = changes(tree(), more)
    assert ("data.train.1.source", None, "more.jsonl") in found
    assert all(key.startswith("data.train.1") for key, _, _ in found)


def test_random_states_survive_json() -> None:
    import json

    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    random.gauss(0, 1), np.random.randn()  # leaves a second value in both caches
    state = json.loads(json.dumps(random_state("cpu")))
    expected = (random.gauss(0, 1), random.random(), np.random.randn(3).tolist(), torch.rand(3).tolist())
    torch.rand(5), random.random(), np.random.rand(7)
    set_random_state(state, "cpu")
    assert (random.gauss(0, 1), random.random(), np.random.randn(3).tolist(), torch.rand(3).tolist()) == expected
