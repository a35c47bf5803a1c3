"""The chain of events: nothing can be changed, lost, swapped or torn without being named."""

from __future__ import annotations

import json
import multiprocessing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aifactory_train.record.chain import Chain, canonical, differences, fold, plain, read_events


def written(path, count: int = 5):
    chain = Chain(path)
    for i in range(count):
        chain.append("progress", {"compute/steps": i, f"attempts/{i:03d}/state": "running"}, f"n {i}")
    return path


def test_whole_chain(tmp_path):
    path = written(tmp_path / "events.jsonl")
    events, faults = read_events(path)
    assert faults == [] and [e["seq"] for e in events] == [0, 1, 2, 3, 4]
    record = fold(events)
    assert record["compute"] == {"steps": 4} and record["attempts"]["003"] == {"state": "running"}
    assert record["log"] == {"file": "events.jsonl", "events": 5, "head_sha256": events[-1]["sha256"]}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_changed_byte_is_noticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("chain") / "events.jsonl"
    written(path, 3)
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    raw[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(raw))
    _, faults = read_events(path)
    assert faults, raw[max(0, at - 20) : at + 20]


def test_an_edited_line_is_named_alone(tmp_path):
    path = written(tmp_path / "events.jsonl")
    lines = path.read_text().splitlines()
    event = json.loads(lines[2])
    event["set"]["compute/steps"] = 99
    lines[2] = json.dumps(event)
    path.write_text("\n".join(lines) + "\n")
    _, faults = read_events(path)
    assert [(f.kind, f.where) for f in faults] == [("edited-event", "events.jsonl:3")]


@pytest.mark.parametrize("edit", ["delete", "swap", "repeat"])
def test_lost_and_moved_lines(tmp_path, edit):
    path = written(tmp_path / "events.jsonl")
    lines = path.read_text().splitlines()
    if edit == "delete":
        del lines[2]
    elif edit == "swap":
        lines[2], lines[3] = lines[3], lines[2]
    else:
        lines.insert(3, lines[2])
    path.write_text("\n".join(lines) + "\n")
    _, faults = read_events(path)
    assert {f.kind for f in faults} == {"broken-chain"}
    assert any(":3" in f.where or ":4" in f.where for f in faults)


def test_a_cut_end_cannot_be_seen_by_the_chain_but_by_the_record(tmp_path):
    """Lines missing at the end leave a whole chain; the record's count of events notices (see test_record)."""
    path = written(tmp_path / "events.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:3]) + "\n")
    events, faults = read_events(path)
    assert faults == [] and len(events) == 3


@pytest.mark.parametrize("keep", [1, 40, -2])
def test_torn_line_is_named_then_mended(tmp_path, keep):
    path = written(tmp_path / "events.jsonl", 3)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rpartition(b"\n")[2]
    path.write_bytes(whole[: len(whole) - len(last) - 1] + last[:keep])
    _, faults = read_events(path)
    assert [(f.kind, f.where) for f in faults] == [("torn-line", "events.jsonl:3")]
    Chain(path).append("progress", {"compute/steps": 7})
    events, faults = read_events(path)
    assert faults == []
    assert [e["kind"] for e in events] == ["progress", "progress", "torn-line-cut", "progress"]
    assert events[2]["set"]["log_repairs/2"]["bytes"] == len(last[:keep])


def test_torn_first_line(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"seq":0,"ti')
    Chain(path).append("progress", {})
    events, faults = read_events(path)
    assert faults == [] and [e["kind"] for e in events] == ["torn-line-cut", "progress"]


def _append_many(path, name):
    chain = Chain(path)
    for i in range(25):
        chain.append("note", {f"{name}/{i}": i})


def test_two_writers_take_turns(tmp_path):
    path = tmp_path / "events.jsonl"
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_append_many, args=(path, name)) for name in "ab"]
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    events, faults = read_events(path)
    assert faults == [] and len(events) == 50
    assert set(fold(events)) == {"a", "b", "log"}


def test_long_events_are_found_from_the_end(tmp_path):
    path = tmp_path / "events.jsonl"
    chain = Chain(path)
    for i in range(3):
        chain.append("big", {"text": "ä" * 100_000, "i": i})
    events, faults = read_events(path)
    assert faults == [] and [e["seq"] for e in events] == [0, 1, 2]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None)
@given(json_values)
def test_what_is_hashed_survives_writing_and_reading(value):
    ready = plain(value)
    assert canonical(json.loads(json.dumps(ready, ensure_ascii=False))) == canonical(ready)


@given(json_values, json_values)
def test_differences_are_empty_only_for_equal_values(a, b):
    a, b = plain(a), plain(b)
    assert differences(a, a) == []
    if canonical(a) != canonical(b) and a != b:
        assert differences(a, b)
