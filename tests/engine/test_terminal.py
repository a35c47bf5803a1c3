"""What people see whatever their terminal is: narrow or none, another encoding, a full disk, an option that was
misspelt.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest


def shown(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    """The command with these variables set (None: unset) and UTF-8 mode off; output as bytes."""
    env = {**helpers.environment(), "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    env.pop("COLUMNS", None)
    env.update(environment)
    command = [sys.executable, "-m", "aifactory_train", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, timeout=60, check=False)


@pytest.mark.parametrize("columns", ["", "abc", "0", "-5", "1", "40", "100000"])
def test_any_width_is_drawn_in(columns: str, tmp_path: Path) -> None:
    done = shown("recipes", cwd=tmp_path, COLUMNS=columns)
    assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr[-2000:]
    assert b"licence" in done.stdout


def test_names_of_rows_are_not_divided(tmp_path: Path) -> None:
    ids = [r["id"] for r in json.loads(shown("recipes", "--json", cwd=tmp_path).stdout)]
    for width in ({}, {"COLUMNS": "80"}):
        first = {line.split("  ")[0] for line in shown("recipes", cwd=tmp_path, **width).stdout.decode().splitlines()}
        assert set(ids) <= first


@pytest.mark.parametrize("encoding", ["ascii", "iso8859-1", "cp1252", "utf-8"])
def test_any_encoding_of_the_terminal(encoding: str, tmp_path: Path) -> None:
    done = shown("sites", "lumi-g", cwd=tmp_path, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr[-2000:]
    listed = shown("sites", "--json", cwd=tmp_path, PYTHONIOENCODING=encoding)
    assert listed.returncode == 0, listed.stderr[-2000:]
    utf8 = shown("sites", "--json", cwd=tmp_path, PYTHONIOENCODING="utf-8")
    assert json.loads(listed.stdout.decode(encoding)) == json.loads(utf8.stdout.decode())


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("command", ["recipes", "sites"])
def test_a_full_disk_behind_standard_output_is_named(command: str, tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "aifactory_train", command],
            cwd=tmp_path,
            env=helpers.environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1
    reported = done.stderr.decode()
    assert (
        f"aifactory {command}: {os.strerror(28)}" in reported
        and "Traceback" not in reported
        and "Exception ignored" not in reported
    )


@pytest.mark.parametrize(
    ("arguments", "reported"),
    [
        (("report", "RUN", "--htlm"), ("usage: aifactory report", "did you mean '--html'?")),
        (("recipes", "new", "a/b", "--dta=x"), ("usage: aifactory recipes new", "did you mean '--data'?")),
        (("status", "RUN", "more"), ("usage: aifactory status", "unrecognized arguments: more")),
    ],
)
def test_what_is_not_known_shows_the_usage_of_its_command(arguments, reported, tmp_path: Path) -> None:
    done = shown(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    for words in reported:
        assert words in done.stderr.decode()
