"""Whatever takes a file of the user refuses a pipe or a device at once: it would be waited for without end."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aifactory_train.config.data_blocks import DataSource
from aifactory_train.config.loading import load_recipe, read_run_config
from aifactory_train.config.schema import ModelConfig
from aifactory_train.core import yaml_text
from aifactory_train.core.errors import UserError
from aifactory_train.core.files import check_regular, read_json, write_atomic
from aifactory_train.data import readers
from aifactory_train.data.tokenizer import _read_template
from aifactory_train.model import shapes
from aifactory_train.private.vault import Vault
from aifactory_train.record import signing
from aifactory_train.sites import read_overlay
from aifactory_train.sources import resolve_data, resolve_model

#: What takes a file, by the suffix that it wants.
TAKES: list[tuple[str, Callable[[Path], Any]]] = [
    (".pub", signing.load_public),
    (".pem", signing.load_private),
    (".age", lambda path: Vault.from_identity(path)),
    (".age", lambda path: Vault([], []).read(path)),
    (".yaml", yaml_text.read),
    (".yaml", lambda path: load_recipe(str(path))),
    (".yaml", read_run_config),
    (".yaml", lambda path: read_overlay(path)),
    (".json", read_json),
    (".json", lambda path: shapes.load("a/b", config_file=str(path))),
    (".jinja", _read_template),
    (".gguf", lambda path: resolve_model(ModelConfig(base=str(path)))),
    *((suffix, lambda path: list(readers.blocks(path))) for suffix in (".jsonl", ".json", ".csv", ".txt", ".parquet")),
    (".jsonl", lambda path: resolve_data(DataSource(source=str(path)))),
]


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_are_refused(tmp_path: Path, kind: str) -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    try:
        for number, (suffix, take) in enumerate(TAKES):
            path = tmp_path / f"file{number}{suffix}"
            os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
            signal.alarm(20)
            with pytest.raises(UserError) as refused:
                take(path)
            assert path.name in str(refused.value), number
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_what_the_shell_opened_is_read(tmp_path: Path) -> None:
    """``--site-file <(...)``: somebody writes into it."""
    ours, theirs = os.pipe()
    os.write(theirs, b'{"a": 1}')
    os.close(theirs)
    assert read_json(Path(f"/dev/fd/{ours}")) == {"a": 1}
    os.close(ours)
    for path in (Path("/dev/stdin"), tmp_path, tmp_path / "absent"):
        check_regular(path)


def test_a_pipe_is_written_to_and_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "out"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(pipe, "all of it\n")
    assert os.read(reader, 100) == b"all of it\n" and pipe.is_fifo() and [p.name for p in tmp_path.iterdir()] == ["out"]
    os.close(reader)
