"""Splits by group and by time, labels, and what may not stand on both sides."""

from __future__ import annotations

import datetime
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from chat_families import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.data import prepare, split
from aifactory_train.data.cells import RowError

WORDS = [
    a + b for a in ("ka", "lo", "mi", "ru", "te", "vo", "zu", "pe") for b in ("ran", "del", "sim", "tok", "fur", "gel")
]


def sentence(seed: Any, count: int = 24) -> str:
    return " ".join(random.Random(str(seed)).choices(WORDS, k=count))


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return path


def run(tmp_path: Path, train: Any, **data):
    tree = {"model": {"base": "x/y"}, "data": {"train": train, **data}}
    return prepare(Recipe.model_validate(tree), byte_tokenizer(), cache_dir=tmp_path / "cache")


def rows_of(dataset) -> list[dict[str, Any]]:
    return [dataset.row(i) for i in range(len(dataset))]


def tickets(count: int = 60, **more) -> list[dict[str, Any]]:
    return [
        {
            "prompt": sentence(i),
            "completion": ("red", "green")[i % 2],
            "customer": i % 12,
            "day": f"2024-03-{1 + i % 28:02d}",
        }
        | more
        for i in range(count)
    ]


# ---- by group


@settings(max_examples=20, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=2, max_size=25),
    fraction=st.floats(0.05, 0.6),
    most=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_groups_are_whole_or_absent(tmp_path_factory, sizes, fraction, most, seed):
    tmp_path = tmp_path_factory.mktemp("g")
    rows = [{"text": sentence((g, i)), "who": f"g{g}"} for g, n in enumerate(sizes) for i in range(n)]
    path = jsonl(tmp_path / "r.jsonl", rows)
    options = {"eval_fraction": fraction, "eval_rows": most, "split_seed": seed, "overlap": "allow"}
    prepared = run(tmp_path, str(path), split_by={"group": "who"}, **options)
    (held,) = prepared.evals.values()
    train_groups = {r["group"] for r in rows_of(prepared.train)}
    held_groups = {r["group"] for r in rows_of(held)}
    assert not train_groups & held_groups and held_groups and train_groups
    assert len(held) <= most
    facts = prepared.report["split"]["groups"]["r"]
    assert len(held) + len(prepared.train) + facts.get("rows_not_needed", 0) == len(rows)
    if facts.get("rows_not_needed"):
        assert min(sizes) > most  # only where no group is small enough


def test_group_split_is_deterministic_and_ignores_the_order_of_rows(tmp_path):
    a = run(tmp_path, str(jsonl(tmp_path / "a.jsonl", tickets())), split_by={"group": "customer"})
    b = run(tmp_path, str(jsonl(tmp_path / "b.jsonl", tickets()[::-1])), split_by={"group": "customer"})
    held = [{r["group"] for r in rows_of(p.evals[n])} for p, n in ((a, "a"), (b, "b"))]
    assert held[0] == held[1] and a.report["split"]["groups"]["a"]["groups"] == 12


def test_a_group_that_is_named_in_two_sources_stays_on_one_side(tmp_path):
    rows = [{"text": sentence((s, i)), "group": f"g{i % 10}"} for s in "ab" for i in range(40)]
    other = [
        {"text": sentence(("c", i)), "group": f"h{i % 10}"} for i in range(30)
    ]  # another number of groups: other choices
    sources = [jsonl(tmp_path / "a.jsonl", rows[:40]), jsonl(tmp_path / "b.jsonl", rows[40:] + other)]
    prepared = run(tmp_path, [str(s) for s in sources], eval_fraction=0.3)
    train = {r["group"] for r in rows_of(prepared.train)}
    for held in prepared.evals.values():
        assert not train & {r["group"] for r in rows_of(held)}


