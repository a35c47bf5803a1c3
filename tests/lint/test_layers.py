"""Rooms import from below alone: import-linter over a view of the package that holds the sibling rooms, as an installed wheel does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

pytest.importorskip("importlinter", reason="import-linter belongs to the extra test")

ROOMS = ("kernels", "launchers", "recipes", "sites")
#: Top to bottom. Rooms of one line do not import each other.
LAYERS = """
    commands
    training
    exporting : report
    launchers
    methods
    record : evaluation : recipe_draft
    planning
    parallel
    model : recipes
    data
    sources
    run : metrics : energy
    private
    config
    sites : kernels
    core
"""
#: What a room never imports, at any depth of it: login nodes have none of these.
LIGHT = {
    "sites": ("torch", "transformers", "numpy", "jinja2"),
    "config": ("torch", "transformers", "numpy"),
}


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``aifactory_train`` as a wheel installs it, made of links."""
    folder = tmp_path_factory.mktemp("view")
    package = folder / "aifactory_train"
    package.mkdir()
    for entry in (helpers.ROOT / "aifactory_train").iterdir():
        if entry.name != "__pycache__":
            (package / entry.name).symlink_to(entry)
    for room in ROOMS:
        (package / room).symlink_to(helpers.ROOT / room)
    return folder


def lint(view: Path, layers: str) -> subprocess.CompletedProcess[str]:
    named = "\n".join(
        "    " + " : ".join(f"aifactory_train.{room.strip()}" for room in line.split(":"))
        for line in layers.strip().splitlines()
    )
    (view / "imports.ini").write_text(
        "[importlinter]\nroot_package = aifactory_train\nexclude_type_checking_imports = False\n\n"
        f"[importlinter:contract:layers]\nname = Rooms import from below\ntype = layers\nlayers =\n{named}\n"
    )
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as c; c()",
        "--config",
        "imports.ini",
        "--no-cache",
    ]
    env = {**os.environ, "PYTHONPATH": str(view)}
    return subprocess.run(command, cwd=view, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_rooms_import_from_below(view: Path) -> None:
    done = lint(view, LAYERS)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_contract_can_fail(view: Path) -> None:
    """Turned over, it is broken: the linter sees the rooms."""
    done = lint(view, "core\ncommands\nsites")
    assert done.returncode != 0 and "is not allowed to import" in done.stdout


def test_every_room_has_a_layer() -> None:
    named = {room.strip() for line in LAYERS.strip().splitlines() for room in line.split(":")}
    there = {p.name for p in (helpers.ROOT / "aifactory_train").iterdir() if (p / "__init__.py").is_file()} | set(ROOMS)
    assert named == there


@pytest.mark.parametrize("room", LIGHT)
def test_light_rooms_name_no_heavy_package(room: str) -> None:
    import ast

    folder = helpers.ROOT / room if room in ROOMS else helpers.ROOT / "aifactory_train" / room
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            heavy = {n.split(".")[0] for n in names} & set(LIGHT[room])
            assert not heavy, f"{path}:{getattr(node, 'lineno', 0)} imports {heavy}"
