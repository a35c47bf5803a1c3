"""Which rows are trained on and which are held out, on arrays: duplicates, split by group, overlap of the two sides."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.data import near, split
from aifactory_train.data import report as own_report
from aifactory_train.data.inputs import Input
from aifactory_train.data.overlap import LENGTH, SHARE, near_duplicates
from aifactory_train.data.sampler import hash_order, splitmix64
from aifactory_train.data.store import DROPPED, Store


class Words:
    """The texts of all rows of a store and their shingles, read once: overlap, repetition and leakage look at the same
    ones.
    """

    def __init__(self, store: Store):
        self._store = store

    @functools.cached_property
    def texts(self) -> list[str]:
        return [own_report.text_of(row) for row in self._store.rows()]

    @functools.cached_property
    def shingles(self) -> near.Shingles:
        return near.shingle(self.texts)


@dataclass
class RowSelection:
    sets: list[tuple[str, np.ndarray, dict[str, Any]]]  # the first one is the training set
    how: dict[str, Any]
    duplicates: dict[str, Any]
    overlap: dict[str, Any]
    rows: dict[str, Any]  # what became of the rows that were given for training


def select(recipe: Recipe, store: Store, inputs: list[Input], words: Words) -> RowSelection:
    data = recipe.data
    source = np.asarray(store.column("rowsource"))
    _refuse_duplicate_ids(store, source)
    keep = np.ones(len(source), dtype=bool)
    duplicates = {"rows": 0, "by": "content"}
    if data.deduplicate:
        # The first of equal rows stays; train and eval are looked at apart (what they share is overlap, not
        # repetition).
        roles = np.asarray([0 if i.role == "train" else 1 + n for n, i in enumerate(inputs)], dtype=np.uint64)
        keys = splitmix64(np.asarray(store.column("rowdigest")) + roles[source])
        _, first = np.unique(keys, return_index=True)
        keep = np.zeros(len(source), dtype=bool)
        keep[first] = True
        duplicates["rows"] = int((~keep).sum())
    given = np.isin(source, [n for n, i in enumerate(inputs) if i.role == "train"])
    train = keep & given
    fate: dict[str, int] = {"given": int(given.sum()), "held_out": 0}
    dropped: dict[str, int] = {"duplicate": int((given & ~keep).sum())}
    evals: list[tuple[str, np.ndarray]] = []
    if data.eval:
        how: dict[str, Any] = {"by": "given eval sources"}
        for n, item in enumerate(inputs):
            if item.role == "eval":
                rows = np.flatnonzero(keep & (source == n))
                if data.split_by is None or data.split_by.time is None:
                    split.refuse_leaks(store, np.flatnonzero(train), rows, "data.eval")
                evals.append((item.name, _sample(rows, data.eval_rows, data.split_seed)))
    else:
        how = {"by": "group", "fraction": data.eval_fraction, "seed": data.split_seed, "groups": {}}
        for n, item in enumerate(inputs):
            if item.source.share is not None:
                continue  # replayed against forgetting: the run is not judged by it
            held, left_out, facts = _hold_out(store, np.flatnonzero(train & (source == n)), recipe, item)
            how["groups"][item.name] = facts
            train[held] = train[left_out] = False
            evals.append((item.name, held))
            fate["held_out"] += len(held)
            dropped["group held out"] = dropped.get("group held out", 0) + len(left_out)
        how["rows_of_held_out_groups_in_other_sources"] = _other_sources(store, train, evals)
        dropped["group held out"] += how["rows_of_held_out_groups_in_other_sources"]
    train_rows = np.flatnonzero(train)
    train_rows, evals, overlap = _overlap(recipe, store, train_rows, evals, words)
    if "dropped_from_train" in overlap:
        dropped |= {"overlap: same text": overlap["same_text"], "overlap: nearly same": overlap["nearly_same"]}
    dropped |= _without_documents(store, train_rows)
    used = len(train_rows) - sum(dropped.get(why, 0) for why in DROPPED)
    fate["used"] = used
    sets = [_as_set("train", store, train_rows)]
    sets += [_as_set(name, store, rows) for name, rows in evals]
    for number, ((name, docs, _), rows) in enumerate(zip(sets, [train_rows, *(r for _, r in evals)], strict=True)):
        if len(docs) == 0:
            raise _empty(name, number == 0, dropped if number == 0 else _without_documents(store, rows))
    return RowSelection(
        sets, how, duplicates, overlap, {**fate, "dropped": {why: n for why, n in dropped.items() if n}}
    )


def _without_documents(store: Store, rows: np.ndarray) -> dict[str, int]:
    """How many of some rows became no document, by reason."""
    counts = np.bincount(np.asarray(store.column("rowdropped"))[rows], minlength=len(DROPPED))
    return {why: int(n) for why, n in zip(DROPPED, counts, strict=True) if why}


def _empty(name: str, train: bool, dropped: dict[str, int]) -> UserError:
    """What to say of a set without documents: where its rows went."""
    reasons = sorted(((n, why) for why, n in dropped.items() if n), reverse=True)
    if not reasons:
        return UserError(
            f"the split '{name}' is empty: no document of it carries loss",
            where="data.train" if train else "data.eval",
            fix="give more rows, or another data.eval_fraction",
        )
    main = reasons[0][1]
    fix = own_report.REASONS[main][1]
    if main.startswith("overlap"):
        fix = f"give other rows as data.eval, or leave it out (some of the rows are held out then); {fix}"
    return UserError(
        f"the split '{name}' is empty: "
        + ", ".join(f"{n:,} row(s) {own_report.REASONS[why][0]}" for n, why in reasons),
        where=own_report.KEYS.get(main, "data.train" if train else "data.eval"),
        fix=fix,
    )


def _refuse_duplicate_ids(store: Store, source: np.ndarray) -> None:
    ids = np.asarray(store.column("rowid"))
    given = np.flatnonzero(ids)
    if len(given) == 0:
        return
    keys = splitmix64(ids[given] + source[given].astype(np.uint64))
    order = np.argsort(keys, kind="stable")
    again = np.flatnonzero(keys[order][1:] == keys[order][:-1])
    if len(again) == 0:
        return
    pairs = sorted((int(given[order[j]]), int(given[order[j + 1]])) for j in again)
    first, second = min(pairs, key=lambda pair: pair[1])
    name = json.loads(store.row_line(second))["id"]
    raise UserError(
        f"the id '{name}' was already given at {store.place(first)}",
        where=store.place(second),
        fix="ids must be unique within a source; leave them out where rows have none",
    )


def _sample(rows: np.ndarray, most: int, seed: int) -> np.ndarray:
    """At most ``most`` rows, chosen by hash, in their own order."""
    if len(rows) <= most:
        return rows
    return np.sort(rows[hash_order(len(rows), seed, 0)[:most]])


def _hold_out(
    store: Store, rows: np.ndarray, recipe: Recipe, item: Input
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Rows of some groups: as many as ``eval_fraction`` says, but no more than ``eval_rows`` need. Returns the held-out
    rows, rows that belong to a held-out group and are not needed (no part of the training either), and what was
    done."""
    data = recipe.data
    by_time = data.split_by is not None and data.split_by.time is not None
    groups, member = np.unique(np.asarray(store.column("rowgroup"))[rows], return_inverse=True)
    note = {}
    if len(groups) < 2 and len(rows) >= 2 and data.split_by is None and not _named(store, rows[0]):
        # All rows ask the same: then each row is a group of its own.
        groups, member, note = rows.astype(np.uint64), np.arange(len(rows)), {"by": "row (all rows are of one group)"}
        groups = splitmix64(groups)
    if len(groups) < 2:
        what = "moment" if by_time else "group"
        if not len(rows):
            raise UserError(
                "every row of it repeats one that stands before it: nothing is left",
                where=str(item.path),
                fix="name each source once (data.train.N.weight repeats its rows), or data.deduplicate=false",
            )
        raise UserError(
            f"{len(rows)} row(s) of one {what} cannot be split into training and held-out rows"
            if len(rows) > 1
            else f"{len(rows)} row(s) cannot be split into training and held-out rows",
            where=str(item.path),
            fix="give at least two different rows (or groups), or held-out rows with data.eval",
        )
    sizes = np.bincount(member, minlength=len(groups))
    chosen, facts = split.choose(
        groups, sizes, fraction=data.eval_fraction, most=data.eval_rows, seed=data.split_seed, by_time=by_time
    )
    all_held = rows[chosen[member]]
    held = _sample(all_held, data.eval_rows, data.split_seed)
    left_out = np.setdiff1d(all_held, held)
    facts |= {"groups": len(groups), "held_out_groups": int(chosen.sum()), "held_out_rows": len(held), **note}
    if len(left_out):
        facts["rows_not_needed"] = len(left_out)
    return held, left_out, facts


