"""How much an epoch is: prepared rows by the weight and share of their source, pairs as pairs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from common import recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from aifactory_train.data.sampler import Sampler
from aifactory_train.data.store import TokenDataset
from aifactory_train.planning import size

BASE = "meta-llama/Llama-3.2-1B"


class _Store:
    """The columns that a :class:`TokenDataset` reads: one document a row."""

    def __init__(self, lengths: np.ndarray, source: np.ndarray, facts: list[dict]):
        rows = np.arange(len(lengths))
        self.columns = {"lengths": lengths, "supervised": lengths, "docrow": rows, "rowsource": source}
        self.facts = {"sources": facts}

    def column(self, name: str) -> np.ndarray:
        return self.columns[name]


@settings(max_examples=40, deadline=None)
@given(
    counts=st.lists(st.integers(20, 200), min_size=1, max_size=3),
    weights=st.lists(st.sampled_from([0.3, 0.5, 1.0, 3.0]), min_size=3, max_size=3),
    share=st.sampled_from([None, 0.05, 0.3]),
    length=st.integers(10, 90),
)
def test_an_epoch_is_what_the_sampler_deals_out(counts, weights, share, length):
    facts = [{"role": "train", "weight": w} for w in weights[: len(counts)]]
    lengths, source = [], []
    for number, count in enumerate(counts):
        lengths += [length + 7 * number] * count
        source += [number] * count
    if share is not None:
        facts.append({"role": "train", "weight": 1.0, "share": share})
        lengths += [length + 3] * 50
        source += [len(counts)] * 50
    whole, of = np.asarray(lengths), np.asarray(source)
    for number, entry in enumerate(facts):
        entry["tokens"], entry["documents"] = int(whole[of == number].sum()), int((of == number).sum())
    data = TokenDataset(_Store(whole, of, facts), np.arange(len(whole)))  # type: ignore[arg-type]
    seen = Sampler(data.lengths, data.weights, batch_rows=8).order(0)
    epoch = size._epoch(facts, float(whole.sum()), float(len(whole)), None)
    assert epoch.documents == epoch.rows == pytest.approx(len(seen), abs=len(facts))  # each source is rounded
    assert epoch.tokens == pytest.approx(int(data.lengths[seen].sum()), abs=len(facts) * float(data.lengths.max()))


def test_what_was_held_out_is_left_out_alike():
    facts = [
        {"role": "train", "weight": 1.0, "tokens": 900, "documents": 90},
        {"role": "train", "weight": 0.5, "tokens": 900, "documents": 90},
        {"role": "eval", "weight": 1.0, "tokens": 5000, "documents": 500},
    ]
    epoch = size._epoch(facts, 1200.0, 120.0, None)  # a third was held out
    assert (epoch.tokens, epoch.documents) == pytest.approx((900, 90))


def test_pairs_are_counted_as_pairs_and_replayed_rows_as_one():
    facts = [
        {"role": "train", "weight": 1.0, "tokens": 8000, "documents": 80},
        {"role": "train", "weight": 1.0, "share": 0.2, "tokens": 1000, "documents": 10},
    ]
    epoch = size._epoch(facts, 9000.0, 90.0, "dpo")
    assert (epoch.tokens, epoch.documents, epoch.rows) == pytest.approx((10000, 80 + 20, 40 + 20))
    assert size._epoch(facts, 9000.0, 90.0, "kto").rows == pytest.approx(100)


def test_the_newest_preparation_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AIFACTORY_CACHE", str(tmp_path))
    folder = tmp_path / "prepared" / "local-test-0123456789abcdef"
    folder.mkdir(parents=True)
    sources = [{"role": "train", "weight": 0.5, "tokens": 4000, "documents": 40}]
    report = {
        "recipe": "local/test",
        "sources": sources,
        "sets": {"train": {"tokens": 4000, "documents": 40, "supervised": 1000}},
    }
    (folder / "prepared.json").write_text(json.dumps({"report": report}), encoding="utf-8")
    found = size.of_recipe(recipe(BASE))
    assert (found.tokens, found.rows, found.document, found.supervised) == (2000, 20, 100, 0.25)
    assert "40 documents, 4000 tokens; by weights and shares of the sources 2000 tokens" in found.source
    own = size.of_recipe(recipe(BASE), 1e6)
    assert (own.tokens, own.rows, own.document, own.source) == (1e6, 1e4, 100, "--tokens")
    pairs = size.of_recipe(recipe(BASE, methods__preference={"kind": "dpo"}))
    assert (pairs.rows, pairs.document) == (10, 100)
    for broken in ("{", json.dumps({"report": {**report, "sources": [{"role": "train"}]}}), "[]"):
        (folder / "prepared.json").write_text(broken, encoding="utf-8")
        assert size.of_recipe(recipe(BASE)).tokens is None


def test_rows_that_the_recipe_declares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AIFACTORY_CACHE", str(tmp_path))
    train = [{"source": "a.jsonl", "max_rows": 100, "weight": 0.5}, {"source": "b.jsonl", "share": 0.5}]
    asked = recipe(BASE, length=512, data__train=train)
    assert (size.of_recipe(asked).rows, size.of_recipe(asked).tokens) == (100, 51200)
    asked = recipe(BASE, length=512, data__train=train[:1], methods__preference={"kind": "orpo"})
    assert (size.of_recipe(asked).rows, size.of_recipe(asked).tokens) == (50, 50 * 2 * 512)
