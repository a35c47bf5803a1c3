"""What keeps the rooms readable: nothing lies loose, files and functions stay short, no room bears the name of a
function of the API.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import helpers

PLACES = ("aifactory_train", "kernels", "launchers", "recipes", "sites")
LOOSE = {"__init__.py", "__main__.py", "cli.py"}
#: The judge of an attempt is copied whole into jobs, and what answers at a site goes there whole; the record of an
#: attempt is one idea.
LONG_FILES = {
    "aifactory_train/remote/agent.py",
    "launchers/programs/attempt.py",
    "aifactory_train/record/recorder.py",
}
MOST_LINES, MOST_LINES_OF_A_FUNCTION = 450, 60
#: Functions that are longer today; the list may only become shorter.
LONG_FUNCTIONS = {
    "summarise",
    "crate",
    "run",
    "_first_cause",
    "add_arguments",
    "local_profile",
    "_write_start",
    "bom",
    "compose",
    "check_members",
    "score",
    "decide",
    "_rated",
    "verdict",
    "from_config",
    "request_of",
    "lint",
    "report_tables",
    "new_profile",
}
API = {"train", "evaluate", "export", "prepare", "plan", "recipe", "load", "launch", "systems", "where"}


def files() -> Iterator[Path]:
    for place in PLACES:
        yield from (p for p in (helpers.ROOT / place).rglob("*.py") if "__pycache__" not in p.parts)


def name(path: Path) -> str:
    return path.relative_to(helpers.ROOT).as_posix()


def test_nothing_lies_loose() -> None:
    assert {p.name for p in (helpers.ROOT / "aifactory_train").glob("*.py")} == LOOSE


def test_no_room_is_called_like_a_function_of_the_api() -> None:
    rooms = {p.name for p in (helpers.ROOT / "aifactory_train").iterdir() if p.is_dir()} | set(PLACES)
    assert not rooms & API


def test_files_are_read_in_one_sitting() -> None:
    long = {name(p) for p in files() if len(p.read_text(encoding="utf-8").splitlines()) > MOST_LINES}
    assert long == LONG_FILES, "split by idea what is new here, and take from the list what became short"


def test_a_public_class_has_its_name_alone() -> None:
    seen: dict[str, set[str]] = {}
    for path in files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                seen.setdefault(node.name, set()).add(f"{name(path)}:{node.lineno}")
    twice = {known: places for known, places in seen.items() if len(places) > 1}
    assert not twice, "whoever reads one of them takes it for the other"


def test_functions_are_short() -> None:
    long: set[str] = set()
    for path in files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
            compiled = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
            if not compiled and (node.end_lineno or 0) - node.lineno + 1 > MOST_LINES_OF_A_FUNCTION:
                long.add(node.name)
    assert long <= LONG_FUNCTIONS, "read it in parts"
    assert long >= LONG_FUNCTIONS, "take from the list what became short"