def _named(store: Store, row: int) -> bool:
    """Whether the row's group was given by a column (or is its file), not derived from its question."""
    return "group" in json.loads(store.row_line(int(row)))


def _other_sources(store: Store, train: np.ndarray, evals: list[tuple[str, np.ndarray]]) -> int:
    """Take rows out of ``train`` whose named group is held out in another source; returns how many. Changes
    ``train``.
    """
    if len(evals) < 2:
        return 0
    groups = np.asarray(store.column("rowgroup"))
    rows = np.flatnonzero(train)
    both, first, _ = np.intersect1d(
        groups[rows], groups[np.concatenate([held for _, held in evals])], return_indices=True
    )
    named = [g for g, at in zip(both, first, strict=True) if _named(store, rows[at])]
    out = rows[np.isin(groups[rows], named)]
    train[out] = False
    return len(out)


def _overlap(
    recipe: Recipe, store: Store, train: np.ndarray, evals: list[tuple[str, np.ndarray]], words: Words
) -> tuple[np.ndarray, list[tuple[str, np.ndarray]], dict[str, Any]]:
    """Find training rows that an evaluation row repeats, and do what ``data.overlap`` says."""
    norm = np.asarray(store.column("rownorm"))
    held = np.concatenate([rows for _, rows in evals])
    same = np.isin(norm[train], norm[held])
    train_docs, held_docs = _documents(store, train), _documents(store, held)
    repeats, partner = near_duplicates(store, train_docs, held_docs)
    docrow = np.asarray(store.column("docrow"))
    near_rows = np.isin(train, docrow[train_docs[repeats]])
    touched = np.isin(norm[held], norm[train]) | np.isin(held, docrow[held_docs[partner[repeats]]])
    if _small(store):
        _, worded, _, worded_held = near.between(words.shingles, train, held)
        near_rows |= worded
        touched |= worded_held
    found = same | near_rows
    facts: dict[str, Any] = {
        "policy": recipe.data.overlap,
        "same_text": int(same.sum()),
        "nearly_same": int((near_rows & ~same).sum()),
        "held_out_rows_repeated": int(touched.sum()),
        "share": round(int(touched.sum()) / max(1, len(held)), 4),
        "share_left": 0.0 if recipe.data.overlap == "drop" else round(int(touched.sum()) / max(1, len(held)), 4),
        "rule": f"one training document holds {SHARE:.0%} of a held-out document's telling {LENGTH}-token sequences"
        + (f"; or {near.RULE}" if _small(store) else ""),
    }
    if recipe.data.overlap == "refuse" and found.any():
        first = int(train[np.flatnonzero(found)[0]])
        if norm[first] in norm[held]:
            other = int(held[np.flatnonzero(norm[held] == norm[first])[0]])
        else:
            at = np.flatnonzero(repeats & (docrow[train_docs] == first))
            other = int(docrow[held_docs[partner[at[0]]]]) if len(at) else _twin(words, first, held)
        raise UserError(
            f"{int(found.sum())} training row(s) repeat held-out rows; the first one repeats {store.place(other)}",
            where=store.place(first),
            fix="remove them, or let data.overlap=drop take them out of the training rows",
        )
    if recipe.data.overlap == "drop":
        train = train[~found]
        facts["dropped_from_train"] = int(found.sum())
    return train, evals, facts


