"""The order of documents is a pure function, and a step's documents are shared out once each."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import slow_split
from hypothesis import given, settings
from hypothesis import strategies as st

from aifactory_train.data import Cursor, Sampler, sampler, split_step
from aifactory_train.data.sampler import hash_order, splitmix64, stable_order

lengths = st.lists(st.integers(1, 200), min_size=1, max_size=60).map(np.asarray)


def walk(sampler: Sampler, cursor: Cursor, steps: int) -> list[tuple[list[int], Cursor]]:
    out = []
    for _ in range(steps):
        docs, cursor = sampler.step(cursor)
        out.append((docs.tolist(), cursor))
    return out


def test_splitmix64_equals_the_published_generator():
    """First outputs of SplitMix64 seeded with 1234567 (the test vector of the Rosetta Code task of that name)."""
    state = np.asarray([1234567], dtype=np.uint64)
    out = []
    for _ in range(5):
        out.append(int(splitmix64(state)[0]))
        state = state + np.uint64(0x9E3779B97F4A7C15)
    assert out == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_order_is_fixed_for_ever():
    """A changed order would break the resume of every run out there."""
    assert hash_order(10, 17, 0).tolist() == ORDER_17_0
    assert hash_order(10, 17, 1).tolist() != ORDER_17_0


ORDER_17_0 = [1, 9, 7, 6, 2, 0, 5, 3, 4, 8]


@settings(max_examples=60, deadline=None)
@given(lengths=lengths, seed=st.integers(0, 2**40), rows=st.integers(1, 70))
def test_an_epoch_holds_every_document_once_in_steps_of_nearly_equal_size(lengths, seed, rows):
    sampler = Sampler(lengths, seed=seed, batch_rows=rows)
    steps = walk(sampler, Cursor(), sampler.steps_per_epoch(0))
    assert sorted(d for docs, _ in steps for d in docs) == list(range(len(lengths)))
    assert steps[-1][1] == Cursor(1, 0)
    sizes = [len(docs) for docs, _ in steps]
    assert max(sizes) <= rows and max(sizes) - min(sizes) <= 1


@settings(max_examples=60, deadline=None)
@given(lengths=lengths, seed=st.integers(0, 1000), tokens=st.integers(1, 500))
def test_token_batches_hold_every_document_once_within_the_bound(lengths, seed, tokens):
    sampler = Sampler(lengths, seed=seed, batch_tokens=tokens)
    steps = walk(sampler, Cursor(), sampler.steps_per_epoch(0))
    assert sorted(d for docs, _ in steps for d in docs) == list(range(len(lengths)))
    assert all(len(docs) == 1 or lengths[docs].sum() <= tokens for docs, _ in steps)


@settings(max_examples=40, deadline=None)
@given(lengths=lengths, rows=st.integers(1, 9), at=st.integers(0, 30))
def test_a_new_sampler_goes_on_from_any_cursor(lengths, rows, at):
    one = walk(Sampler(lengths, seed=5, batch_rows=rows), Cursor(), at + 4)
    cursor = one[at - 1][1] if at else Cursor()
    assert walk(Sampler(lengths, seed=5, batch_rows=rows), cursor, 4) == one[at:]


def test_epochs_differ_and_seeds_differ():
    n = np.full(100, 5)
    first, second = Sampler(n, seed=1, batch_rows=4), Sampler(n, seed=2, batch_rows=4)
    assert first.order(0).tolist() != first.order(1).tolist() != second.order(1).tolist()
    assert first.order(0).tolist() == Sampler(n, seed=1, batch_rows=7).order(0).tolist()


def test_order_looks_random():
    """Neighbours are not kept together and first places are spread: mean rank distance of a shuffle is n/3."""
    order = hash_order(3000, 3, 0)
    assert abs(np.abs(np.diff(order)).mean() / 1000 - 1) < 0.05


@pytest.mark.parametrize(("weight", "expected"), [(0.5, 10), (1.0, 20), (2.0, 40), (2.25, 45), (0.001, 1)])
def test_weights_give_rows_per_epoch(weight, expected):
    weights = np.asarray([weight] * 20 + [1.0] * 30)
    sampler = Sampler(np.full(50, 3), weights, seed=4, batch_rows=5)
    for epoch in range(3):
        order = sampler.order(epoch)
        assert int((order < 20).sum()) == expected and int((order >= 20).sum()) == 30
        counts = np.bincount(order, minlength=50)[:20]
        assert counts.max() - counts.min() <= 1
    if weight == 0.5:
        assert set(sampler.order(0)[sampler.order(0) < 20]) != set(sampler.order(1)[sampler.order(1) < 20])


def test_steps_of_fractional_epochs():
    sampler = Sampler(np.full(100, 3), seed=1, batch_rows=10)
    assert [sampler.steps(e) for e in (0.01, 0.5, 1, 1.25, 3)] == [1, 5, 10, 13, 30]
    assert [sampler.steps(e, at_most=12) for e in (0.01, 1, 1.25, 3, 1e18)] == [
        1,
        10,
        12,
        12,
        12,
    ]  # 1e18 must not be counted out


def test_two_million_documents_are_ordered_in_seconds():
    sampler = Sampler(np.ones(2_000_000, dtype=np.int32), seed=1, batch_rows=1024)
    began = time.monotonic()
    docs, cursor = sampler.step(Cursor(0, 1_000_000))
    assert len(docs) == math.ceil(1_000_000 / math.ceil(1_000_000 / 1024)) and time.monotonic() - began < 30
    assert cursor.epoch == 0


@settings(max_examples=150, deadline=None)
@given(
    lengths=lengths,
    world=st.integers(1, 8),
    accum=st.one_of(st.just("auto"), st.integers(1, 5)),
    micro=st.integers(200, 1000),
    batching=st.sampled_from(["packed", "padded"]),
)
def test_split_step_deals_every_document_once(lengths, world, accum, micro, batching):
    docs = np.arange(len(lengths))[::2]
    slots = split_step(docs, lengths, world, accum, micro, batching)
    assert len(slots) == world and len({len(s) for s in slots}) == 1
    assert sorted(int(d) for rank in slots for slot in rank for d in slot) == docs.tolist()
    if accum != "auto":
        assert len(slots[0]) == accum
    else:
        for slot in (s for rank in slots for s in rank if len(s)):
            cost = lengths[slot].sum() if batching == "packed" else lengths[slot].max() * len(slot)
            assert cost <= micro
    again = split_step(docs, lengths, world, accum, micro, batching)
    assert [[s.tolist() for s in r] for r in again] == [[s.tolist() for s in r] for r in slots]


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(20, 200), min_size=32, max_size=64).map(np.asarray), world=st.integers(1, 4))
def test_ranks_get_nearly_the_same_number_of_tokens(lengths, world):
    slots = split_step(np.arange(len(lengths)), lengths, world, 1, 4096, "packed")
    loads = [int(sum(lengths[s].sum() for s in rank)) for rank in slots]
    assert max(loads) - min(loads) <= int(lengths.max())


def test_the_documents_of_a_step_do_not_depend_on_the_world_size():
    sampler = Sampler(np.arange(1, 41), seed=9, batch_rows=8)
    docs, _ = sampler.step(Cursor())
    for world in (1, 2, 3, 8):
        slots = split_step(docs, sampler.lengths, world, 2, 64, "packed")
        assert sorted(int(d) for r in slots for s in r for d in s) == sorted(docs.tolist())


def test_no_documents_give_empty_slots():
    assert [[len(s) for s in r] for r in split_step(np.asarray([], dtype=int), np.asarray([3]), 2, "auto", 8)] == [
        [0],
        [0],
    ]


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.one_of(
        st.lists(st.integers(1, 40), min_size=1, max_size=400),
        st.lists(st.integers(1, 4), min_size=1, max_size=400),  # equal loads nearly everywhere
        st.lists(st.sampled_from([1, 2, 3, 500, 4096]), min_size=1, max_size=400),
    ).map(np.asarray),
    world=st.integers(1, 130),
    accum=st.one_of(st.just("auto"), st.integers(1, 4)),
    micro=st.integers(1, 5000),
    batching=st.sampled_from(["packed", "padded"]),
    together=st.sampled_from([1, 8, 64]),
)
def test_split_step_deals_as_one_slot_after_the_other(lengths, world, accum, micro, batching, together):
    """Another deal would change which documents a rank gets, and so the last bits of every run that is resumed."""
    docs = np.random.default_rng(len(lengths)).permutation(len(lengths))
    expected = slow_split.split_step(docs, lengths, world, accum, micro, batching)
    kept, sampler._TOGETHER = sampler._TOGETHER, together
    try:
        found = split_step(docs, lengths, world, accum, micro, batching)
    finally:
        sampler._TOGETHER = kept
    assert [[s.tolist() for s in r] for r in found] == [[s.tolist() for s in r] for r in expected]
    assert found[-1][0].tolist() == expected[-1][0].tolist() and len(found[:2]) == len(expected[:2])
    padded = [int(lengths[s].max()) for rank in expected for s in rank for _ in s]
    assert found.longest(lengths).tolist() == padded


@settings(max_examples=100, deadline=None)
@given(
    most=st.sampled_from([0, 3, 2**16 - 1, 2**16, 2**20, 2**32 - 1, 2**32, 2**62]),
    n=st.integers(0, 300),
    least=st.sampled_from([0, -5]),
    seed=st.integers(0, 99),
)
def test_keys_are_ordered_as_a_stable_sort_orders_them(most, n, least, seed):
    keys = np.random.default_rng(seed).integers(least, most, n, endpoint=True)
    keys = np.concatenate([keys, keys[: n // 2]])  # equal keys keep their order
    assert stable_order(keys).tolist() == np.argsort(keys, kind="stable").tolist()


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_thousands_of_ranks_are_dealt_to_without_a_loop_over_documents(batching):
    """4,096 ranks with 8 documents each: the loop that this replaced takes ten times as long."""
    lengths = np.minimum(4096, np.exp(np.random.default_rng(0).normal(5.5, 1.0, 4096 * 8)).astype(int) + 1)
    arguments = (np.arange(len(lengths)), lengths, 4096, 1, 4096, batching)

    def seconds(deal, times):
        took = []
        for _ in range(times):
            began = time.process_time()
            deal(*arguments)
            took.append(time.process_time() - began)
        return min(took)

    assert seconds(split_step, 5) < seconds(slow_split.split_step, 1) / 2
