"""Reading, splitting, cutting, caching: what goes in comes out once, and the same input gives the same files."""

from __future__ import annotations

import csv
import gzip
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_families import FAMILIES, byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from aifactory_train.config.schema import Recipe
from aifactory_train.data import prepare, read_json, readers, reading
from aifactory_train.data.store import TokenDataset
from aifactory_train.data.tokenizer import encoder_spec

PAIRS = [{"prompt": f"question number {i}?", "completion": f"answer {i * 7} þ 👋"} for i in range(40)]


def recipe(train: Any, **data) -> Recipe:
    return Recipe.model_validate({"model": {"base": "x/y"}, "data": {"train": train, **data}})


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return path


def run(tmp_path: Path, train: Any, *, tokenizer=None, **data):
    return prepare(recipe(train, **data), tokenizer or byte_tokenizer(), cache_dir=tmp_path / "cache")


def questions(dataset: TokenDataset) -> list[str]:
    return [dataset.row(i)["messages"][0]["content"] for i in range(len(dataset))]


# ---- formats


def write_parquet(path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(PAIRS), path / "rows.parquet")
    return path / "rows.parquet"


def write_csv(path: Path) -> Path:
    with (path / "rows.csv").open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(PAIRS)
    return path / "rows.csv"


def write_json(path: Path) -> Path:
    (path / "rows.json").write_text(json.dumps({"version": 1, "data": PAIRS}, indent=1), encoding="utf-8")
    return path / "rows.json"


def write_gzip(path: Path) -> Path:
    with gzip.open(path / "rows.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in PAIRS)
    return path / "rows.jsonl.gz"


def write_saved(path: Path) -> Path:
    import datasets

    datasets.Dataset.from_list(PAIRS).save_to_disk(path / "saved")
    return path / "saved"


def write_folder(path: Path) -> Path:
    (path / "folder").mkdir()
    jsonl(path / "folder" / "a.jsonl", PAIRS[:25])
    jsonl(path / "folder" / "b.jsonl", PAIRS[25:])
    return path / "folder"


def write_messages(path: Path) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": p["prompt"]}, {"role": "assistant", "content": p["completion"]}]}
        for p in PAIRS
    ]
    return jsonl(path / "messages.jsonl", rows)


def write_sharegpt(path: Path) -> Path:
    rows = [
        {"conversations": [{"from": "human", "value": p["prompt"]}, {"from": "gpt", "value": p["completion"]}]}
        for p in PAIRS
    ]
    return jsonl(path / "sharegpt.jsonl", rows)


def write_alpaca(path: Path) -> Path:
    return jsonl(
        path / "alpaca.jsonl", [{"instruction": p["prompt"], "input": "", "output": p["completion"]} for p in PAIRS]
    )


@pytest.mark.parametrize(
    "writer",
    [
        write_parquet,
        write_csv,
        write_json,
        write_gzip,
        write_saved,
        write_folder,
        write_messages,
        write_sharegpt,
        write_alpaca,
    ],
)
def test_every_format_gives_the_same_tokens(tmp_path, writer):
    plain = run(tmp_path, str(jsonl(tmp_path / "plain.jsonl", PAIRS)))
    other = run(tmp_path, str(writer(tmp_path)))
    assert other.train.digest == plain.train.digest
    assert [e.digest for e in other.evals.values()] == [e.digest for e in plain.evals.values()]
    assert len(other.train) + sum(map(len, other.evals.values())) == len(PAIRS)


def test_columns_are_renamed_and_the_report_says_how_rows_were_read(tmp_path):
    rows = [{"frage": p["prompt"], "antwort": p["completion"]} for p in PAIRS]
    source = {"source": str(jsonl(tmp_path / "r.jsonl", rows)), "columns": {"frage": "prompt", "antwort": "completion"}}
    prepared = run(tmp_path, source)
    assert prepared.train.digest == run(tmp_path, str(jsonl(tmp_path / "p.jsonl", PAIRS))).train.digest
    (facts,) = prepared.report["sources"]
    assert facts["format"] == "prompt" and "'prompt' and 'completion'" in facts["format_because"]