def _small(store: Store) -> bool:
    """Whether rows are compared word by word as well (:mod:`near`); with more data the token sequences alone decide."""
    return int(np.asarray(store.column("rowlength")).sum(dtype=np.int64)) <= own_report.AT_ONCE


def _twin(words: Words, row: int, held: np.ndarray) -> int:
    """The held-out row whose words are nearest to those of ``row``."""
    own = words.shingles.of(row)
    return int(held[int(np.argmax([near.similarity(own, words.shingles.of(int(i))) for i in held]))])


def _documents(store: Store, rows: np.ndarray) -> np.ndarray:
    """Documents of some rows, in the order of the store."""
    wanted = np.zeros(store.facts["rows"], dtype=bool)
    wanted[rows] = True
    return np.flatnonzero(wanted[np.asarray(store.column("docrow"))]).astype(np.int64)


def _as_set(name: str, store: Store, rows: np.ndarray) -> tuple[str, np.ndarray, dict[str, Any]]:
    docs = _documents(store, rows)
    lengths = np.asarray(store.column("lengths"))[docs]
    report: dict[str, Any] = {
        "rows": len(rows),
        "documents": len(docs),
        "tokens": int(lengths.sum(dtype=np.int64)),
        "supervised": int(np.asarray(store.column("supervised"))[docs].sum(dtype=np.int64)),
        "text_bytes": int(np.asarray(store.column("textbytes"))[docs].sum(dtype=np.int64)),
    }
    if len(docs):
        report["length"] = {f"p{q}": int(np.percentile(lengths, q)) for q in (0, 50, 90, 99, 100)}
    return name, docs, report
