"""Malformed data: each ends in one clear message (exit code 2) that names the place, and leaves nothing behind."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pytest
from chat_families import byte_tokenizer

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.data import prepare

GOOD = '{"prompt": "q%d", "completion": "a%d"}\n'
ROWS = "".join(GOOD % (i, i) for i in range(20))


def recipe(path: Path | str, source: dict | None = None, **data) -> Recipe:
    return Recipe.model_validate(
        {"model": {"base": "x/y"}, "data": {"train": {"source": str(path), **(source or {})}, **data}}
    )


def refuse(tmp_path: Path, recipe: Recipe, *, tokenizer=None) -> UserError:
    """Prepare must refuse; the cache must be as empty as before."""
    cache = tmp_path / "cache"
    with pytest.raises(UserError) as caught:
        prepare(recipe, tokenizer or byte_tokenizer(), cache_dir=cache)
    assert not cache.exists() or list(cache.iterdir()) == []
    assert caught.value.exit_code == 2
    return caught.value


def write(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# (name of the case, file name, content, where the message points, what it says)
FILES = [
    ("broken JSON", "r.jsonl", ROWS + '{"prompt": "x", }\n', ":21", "not valid JSON"),
    ("truncated JSON", "r.jsonl", ROWS + '{"prompt": "x"', ":21", "not valid JSON"),
    ("not an object", "r.jsonl", ROWS + "[1, 2]\n", ":21", "a row is an object"),
    ("no answer", "r.jsonl", ROWS + '{"prompt": "x", "completion": ""}\n', ":21", "'completion' is empty"),
    ("null answer", "r.jsonl", ROWS + '{"prompt": "x", "completion": null}\n', ":21", "'completion' is empty (null)"),
    ("missing column", "r.jsonl", ROWS + '{"prompt": "x", "complettion": "y"}\n', ":21", "did you mean 'complettion'"),
    ("wrong type", "r.jsonl", ROWS + '{"prompt": 5, "completion": "y"}\n', ":21", "'prompt' is a number"),
    ("unknown columns", "r.jsonl", '{"foo": "x", "bar": "y"}\n', ":1", "no known columns: foo, bar"),
    ("misspelt column", "r.jsonl", '{"mesages": []}\n', ":1", "did you mean 'messages'"),
    (
        "not UTF-8",
        "r.jsonl",
        ROWS.encode() + b'{"prompt": "caf\xe9", "completion": "y"}\n',
        ":21",
        "byte 0xe9 at column 16",
    ),
    (
        "duplicate id",
        "r.jsonl",
        '{"id": "a", "text": "x y"}\n{"id": "b", "text": "z"}\n{"id": "a", "text": "w"}\n',
        ":3",
        "the id 'a' was already given at",
    ),
    ("no assistant", "m.jsonl", '{"messages": [{"role": "user", "content": "x"}]}\n', ":1", "no assistant turn"),
    (
        "unknown role",
        "m.jsonl",
        '{"messages": [{"role": "asistant", "content": "x"}]}\n',
        ":1",
        "did you mean 'assistant'",
    ),
    ("messages are text", "m.jsonl", '{"messages": "hello"}\n', ":1", "'messages' is text, not a list of turns"),
    ("empty conversation", "m.jsonl", '{"messages": []}\n', ":1", "'messages' is an empty list"),
    ("turn is text", "m.jsonl", '{"messages": ["hello"]}\n', ":1", "messages[0] is text"),
    (
        "content is a number",
        "m.jsonl",
        '{"messages": [{"role": "user", "content": 1}]}\n',
        ":1",
        "messages[0]: 'content' is a number",
    ),
    (
        "picture",
        "m.jsonl",
        '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]}\n',
        ":1",
        "'image_url' is not text",
    ),
    (
        "silent assistant",
        "m.jsonl",
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}\n',
        ":1",
        "the assistant's turn is empty",
    ),
    (
        "all masked",
        "m.jsonl",
        '{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y", "weight": 0}]}\n',
        ":1",
        "all tokens would be masked",
    ),
    (
        "tool call without name",
        "m.jsonl",
        '{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"function": {}}]}]}\n',
        ":1",
        "needs function.name",
    ),
    (
        "tool arguments",
        "m.jsonl",
        '{"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}\n',
        ":1",
        "arguments is not valid JSON",
    ),
    ("empty text", "t.jsonl", '{"text": "x"}\n{"text": "  "}\n', ":2", "'text' is empty"),
    ("empty file", "r.jsonl", "", "", "the file is empty"),
    ("only blank lines", "r.jsonl", "\n\n  \n", "", "every line is blank"),
    ("one row only", "r.jsonl", GOOD % (1, 1), "", "cannot be split"),
    ("ragged CSV", "r.csv", "prompt,completion\na,b\nc,d,e\n", ":3", "3 cells, but the header names 2"),
    ("unclosed CSV quote", "r.csv", 'prompt,completion\na,b\n"c,d\n', ":", "not valid CSV"),
    ("CSV not UTF-8", "r.csv", b"prompt,completion\na,b\nc,\xff\n", ":3", "byte 0xff"),
    ("CSV without header", "r.csv", ",\na,b\n", ":1", "must name every column"),
    ("CSV column twice", "r.csv", "prompt,prompt\na,b\n", ":1", "given twice"),
    ("JSON is a number", "r.json", "5", ":1", "neither a list of rows"),
    ("broken JSON file", "r.json", '[{"text": "x"},\n {"text": }]', ":2", "not valid JSON"),
    ("not Parquet", "r.parquet", "hello", "r.parquet", "not a readable Parquet file"),
    ("unknown kind", "r.rtf", "hello", "r.rtf", "files of kind '.rtf' are not read"),
    ("nested too deeply", "r.json", "[" * 100_000 + "]" * 100_000, "r.json", "JSON nested too deeply"),
    (
        "half an emoji",
        "t.jsonl",
        '{"text": "ok \\ud83d\\ude00"}\n{"text": "cut \\ud83d"}\n',
        ":2",
        "half of a character",
    ),
    ("the other half", "t.jsonl", '{"text": "ok"}\n{"text": "\\ude00 cut"}\n', ":2", "half of a character"),
    ("half an emoji in JSON", "t.json", '[{"text": "ok"}, {"text": "cut \\ud83d"}]', "t.json", "half of a character"),
    ("UTF-16 without a mark", "r.jsonl", ROWS.encode("utf-16-le"), ":1", "not valid JSON"),
    ("UTF-16 CSV without a mark", "r.csv", "prompt,completion\na,b\n".encode("utf-16-le"), ":1", "a NUL byte"),
    ("lines that end with CR", "r.csv", "prompt,completion\ra,b\rc,d\r", ":1", "lines end with CR alone"),
    (
        "CSV columns alike but for a space",
        "r.csv",
        "prompt, prompt\na,b\n",
        ":1",
        "the column name 'prompt' is given twice",
    ),
    ("CSV with a column without a name", "r.csv", "prompt,completion,\na,b,\nc,d,e\n", ":3", "column 3 has no name"),
    ("CSV without names", "r.csv", ",\na,b\n", ":1", "must name every column"),
    (
        "damaged gzip",
        "r.jsonl.gz",
        gzip.compress(ROWS.encode())[:30] + b"\xff" * 90,
        "r.jsonl.gz",
        "not a complete gzip file",
    ),
    ("broken gzip", "r.jsonl.gz", gzip.compress(ROWS.encode())[:-12], "r.jsonl.gz", "not a complete gzip file"),
]


@pytest.mark.parametrize(
    ("name", "content", "where", "what"), [case[1:] for case in FILES], ids=[case[0] for case in FILES]
)
def test_file_is_refused_with_its_place(tmp_path, name, content, where, what):
    path = write(tmp_path, name, content)
    error = refuse(tmp_path, recipe(path))
    assert what in error.what
    assert error.where is not None and error.where.startswith(str(path)) and where in error.where


MENDED = [
    ("r.jsonl", ROWS + '{"prompt": "x", "comple', "the file was cut off in this line"),
    ("r.jsonl", ROWS + '{"prompt": "x",\n"completion": "y"}\n', "each line is one JSON object"),
    ("r.jsonl", '{"prompt": "x\n'.encode("utf-16"), "it is UTF-16: iconv"),
    ("r.jsonl", '{"prompt": "x\n'.encode("utf-16-be"), "it is UTF-16: iconv"),
    ("r.jsonl", '{"prompt": "x\n'.encode("utf-32"), "it is UTF-32: iconv"),
    ("r.jsonl", '{"prompt": {"de": "x"}, "completion": "y"}\n', "a column of its own"),
    ("r.csv", "", "give a file that holds rows"),
    ("r.csv", "sep=;\nprompt;completion\na;b\n", "a line 'sep=;'"),
]


@pytest.mark.parametrize(("name", "content", "fix"), MENDED)
def test_the_message_says_how_to_mend_it(tmp_path, name, content, fix):
    assert fix in str(refuse(tmp_path, recipe(write(tmp_path, name, content))).fix)


def test_whole_characters_pass_however_they_are_written(tmp_path):
    """Pairs of escapes, and escaped backslashes before something that only looks like one."""
    rows = [{"text": f"\U0001f600 {i}"} for i in range(6)] + [{"text": f"C:\\ud83d{i} is a folder"} for i in range(6)]
    path = write(tmp_path, "r.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert b"\\ud83d\\ude00" in path.read_bytes() and b"\\\\ud83d" in path.read_bytes()
    prepared = prepare(recipe(path), byte_tokenizer(), cache_dir=tmp_path / "c")
    assert prepared.report["sources"][0]["rows"] == 12


def test_at_least_twenty_five_malformed_files():
    assert len(FILES) >= 25


def test_missing_file_names_the_key(tmp_path):
    error = refuse(tmp_path, recipe(tmp_path / "absent.jsonl"))
    assert "no such file" in error.what and "absent.jsonl" in str(error)


def test_empty_folder(tmp_path):
    (tmp_path / "data").mkdir()
    assert "holds no data file" in refuse(tmp_path, recipe(tmp_path / "data")).what


def test_tokenizer_without_chat_template(tmp_path):
    path = write(tmp_path, "r.jsonl", ROWS)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    error = refuse(tmp_path, recipe(path), tokenizer=tokenizer)
    assert "no chat template" in error.what and "model.chat_template" in (error.fix or "")


def test_vocabulary_larger_than_the_embedding():
    from aifactory_train.data import check_vocabulary

    tokenizer = byte_tokenizer()
    size = max(tokenizer.get_vocab().values()) + 1
    check_vocabulary(tokenizer, size, "model.base")
    with pytest.raises(
        UserError, match=f"largest token id is {size - 1}, but the model's embedding has {size - 1} rows"
    ):
        check_vocabulary(tokenizer, size - 1, "model.base")


def test_overlap_refused_names_both_places(tmp_path):
    train = write(tmp_path, "train.jsonl", ROWS)
    held = write(tmp_path, "eval.jsonl", GOOD % (99, 99) + '{"prompt": " Q7 ", "completion": "A7"}\n')
    error = refuse(tmp_path, recipe(train, overlap="refuse", eval=str(held)))
    assert error.where == f"{train}:8" and f"{held}:2" in error.what


def test_nothing_left_after_the_overlap_is_dropped(tmp_path):
    train = write(tmp_path, "train.jsonl", GOOD % (1, 1))
    held = write(tmp_path, "eval.jsonl", GOOD % (1, 1))
    assert "the split 'train' is empty" in refuse(tmp_path, recipe(train, eval=str(held))).what


def test_long_documents_all_dropped(tmp_path):
    path = write(tmp_path, "r.jsonl", ROWS)
    error = refuse(tmp_path, recipe(path, sequence_length=8, long_documents="drop"))
    assert "is empty" in error.what


def test_truncation_that_leaves_nothing_supervised(tmp_path):
    path = write(tmp_path, "r.jsonl", ROWS.replace('"prompt": "q', '"prompt": "' + "x" * 80))
    assert "is empty" in refuse(tmp_path, recipe(path, sequence_length=16)).what


@pytest.mark.parametrize(
    ("converter", "options", "what"),
    [
        ("os:system", {}, "no recipe module 'os'"),
        ("health.phenotype", {}, "MODULE:FUNCTION"),
        ("health.phenotype:_ask", {}, "no function '_ask'"),
        ("health.phenotype:rowz", {}, "no function 'rowz'"),
        ("health.phenotype:rows", {"partt": "train"}, "unexpected keyword argument"),
        ("health.phenotype:rows", {"part": "test"}, "unknown part 'test'"),
        ("health.phenotype:rows", {}, "not an OBO file"),
    ],
)
def test_converters(tmp_path, converter, options, what):
    path = write(tmp_path, "hp.obo", "format-version: 1.2\n")
    error = refuse(tmp_path, recipe(path, {"converter": converter, "options": options}))
    assert what in error.what


def test_parquet_with_a_wrong_column_type(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"prompt": ["a", "b"], "completion": [1, 2]}), tmp_path / "r.parquet")
    error = refuse(tmp_path, recipe(tmp_path / "r.parquet"))
    assert error.where == f"{tmp_path / 'r.parquet'}:row:1" and "'completion' is a number" in error.what


def test_parquet_text_that_is_no_utf8(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    column = pa.array([b"good", b"caf\xe9 secret"]).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "r.parquet")
    error = refuse(tmp_path, recipe(tmp_path / "r.parquet"))
    assert "cannot be read (UnicodeDecodeError)" in error.what and "secret" not in str(error)


def test_a_file_that_the_user_may_not_read(tmp_path, monkeypatch):
    path = write(tmp_path, "r.jsonl", ROWS)
    from aifactory_train.private import vault

    opened = vault.open_source

    def refusing(file):
        if file == path:
            raise PermissionError(13, "Permission denied", str(file))
        return opened(file)

    monkeypatch.setattr(vault, "open_source", refusing)
    error = refuse(tmp_path, recipe(path))
    assert error.what == "cannot be read: Permission denied" and error.where == str(path) and "chmod" in str(error.fix)


def test_data_set_without_the_split(tmp_path):
    import datasets

    datasets.DatasetDict({"test": datasets.Dataset.from_list([{"text": "x"}])}).save_to_disk(tmp_path / "ds")
    error = refuse(tmp_path, recipe(tmp_path / "ds", {"split": "train"}))
    assert "no split 'train'" in error.what and "test" in (error.fix or "")


FULL_DISK = """
import resource, sys
sys.path[:0] = [{tests!r}, {tests!r} + "/.."]
from pathlib import Path
from test_bad_input import byte_tokenizer, recipe
from aifactory_train.data import prepare
from aifactory_train.core.errors import UserError
tokenizer = byte_tokenizer()
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
cache = Path({cache!r})
try:
    prepare(recipe({path!r}), tokenizer, cache_dir=cache)
except UserError as error:
    print(error.exit_code, error.what, list(cache.iterdir()))
"""


@pytest.mark.parametrize("limit", [100, 30_000])
def test_full_disk_while_caching(tmp_path, limit):
    """A limit on the size of files stands for the full disk: the same write fails, at the start or in the middle."""
    path = write(tmp_path, "r.jsonl", "".join(GOOD % (i, i) for i in range(3000)))
    code = FULL_DISK.format(tests=str(Path(__file__).parent), limit=limit, cache=str(tmp_path / "c"), path=str(path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "2 no space left while the token cache was written []", done.stderr


def test_command_line_gives_exit_2_and_no_traceback(tmp_path):
    """Through the real command, before any model is needed: the recipe's file does not exist."""
    yaml = write(tmp_path, "r.yaml", "model: {base: ./model}\ndata: {train: ./absent.jsonl}\n")
    done = subprocess.run(
        [sys.executable, "-m", "aifactory_train", "prepare", str(yaml)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and "no such" in done.stderr
    assert json.dumps(done.stdout) == '""'