def test_a_group_on_both_sides_of_a_given_split_is_refused_by_name(tmp_path):
    train = jsonl(tmp_path / "t.jsonl", tickets(24))
    held = jsonl(tmp_path / "e.jsonl", [{**r, "prompt": sentence(("held", i))} for i, r in enumerate(tickets(3))])
    with pytest.raises(UserError) as caught:
        run(tmp_path, str(train), eval=str(held), split_by={"group": "customer"})
    assert re.search(r"the group '[012]' is in the training rows and in the held-out rows", caught.value.what)
    assert str(held) in caught.value.what and str(caught.value.where).startswith(f"{train}:")
    named = [
        jsonl(tmp_path / f"{n}.jsonl", [{"text": sentence((n, i)), "group": "same"} for i in range(3)]) for n in "ab"
    ]
    with pytest.raises(UserError, match="the group 'same'"):  # the rows' own column, without split_by
        run(tmp_path, str(named[0]), eval=str(named[1]))


# ---- by time


def test_the_newest_rows_are_held_out(tmp_path):
    days = [datetime.date(2023, 1, 1) + datetime.timedelta(days=7 * i) for i in range(50)]
    rows = [{"text": sentence(i), "date": d.isoformat(), "i": i} for i, d in enumerate(days)]
    random.Random(1).shuffle(rows)
    prepared = run(tmp_path, str(jsonl(tmp_path / "r.jsonl", rows)), split_by={"time": "date"}, eval_fraction=0.2)
    order = {sentence(i): i for i in range(50)}
    held = sorted(order[r["text"]] for r in rows_of(prepared.evals["r"]))
    assert held == list(range(40, 50)) and len(prepared.train) == 40
    facts = prepared.report["split"]["groups"]["r"]
    assert facts["by"] == "time" and facts["from"].startswith(days[40].isoformat())
    assert facts["before"].startswith(days[39].isoformat())


