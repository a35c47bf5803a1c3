"""Folders that somebody damaged or forged, of every kind that the program reads: the answer is a result or one message,
never a traceback and never a wait without end.

A damaged folder comes from a number alone, so that a failure is repeated with it. The default suite tries a few;
AIFACTORY_FUZZ=1 tries hundreds.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import tarfile
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import helpers
import pytest

from aifactory_train import sources
from aifactory_train.cli import main
from aifactory_train.config.loading import load_recipe
from aifactory_train.config.schema import ModelConfig
from aifactory_train.core.errors import UserError
from aifactory_train.report.pack import write_pack

LONG = bool(os.environ.get("AIFACTORY_FUZZ"))
#: No command on these small folders takes longer, even on busy cores.
SECONDS = 60
ODD: list[Any] = [
    None,
    True,
    0,
    -1,
    2**70,
    1e308,
    float("nan"),
    "",
    "x",
    "../../x",
    "\ud800",
    "a\0b",
    [],
    [1],
    [[]],
    {},
    {"a": 1},
    "9" * 5000,
]
TEXTS = [
    b"",
    b"{",
    b"[]",
    b"{}",
    b"null",
    b"1",
    b'"x"',
    b"[" * 50_000,
    b"\xff\xfe\x00",
    b"{}\n[]\n",
    b"9" * 5000,
    b'{"a": NaN}',
    b"\n\n",
]


def damage(path: Path, draw: random.Random) -> str:
    """Damage one file; returns what was done, in words."""
    kind = draw.choice(
        ["text", "tree", "tree", "tree", "tree", "cut", "flip", "gone", "folder", "pipe", "loop", "dangling"]
    )
    raw = path.read_bytes()
    if kind == "tree" and (done := _in_json(path, raw, draw)):
        return done
    if kind in ("tree", "text"):
        path.write_bytes(draw.choice(TEXTS))
    elif kind == "cut":
        path.write_bytes(raw[: draw.randrange(len(raw) + 1)])
    elif kind == "flip" and raw:
        at = draw.randrange(len(raw))
        path.write_bytes(raw[:at] + bytes([draw.randrange(256) for _ in range(draw.choice([1, 8]))]) + raw[at + 1 :])
    elif kind != "flip":
        path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "loop":
            path.symlink_to(path.name)
        elif kind == "dangling":
            path.symlink_to("nowhere")
    return f"{path.name}: {kind}"


def _in_json(path: Path, raw: bytes, draw: random.Random) -> str | None:
    """Damage one place of a JSON file, or of one line of it."""
    lines = raw.split(b"\n") if path.suffix == ".jsonl" else [raw]
    number = draw.randrange(len(lines))
    try:
        tree = json.loads(lines[number])
    except ValueError:
        return None
    node, key, place = {"": tree}, "", ""
    while True:
        below = node[key]  # type: ignore[index]
        if not isinstance(below, (dict, list)) or not below or draw.random() < 0.2:
            break
        node = below
        key = draw.choice(list(below)) if isinstance(below, dict) else draw.randrange(len(below))
        place += f"/{key}"
    value = draw.choice(ODD)
    if draw.random() < 0.2 and isinstance(node, dict) and key != "":
        del node[key]
    else:
        node[key] = value  # type: ignore[index]
    whole = tree if key != "" else node[""]
    lines[number] = json.dumps(whole).encode()
    path.write_bytes(b"\n".join(lines))
    return f"{path.name}{place} = {str(value)[:20]!r}"


class NoAnswer(BaseException):
    """Not an exception that the program may take for one of its own."""


@contextlib.contextmanager
def limited(what: str) -> Iterator[None]:
    def late(*_: Any) -> None:
        raise NoAnswer(f"no answer within {SECONDS} s: {what}")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def answer(what: str, do: Callable[[], Any]) -> str:
    """What came of ``do``: "taken", or "refused" with one message; anything else fails the test."""
    try:
        with limited(what):
            do()
        return "taken"
    except UserError as error:
        assert error.what and "Traceback" not in str(error), what
        return "refused"
    except BaseException:
        raise AssertionError(f"{what}\n{traceback.format_exc()}") from None


def command(what: str, *argv: str) -> str:
    out, err = io.StringIO(), io.StringIO()

    def do() -> None:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(list(argv))
        assert code in (0, 1, 2, 75), code
        assert "Traceback" not in err.getvalue(), err.getvalue()
        if code == 2:
            assert err.getvalue().startswith(f"aifactory {argv[0]}:"), err.getvalue()
            raise UserError("refused")

    return answer(f"{what}: {' '.join(argv[:3])}", do)


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def copies(
    folder: Path, scratch: Path, seeds: range, keep: Callable[[Path], bool] = lambda p: True
) -> Iterator[tuple[Path, str]]:
    """A damaged copy of ``folder`` for each seed, with what was done to it."""
    names = [p.relative_to(folder) for p in files_of(folder) if keep(p)]
    for seed in seeds:
        draw = random.Random(seed)
        copy = scratch / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        done = [damage(copy / name, draw) for name in draw.sample(names, draw.choice([1, 1, 2]))]
        yield copy, f"seed {seed}, {'; '.join(done)}"


def seeds(few: int, many: int) -> range:
    return range(many if LONG else few)


@pytest.fixture
def run_folder(tell) -> Path:
    run = tell()
    write_pack(run)
    (run.path / "state.json").write_text(
        json.dumps({"state": "running", "step": 3, "host": "h", "pid": 5, "time": 1.0})
    )
    (run.path / "saved.json").write_text('{"step": 4, "time": 1}')
    shutil.rmtree(run.path / "evidence" / "more", ignore_errors=True)
    return run.path


def test_run_folders(run_folder, tmp_path):
    names = {
        "record.json",
        "events.jsonl",
        "state.json",
        "metrics.jsonl",
        "eval.json",
        "run.yaml",
        "data_manifest.json",
        "saved.json",
        "manifest.json",
        "verification.json",
        "attempt.json",
        "outcome-0.json",
        "plan.json",
    }
    for copy, what in copies(run_folder, tmp_path, seeds(10, 250), lambda p: p.name in names):
        asked = [
            ("verify", str(copy)),
            ("report", str(copy)),
            ("report", str(copy), "--json"),
            ("report", str(copy), "--html"),
            ("runs", "--folder", str(tmp_path)),
            ("status", str(copy), "--offline"),
            ("record", "show", str(copy)),
        ]
        for argv in random.Random(what).sample(asked, 3):
            command(what, *argv)


def test_model_folders(tiny_model_dir, tmp_path):
    from aifactory_train.data import load_tokenizer
    from aifactory_train.data.tokenizer import encoder_spec
    from aifactory_train.model.loading import build_model
    from aifactory_train.model.position_check import check
    from aifactory_train.model.precision import choose_precision
    from aifactory_train.model.report import ModelReport
    from aifactory_train.model.weight_files import TensorFiles
    from aifactory_train.training.identity import weight_files

    recipe = load_recipe(str(helpers.write_recipe(tmp_path / "r", tmp_path / "copy")))

    def load(folder: Path) -> None:
        path = sources.resolve_model(ModelConfig(base=str(folder)))
        tokenizer = load_tokenizer(recipe)
        encoder_spec(tokenizer, recipe)
        check(recipe, path, device="cpu")
        assert weight_files(path)
        TensorFiles.of(path)
        build_model(
            recipe, path, tokenizer, device="cpu", precision=choose_precision(recipe, "cpu")[0], report=ModelReport()
        )

    for copy, what in copies(tiny_model_dir, tmp_path, seeds(3, 100)):
        answer(what, lambda copy=copy: load(copy))


def test_checkpoints(tmp_path):
    import torch

    from aifactory_train.parallel.storage import (
        FORMAT,
        faults,
        json_bytes,
        read_parameters,
        self_digest,
        write_file,
        write_tensors,
    )

    whole = tmp_path / "whole" / "step-4"
    whole.mkdir(parents=True)
    files = write_tensors(whole, "state-00000.safetensors", {"model/w@0,0": torch.ones(2, 2)})
    boxes = [{"offsets": [0, 0], "sizes": [2, 2], "file": "state-00000.safetensors", "key": "model/w@0,0"}]
    files["metadata.json"] = write_file(
        whole / "metadata.json", iter([json_bytes({"model/w": {"shape": [2, 2], "dtype": "F32", "boxes": boxes}})])
    )
    marker = {"format": FORMAT, "step": 4, "engine": "ddp", "world_size": 1, "config_digest": "x", "files": files}
    marker["sha256"] = self_digest(marker)
    write_file(whole / "COMPLETE", iter([json_bytes(marker)]))
    assert faults(whole) == []

    def read(folder: Path) -> None:
        if not faults(folder):
            dict(read_parameters(folder))

    for copy, what in copies(whole.parent, tmp_path, seeds(20, 300)):
        answer(what, lambda copy=copy: read(copy / "step-4"))


def test_archives(tmp_path):
    content = {"p/rows.jsonl": b'{"text": "x"}\n' * 50, "p/LICENSE": b"text", "p-1.dist-info/METADATA": b"Name: p\n"}
    folder = tmp_path / "archives"
    folder.mkdir()
    with zipfile.ZipFile(folder / "p.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, raw in content.items():
            wheel.writestr(name, raw)
        wheel.writestr("p-1.dist-info/RECORD", "p/rows.jsonl,sha256=x,1\n")
    with tarfile.open(folder / "p.tgz", "w:gz") as tar:
        for name, raw in content.items():
            member = tarfile.TarInfo("package/" + name)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    for seed in seeds(20, 300):
        draw = random.Random(seed)
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        for name, unpack in (("p.whl", sources.unpack_wheel), ("p.tgz", sources.unpack_tar)):
            raw = bytearray((copy / name).read_bytes())
            for _ in range(draw.choice([0, 1, 3, 20])):
                raw[draw.randrange(len(raw))] = draw.randrange(256)
            (copy / name).write_bytes(raw[: draw.choice([len(raw), draw.randrange(len(raw))])])
            answer(f"seed {seed}, {name}", lambda unpack=unpack, file=copy / name: unpack(file, file.parent / "out"))
