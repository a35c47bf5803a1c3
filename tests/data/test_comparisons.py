"""What is compared on arrays is what comparing sets, one text after another, gives."""

from __future__ import annotations

import random
import re
from collections import Counter
from pydoc_data.topics import topics
from types import SimpleNamespace

import numpy as np
import pytest

from aifactory_train.data import language, near, overlap

WORDS = topics["lambda"].split() + topics["strings"].split()
ODD = [
    "straße",
    "ΣΊΣΥΦΟΣ",
    "你好世界",
    "ไทย",
    "a_b",
    "x\0y",
    "e\u0301",
    "don't",
    "\x1c",
    "\u3000",
    "١٢",
    "",
    "HP:0001",
    "ﬁ",
]


def texts(draw: random.Random, count: int) -> list[str]:
    out = []
    for _ in range(count):
        start = draw.randrange(len(WORDS) - 60)
        words = WORDS[start : start + draw.choice([0, 1, 2, 3, 5, 20, 60])]
        for _ in range(draw.choice([0, 0, 2])):
            words.insert(draw.randrange(len(words) + 1), draw.choice(ODD))
        out.append(draw.choice([" ", "\n", "  "]).join(words))
    for text in out[: count // 2]:
        words = text.split(" ")
        words[draw.randrange(len(words))] = "other"
        out.append(" ".join(words))
    draw.shuffle(out)
    return out


# ---- documents that repeat a held-out one, on token ids


def repeated(train: list[list[int]], held: list[list[int]]) -> list[bool]:
    """:func:`overlap.near_duplicates` with sets."""
    sequences = [[{tuple(d[i : i + 8]) for i in range(len(d) - 7)} for d in side] for side in (train, held)]
    often = Counter(s for found in sequences[0] for s in found)
    common = {s for s, n in often.items() if n > max(5, 0.05 * len(train))}
    telling = [found - common for found in sequences[1]]
    return [any(len(h) >= 3 and len(h & t) >= 0.8 * len(h) for h in telling) for t in sequences[0]]


@pytest.mark.parametrize("seed", range(6))
def test_repeated_documents_are_those_that_sets_of_sequences_give(seed, monkeypatch):
    monkeypatch.setattr(overlap, "_AT_A_TIME", 64)  # documents lie across what is hashed at once
    draw = random.Random(seed)
    pool = [draw.randrange([3, 60, 70_000][seed % 3]) for _ in range(900)]
    documents = []
    for _ in range(200):
        start = draw.randrange(800)
        documents.append(pool[start : start + draw.choice([0, 1, 7, 8, 9, 12, 30, 90])])
    lengths = np.asarray([len(d) for d in documents], dtype=np.int32)
    store = SimpleNamespace(
        token_map=np.asarray([t for d in documents for t in d], dtype=np.uint32),
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        column=lambda name: lengths,
    )
    of_held = np.asarray([draw.random() < 0.2 for _ in documents])
    train, held = np.flatnonzero(~of_held), np.flatnonzero(of_held)
    found, partner = overlap.near_duplicates(store, train, held)
    assert found.tolist() == repeated([documents[i] for i in train], [documents[i] for i in held])
    assert (found == (partner >= 0)).all() and (seed % 3 == 0 or found.any())


@pytest.mark.parametrize("count", [0, 1, 5000])
def test_a_sieve_lets_all_through_that_are_wanted_and_few_others(count):
    dice = np.random.default_rng(count)
    wanted, others = (dice.integers(0, 1 << 64, n, dtype=np.uint64) for n in (count, 100_000))
    sieve = overlap.Sieve(wanted)
    assert len(sieve.among(wanted)) == count
    assert len(sieve.among(others)) < 0.1 * len(others)


# ---- texts that repeat one another, on words


def test_texts_have_the_shingles_together_that_they_have_alone():
    some = texts(random.Random(2), 150)
    together = near.shingle(some)
    assert len(together) == len(some)
    for i, text in enumerate(some):
        alone = near.shingle([text])
        assert together.of(i).tolist() == alone.of(0).tolist() and together.whole[i] == alone.whole[0]
        plain = re.sub(r"[^\w]|_", " ", text) if text.isascii() else text  # the words are those of the pattern
        assert near.shingle([" ".join(near._WORD.findall(plain.casefold()))]).of(0).tolist() == alone.of(0).tolist()


def test_similar_texts_are_those_whose_sets_are_similar():
    shingles = near.shingle(texts(random.Random(5), 120))
    rows = np.arange(len(shingles))
    sets = [set(shingles.of(i).tolist()) for i in rows]
    often = Counter(s for held in sets for s in held)
    telling = [{s for s in held if often[s] <= max(10, 0.1 * len(sets))} for held in sets]
    telling = [held if len(held) >= 3 else set() for held in telling]
    one, other = (pair.ravel() for pair in np.meshgrid(rows, rows))
    expected = [
        bool(telling[a]) and len(telling[a] & telling[b]) >= 0.8 * len(telling[a] | telling[b])
        for a, b in zip(one, other, strict=True)
    ]
    assert shingles.scored(rows).similar(one, other).tolist() == expected and sum(expected) > 90


def test_shingles_that_begin_alike_are_told_apart():
    close = np.asarray([5, 6, 7, 8, 1 << 63, 6, 7, 9, 10], dtype=np.uint64)
    judged = near.Shingled(close, np.asarray([0, 5, 5, 9]), np.zeros((near.BANDS, 3), dtype=np.uint64))
    wanted = np.asarray([4, 5, 8, 9, 1 << 63, 5, 6, 9, 10, 11, 6], dtype=np.uint64)
    owner = np.asarray([0, 0, 0, 0, 0, 2, 2, 2, 2, 2, 1])
    expected = [
        n in close[judged.starts[t] : judged.starts[t + 1]].tolist()
        for n, t in zip(wanted.tolist(), owner, strict=True)
    ]
    assert judged._held(wanted, owner).tolist() == expected and sum(expected) == 6


# ---- languages


def test_prose_is_what_the_patterns_leave():
    draw = random.Random(7)
    code = ["</b>", "&amp;", "http://a/b", "a_b", "x=1", "naïve", "m.N", "f(x)", "KG7", "你好x", "B2", "é=1", "w" * 60]
    for text in texts(draw, 80):
        words = text.split(" ")
        words.insert(draw.randrange(len(words) + 1), draw.choice(code))
        text = " ".join(words)
        runs = language._RUN.sub(
            lambda run: "" if language._CODE.search(run[0]) else run[0], language._MARKUP.sub(" ", text)
        )
        assert language.prose(text) == language.prose(text) == runs


def test_no_letter_of_one_language_is_ascii():
    assert not any(letter.isascii() for letter in language._BY_LETTER)
    assert language.detect("12 / 34") == "und" and language.detect("") == "und"