def test_rows_of_one_moment_are_never_divided(tmp_path):
    rows = [{"text": sentence(i), "year": 2000 + i // 10} for i in range(50)]
    prepared = run(tmp_path, str(jsonl(tmp_path / "r.jsonl", rows)), split_by={"time": "year"}, eval_fraction=0.3)
    assert len(prepared.evals["r"]) == 10 and len(prepared.train) == 40


@settings(max_examples=100, deadline=None)
@given(
    a=st.datetimes(timezones=st.just(datetime.timezone.utc)), b=st.datetimes(timezones=st.just(datetime.timezone.utc))
)
def test_moments_keep_the_order_of_time(a, b):
    keys = [split.moment(x.isoformat(), "c") for x in (a, b)]
    assert (keys[0] < keys[1]) == (a < b) and split.moment(a, "c") == keys[0]


def test_forms_of_dates():
    day = split.moment("2024-03-01", "c")
    for same in ("2024-03-01T00:00:00Z", "2024-03", "01.03.2024", "1.3.2024", datetime.date(2024, 3, 1)):
        assert split.moment(same, "c") == day
    assert split.moment("2024-03-01T01:00:00+01:00", "c") == day
    assert split.moment("3.5", "c") == split.moment(3.5, "c") > split.moment(-2, "c")
    for bad in ("03/04/2024", "soon", "2024-13-01", float("nan"), "32.1.2024"):
        with pytest.raises(RowError):
            split.moment(bad, "c")


# ---- near-duplicates


def jaccard(a: str, b: str) -> float:
    """Over sequences of three words: another way to the same figure than the program's."""
    one, two = ({tuple(t.split()[i : i + 3]) for i in range(len(t.split()) - 2)} for t in (a, b))
    return len(one & two) / len(one | two)


def test_near_duplicates_across_the_split_stay_under_one_per_cent(tmp_path):
    draw = random.Random(5)
    rows = []
    for i in range(150):
        text = sentence(i, 40).split()
        rows.append(" ".join(text))
        for copy in range(i % 4):  # up to three copies with one word changed
            changed = list(text)
            changed[draw.randrange(40)] = f"new{copy}"
            rows.append(" ".join(changed))
    path = jsonl(tmp_path / "r.jsonl", [{"text": t} for t in rows])
    prepared = run(tmp_path, str(path), eval_fraction=0.2)
    train = [r["text"] for r in rows_of(prepared.train)]
    held = [r["text"] for r in rows_of(prepared.evals["r"])]
    repeated = sum(any(jaccard(h, t) >= 0.8 for t in train) for h in held)
    assert repeated <= 0.01 * len(held) and len(held) >= 50
    overlap = prepared.report["overlap"]
    assert overlap["dropped_from_train"] > 20 and overlap["share"] > 0.5 and overlap["share_left"] == 0.0
    leak = prepared.report["own"]["leakage"]
    assert leak["exact"] == leak["near"] == 0 and leak["held_out_rows"] == len(held)
    allowed = run(tmp_path, str(path), eval_fraction=0.2, overlap="allow").report
    assert allowed["own"]["leakage"]["share"] > 0.5 and any(
        "look better than they are" in w for w in allowed["warnings"]
    )
    with pytest.raises(UserError, match="repeat held-out rows"):
        run(tmp_path, str(path), eval_fraction=0.2, overlap="refuse")


def test_rows_of_one_template_are_not_near_duplicates(tmp_path):
    ask = (
        "Please sort this message of a customer into exactly one of the classes that we use here and answer with "
        "its name: "
    )
    rows = [{"prompt": ask + sentence(i, 10), "completion": f"class {i % 3}"} for i in range(120)]
    prepared = run(tmp_path, str(jsonl(tmp_path / "r.jsonl", rows)))
    assert len(prepared.train) + len(prepared.evals["r"]) == 120


# ---- labels


def test_labels_that_are_listed_pass(tmp_path):
    prepared = run(tmp_path, str(jsonl(tmp_path / "r.jsonl", tickets())), labels=["red", "green"])
    assert len(prepared.train) + len(prepared.evals["r"]) == 60


REFUSED = [
    ("unknown label", {}, {"completion": "gren"}, {"labels": ["red", "green"]}, ":31", "did you mean 'green'?"),
    ("label with text", {"x": 1}, {}, {"labels": ["red"]}, ":2", "the label 'green' is not in data.labels"),
    ("no such group column", {}, {}, {"split_by": {"group": "custmer"}}, ":1", "did you mean 'customer'?"),
    (
        "group missing in a row",
        {},
        {"customer": None},
        {"split_by": {"group": "customer"}},
        ":31",
        "'customer' is empty",
    ),
    ("group is a list", {}, {"customer": [1]}, {"split_by": {"group": "customer"}}, ":31", "neither text nor a number"),
    ("no date", {}, {"day": "yesterday"}, {"split_by": {"time": "day"}}, ":31", "is no date"),
    ("ambiguous date", {}, {"day": "03/04/2024"}, {"split_by": {"time": "day"}}, ":31", "write dates as YYYY-MM-DD"),
    ("empty date", {}, {"day": " "}, {"split_by": {"time": "day"}}, ":31", "'day' is empty"),
    ("dates and numbers", {}, {"day": 17}, {"split_by": {"time": "day"}}, "data.split_by.time", "others a number"),
    (
        "one group only",
        {"customer": "all"},
        {"customer": "all"},
        {"split_by": {"group": "customer"}},
        "r.jsonl",
        "of one group",
    ),
    ("one moment only", {"day": 5}, {"day": 5}, {"split_by": {"time": "day"}}, "r.jsonl", "of one moment"),
]


@pytest.mark.parametrize(
    ("all_rows", "last_row", "data", "where", "what"), [c[1:] for c in REFUSED], ids=[c[0] for c in REFUSED]
)
def test_rows_that_break_a_rule_are_refused_with_their_place(tmp_path, all_rows, last_row, data, where, what):
    rows = [*tickets(30, **all_rows), {**tickets(31)[-1], **all_rows, **last_row}]
    with pytest.raises(UserError) as caught:
        run(tmp_path, str(jsonl(tmp_path / "r.jsonl", rows)), **data)
    assert what in str(caught.value) and where in str(caught.value.where)
    assert not list((tmp_path / "cache").glob("*"))


def test_labels_of_plain_text_are_refused(tmp_path):
    with pytest.raises(UserError, match="rows of plain text have no answer"):
        run(tmp_path, str(jsonl(tmp_path / "r.jsonl", [{"text": "a"}, {"text": "b"}])), labels=["a"])