def test_text_files_are_documents(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(f"document number {i} " * 3, encoding="utf-8")
    prepared = run(tmp_path, str(folder))
    assert len(prepared.train) + sum(map(len, prepared.evals.values())) == 4
    assert prepared.report["sources"][0]["format"] == "text"


def test_byte_order_mark_and_windows_line_ends(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps(p) for p in PAIRS).encode())
    assert run(tmp_path, str(path)).train.digest == run(tmp_path, str(jsonl(tmp_path / "p.jsonl", PAIRS))).train.digest


def test_max_rows(tmp_path):
    for writer in (write_parquet, write_gzip):
        prepared = run(tmp_path, {"source": str(writer(tmp_path)), "max_rows": 7})
        assert prepared.report["sources"][0]["rows"] == 7


# ---- the store gives back what went in


def test_row_id_source_place_and_row(tmp_path):
    rows = [{"id": f"r{i}", **p} for i, p in enumerate(PAIRS)]
    path = jsonl(tmp_path / "mine.jsonl", rows)
    prepared = run(tmp_path, str(path))
    for i in range(len(prepared.train)):
        number = int(prepared.train.row_id(i)[1:])
        assert prepared.train.place(i) == f"{path}:{number + 1}"
        assert prepared.train.row(i)["messages"][1]["content"] == PAIRS[number]["completion"]
        assert prepared.train.source(i) == "mine"


def test_columns_agree_with_tokens(tmp_path):
    prepared = run(tmp_path, str(jsonl(tmp_path / "r.jsonl", PAIRS)))
    data = prepared.train
    for i in range(len(data)):
        assert len(data.tokens(i)) == data.lengths[i] == len(data.mask(i)) == len(data.text_mask(i))
        assert int(data.mask(i)[1:].sum()) == data.supervised[i] and not data.mask(i)[0]
        assert data.text_bytes(i) == len(data.row(i)["messages"][1]["content"].encode())
    assert data.report["tokens"] == int(data.lengths.sum())


def test_data_set_can_be_sent_to_another_process(tmp_path):
    import pickle  # what torch's loader processes do

    data = run(tmp_path, str(jsonl(tmp_path / "r.jsonl", PAIRS))).train
    again = pickle.loads(pickle.dumps(data))  # noqa: S301
    assert (again.tokens(3) == data.tokens(3)).all() and again.digest == data.digest


# ---- long documents


@settings(max_examples=25, deadline=None)
@given(words=st.lists(st.text("abþ👋 \n", min_size=1, max_size=40), min_size=1, max_size=6), length=st.integers(8, 40))
def test_split_predicts_every_token_once_and_counts_every_byte_once(tmp_path_factory, words, length):
    tmp_path = tmp_path_factory.mktemp("split")
    texts = [w + "x" + str(i) for i, w in enumerate(words)] + ["another row", "and one more"]
    path = jsonl(tmp_path / "r.jsonl", [{"text": t} for t in texts])
    held = jsonl(tmp_path / "e.jsonl", [{"text": "held out, of other words"}])
    options = {"eval": str(held), "deduplicate": False, "overlap": "allow"}
    whole = run(tmp_path, str(path), sequence_length=4096, **options).train
    parts = run(tmp_path, str(path), sequence_length=length, long_documents="split", **options).train
    assert max(parts.lengths) <= length
    assert int(parts.supervised.sum()) == int(whole.supervised.sum())
    assert sum(parts.text_bytes(i) for i in range(len(parts))) == sum(whole.text_bytes(i) for i in range(len(whole)))
    assert sum(int(parts.text_mask(i).sum()) for i in range(len(parts))) == sum(
        int(whole.text_mask(i).sum()) for i in range(len(whole))
    )


