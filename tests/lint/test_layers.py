"""Rooms import from below alone: import-linter over the package, which holds the rooms at the top as links."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import helpers
import pytest

pytest.importorskip("importlinter", reason="import-linter belongs to the extra test")

#: Top to bottom. Rooms of one line do not import each other.
LAYERS = """
    api
    commands
    acceptance : studio
    training
    exporting : report : advice : remote
    launchers
    methods
    record : evaluation : recipe_draft : audit
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
    "advice": ("torch", "transformers", "numpy"),
    "sites": ("torch", "transformers", "numpy", "jinja2"),
    "config": ("torch", "transformers", "numpy"),
}


def lint(folder: Path, layers: str) -> subprocess.CompletedProcess[str]:
    named = "\n".join(
        "    " + " : ".join(f"aifactory_train.{room.strip()}" for room in line.split(":"))
        for line in layers.strip().splitlines()
    )
    (folder / "imports.ini").write_text(
        "[importlinter]\nroot_package = aifactory_train\nexclude_type_checking_imports = False\n\n"
        f"[importlinter:contract:layers]\nname = Rooms import from below\ntype = layers\nlayers =\n{named}\n"
        # The package's own file names what users are offered for type checkers; it imports none before it is used.
        "ignore_imports =\n    aifactory_train -> aifactory_train.*\n    aifactory_train -> aifactory_train.**\n"
        "unmatched_ignore_imports_alerting = none\n"
    )
    command = [
        sys.executable,
        "-c",
        "from importlinter.cli import lint_imports_command as c; c()",
        "--config",
        "imports.ini",
        "--no-cache",
    ]
    env = {**os.environ, "PYTHONPATH": str(helpers.ROOT)}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)


def test_rooms_import_from_below(tmp_path: Path) -> None:
    done = lint(tmp_path, LAYERS)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_the_contract_can_fail(tmp_path: Path) -> None:
    """Turned over, it is broken: the linter sees the rooms."""
    done = lint(tmp_path, "core\ncommands\nsites")
    assert done.returncode != 0 and "is not allowed to import" in done.stdout


def test_every_room_has_a_layer() -> None:
    named = {room.strip() for line in LAYERS.strip().splitlines() for room in line.split(":")}
    there = {p.name for p in (helpers.ROOT / "aifactory_train").iterdir() if (p / "__init__.py").is_file()}
    assert named == there


@pytest.mark.parametrize("room", LIGHT)
def test_light_rooms_name_no_heavy_package(room: str) -> None:
    import ast

    for path in (helpers.ROOT / "aifactory_train" / room).resolve().rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            heavy = {n.split(".")[0] for n in names} & set(LIGHT[room])
            assert not heavy, f"{path}:{getattr(node, 'lineno', 0)} imports {heavy}"