def test_truncate_split_and_drop_are_counted(tmp_path):
    rows = [{"text": "short"}, {"text": "a much longer document than fits, really " * 3}, {"text": "tiny"}]
    path, held = jsonl(tmp_path / "r.jsonl", rows), jsonl(tmp_path / "e.jsonl", [{"text": "held"}])
    counts = {}
    for policy in ("truncate", "split", "drop"):
        prepared = run(tmp_path, str(path), eval=str(held), sequence_length=32, long_documents=policy)
        counts[policy] = prepared.report["sources"][0]["counts"]
        assert max(prepared.train.lengths) <= 32
    assert counts == {"truncate": {"truncated": 1}, "split": {"split": 1}, "drop": {"dropped: long": 1}}


def test_truncated_answer_counts_the_bytes_that_are_left(tmp_path):
    rows = [{"prompt": "q", "completion": "þ" * 100}]
    path, held = jsonl(tmp_path / "r.jsonl", rows), jsonl(tmp_path / "e.jsonl", PAIRS[:2])
    data = run(tmp_path, str(path), eval=str(held), sequence_length=60).train
    assert (
        data.text_bytes(0) == int(data.text_mask(0).sum()) == int(data.mask(0).sum())
    )  # a token a byte; no end-of-turn left


# ---- split, duplicates, overlap


def test_groups_are_never_divided(tmp_path):
    rows = [{"group": f"g{i % 10}", **p} for i, p in enumerate(PAIRS)]
    prepared = run(tmp_path, str(jsonl(tmp_path / "r.jsonl", rows)), eval_fraction=0.3)
    (held,) = prepared.evals.values()
    train_groups = {prepared.train.row(i)["group"] for i in range(len(prepared.train))}
    held_groups = {held.row(i)["group"] for i in range(len(held))}
    assert len(held_groups) == 3 and len(train_groups) == 7 and not train_groups & held_groups


def test_rows_with_the_same_question_stay_together(tmp_path):
    rows = [{"prompt": f"question {i % 8}", "completion": f"answer {i}"} for i in range(40)]
    prepared = run(tmp_path, str(jsonl(tmp_path / "r.jsonl", rows)), eval_fraction=0.25, overlap="allow")
    (held,) = prepared.evals.values()
    assert not set(questions(held)) & set(questions(prepared.train)) and len(held) == 10


def test_split_does_not_depend_on_the_order_of_rows(tmp_path):
    a = run(tmp_path, str(jsonl(tmp_path / "a.jsonl", PAIRS)))
    b = run(tmp_path, str(jsonl(tmp_path / "b.jsonl", PAIRS[::-1])))
    assert set(questions(a.evals["a"])) == set(questions(b.evals["b"]))
    c = run(tmp_path, str(jsonl(tmp_path / "a.jsonl", PAIRS)), split_seed=18)
    assert set(questions(c.evals["a"])) != set(questions(a.evals["a"]))


def test_eval_rows_bounds_the_held_out_part_and_gives_the_rest_to_training(tmp_path):
    prepared = run(tmp_path, str(jsonl(tmp_path / "r.jsonl", PAIRS)), eval_fraction=0.5, eval_rows=4)
    assert len(prepared.evals["r"]) == 4 and len(prepared.train) == 36


def test_duplicates_are_taken_out_once(tmp_path):
    path = jsonl(tmp_path / "r.jsonl", PAIRS + PAIRS[:5] + PAIRS[:2])
    prepared = run(tmp_path, str(path))
    assert prepared.report["duplicates"]["rows"] == 7
    assert len(prepared.train) + len(prepared.evals["r"]) == len(PAIRS)
    kept = run(tmp_path, str(path), deduplicate=False)
    assert len(kept.train) + len(kept.evals["r"]) == len(PAIRS) + 7


def test_overlap_is_dropped_from_training_only(tmp_path):
    train, held = jsonl(tmp_path / "t.jsonl", PAIRS), jsonl(tmp_path / "e.jsonl", PAIRS[:3])
    prepared = run(tmp_path, str(train), eval=str(held))
    assert len(prepared.evals["e"]) == 3 and not set(questions(prepared.train)) & set(questions(prepared.evals["e"]))
    assert prepared.report["overlap"]["same_text"] == 3
    assert len(run(tmp_path, str(train), eval=str(held), overlap="allow").train) == len(PAIRS)


def test_nearly_the_same_document_is_found_and_unlike_ones_are_not(tmp_path):
    generator = np.random.default_rng(3)  # this tokenizer's tokens are bytes, so the "words" are letters
    texts = ["".join(generator.choice(list("abcdefghijklmnop "), 120)) + "." for _ in range(60)]
    held = jsonl(tmp_path / "e.jsonl", [{"text": t} for t in texts[:5]])
    leaked = [texts[0] + " and more", "Before it: " + texts[1], texts[2][:60] + "Z" + texts[2][61:]]
    train = jsonl(tmp_path / "t.jsonl", [{"text": t} for t in texts[5:] + leaked])
    overlap = run(tmp_path, str(train), eval=str(held)).report["overlap"]
    assert overlap["nearly_same"] == 3 and overlap["held_out_rows_repeated"] == 3 and overlap["dropped_from_train"] == 3


def test_several_sources_have_an_evaluation_each_and_their_weights(tmp_path):
    a, b = jsonl(tmp_path / "a.jsonl", PAIRS[:20]), jsonl(tmp_path / "b.jsonl", PAIRS[20:])
    prepared = run(tmp_path, [{"source": str(a), "weight": 2.0}, str(b)])
    assert set(prepared.evals) == {"a", "b"}
    sources = [prepared.train.source(i) for i in range(len(prepared.train))]
    assert prepared.train.weights.tolist() == [2.0 if s == "a" else 1.0 for s in sources]


# ---- the cache


def test_second_run_reuses_the_cache_and_any_change_builds_another(tmp_path):
    path = jsonl(tmp_path / "r.jsonl", PAIRS)
    first = run(tmp_path, str(path))
    assert not first.reused
    again = run(tmp_path, str(path))
    assert again.reused and again.folder == first.folder and again.train.digest == first.train.digest
    assert again.report == first.report
    folders = {first.folder}
    for change in (
        {"sequence_length": 512},
        {"supervise": "all"},
        {"split_seed": 3},
        {"deduplicate": False},
        {"overlap": "allow"},
    ):
        folders.add(run(tmp_path, str(path), **change).folder)
    folders.add(run(tmp_path, str(path), tokenizer=byte_tokenizer("llama3")).folder)
    folders.add(run(tmp_path, {"source": str(path), "max_rows": 5}).folder)
    jsonl(path, PAIRS[:-1])
    folders.add(run(tmp_path, str(path)).folder)
    assert len(folders) == 9


def test_file_of_the_same_size_and_time_but_other_content(tmp_path):
    """Content decides, not the clock: the second version is written within the clock's resolution."""
    path = jsonl(tmp_path / "r.jsonl", PAIRS)
    stat = path.stat()
    first = run(tmp_path, str(path))
    path.write_text(path.read_text(encoding="utf-8").replace("answer 7 ", "answer 8 "), encoding="utf-8")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    second = run(tmp_path, str(path))
    assert second.folder != first.folder


def test_file_can_move_without_being_tokenised_again(tmp_path):
    path = jsonl(tmp_path / "r.jsonl", PAIRS)
    first = run(tmp_path, {"source": str(path), "name": "rows"})
    (tmp_path / "elsewhere").mkdir()
    moved = path.rename(tmp_path / "elsewhere" / "r.jsonl")
    assert run(tmp_path, {"source": str(moved), "name": "rows"}).folder == first.folder


@pytest.fixture
def given_away(monkeypatch) -> list:
    """Other processes are used however little there is to read; the blocks that they were given."""
    given: list = []

    class Pool(reading.ProcessPoolExecutor):
        def submit(self, work, *args):
            future = super().submit(work, *args)
            if work is reading._ready:
                future.result()  # else the process that is here already would have read everything before
            else:
                given.append(future)
            return future

    monkeypatch.setattr(reading, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(reading, "_PARALLEL_FROM", 0)
    monkeypatch.setattr(read_json, "BLOCK_BYTES", 1 << 14)
    return given


def test_workers_give_the_same_store(tmp_path, given_away):
    path = jsonl(
        tmp_path / "r.jsonl", [{"prompt": f"q {i} " + "x" * (i % 90), "completion": f"a {i}"} for i in range(4000)]
    )
    one = prepare(recipe(str(path), workers=1), byte_tokenizer(), cache_dir=tmp_path / "one")
    two = prepare(recipe(str(path), workers=2), byte_tokenizer(), cache_dir=tmp_path / "two")
    assert given_away and one.train.digest == two.train.digest and one.folder.name == two.folder.name
    for name in sorted(p.name for p in (one.folder / "store").iterdir()):
        assert (one.folder / "store" / name).read_bytes() == (two.folder / "store" / name).read_bytes(), name


def test_other_processes_withhold_what_this_one_withholds(tmp_path, capfd):
    from multiprocessing import get_context

    for protected in (False, True):
        spec = encoder_spec(byte_tokenizer(), recipe("r.jsonl"))
        with reading.ProcessPoolExecutor(
            1, mp_context=get_context("spawn"), initializer=reading._start_worker, initargs=(spec, protected)
        ) as pool:
            pool.submit(warnings.warn, "a zebra").result()
        reported = capfd.readouterr().err
        assert ("zebra" in reported) is not protected and ("withheld" in reported) is protected


def test_error_in_a_worker_names_the_line(tmp_path, given_away):
    from aifactory_train.core.errors import UserError

    path = jsonl(tmp_path / "r.jsonl", PAIRS * 100)
    with path.open("a", encoding="utf-8") as file:
        file.write("{broken\n")
    with pytest.raises(UserError, match=f"r.jsonl:{len(PAIRS) * 100 + 1}: not valid JSON"):
        prepare(recipe(str(path), workers=2), byte_tokenizer(), cache_dir=tmp_path / "cache")
    assert given_away and list((tmp_path / "cache").iterdir()) == []


def test_inspect_marks_supervised_text_without_colour(tmp_path, capsys):
    from aifactory_train.data.inspect import inspect_document

    tokenizer = byte_tokenizer()
    prepared = run(
        tmp_path,
        str(jsonl(tmp_path / "r.jsonl", [{"prompt": "q?", "completion": "an answer"}, *PAIRS])),
        tokenizer=tokenizer,
    )
    i = next(i for i in range(len(prepared.train)) if prepared.train.row(i)["messages"][0]["content"] == "q?")
    inspect_document(prepared.train, i, tokenizer, prepared.tokenizer_info)
    out = capsys.readouterr().out
    assert "[[an answer]]{{<|im_end|>}}" in out and "end-of-turn supervised" in out
    facts = inspect_document(prepared.train, i, tokenizer, prepared.tokenizer_info, as_json=True)
    assert facts is not None and facts["end_of_turn_supervised"]
    assert "".join(t["text"] for t in facts["document"] if t["scored_text"]) == "an answer"


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_id_is_not_the_end_of_turn_where_there_is_a_choice(tmp_path, family):
    info = run(tmp_path, str(jsonl(tmp_path / "r.jsonl", PAIRS)), tokenizer=byte_tokenizer(family)).tokenizer_info
    assert info["end_of_turn"] == FAMILIES[family].stop
    assert info["pad_is_separate"] == (info["pad_id"] not in (info["end_of_turn_id"], info["eos_id"]))


def test_snapshot_of_a_hub_data_set_is_read_offline_by_split(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "ds" / "data").mkdir(parents=True)
    for split, n in (("train", 5), ("test", 2)):
        table = pa.Table.from_pylist([{"text": f"{split} {i}"} for i in range(n)])
        pq.write_table(table, tmp_path / "ds" / "data" / f"{split}-00000-of-00001.parquet")
    read = {
        s: [r for b in readers.blocks(tmp_path / "ds", split=s, hub=True) for r in b.rows or []] for s in (None, "test")
    }
    assert [r["text"] for r in read["test"]] == ["test 0", "test 1"] and len(read[None]) == 5
