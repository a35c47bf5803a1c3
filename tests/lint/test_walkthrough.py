"""docs/walkthrough.md names what is there, and its walks go down the layers."""

from __future__ import annotations

import ast
import re

import helpers
from test_layers import LAYERS

ROW = re.compile(r"\| `([^`]+\.py)` \| `([^`]+)` \|")


def layers() -> dict[str, int]:
    """Room to its number from the top."""
    found = {}
    for number, line in enumerate(LAYERS.strip().splitlines()):
        found.update({room.strip(): number for room in line.split(":")})
    return found


def legs() -> list[tuple[str, list[tuple[str, str]]]]:
    """Title, and (file, name) of each table below it."""
    text = (helpers.ROOT / "docs/walkthrough.md").read_text(encoding="utf-8")
    parts = re.split(r"^### (.*)$", text, flags=re.MULTILINE)[1:]
    return [(title, ROW.findall(body)) for title, body in zip(parts[::2], parts[1::2], strict=True)]


def names(tree: ast.Module) -> set[str]:
    found = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            inner = [n for n in getattr(node, "body", []) if isinstance(n, (ast.FunctionDef, ast.AnnAssign))]
            found |= {f"{node.name}.{getattr(n, 'name', None) or ast.unparse(n.target)}" for n in inner}
    return found


def test_every_name_exists() -> None:
    rows = [row for _, leg in legs() for row in leg]
    assert len(rows) > 30
    for file, name in rows:
        assert name in names(ast.parse((helpers.ROOT / file).read_text(encoding="utf-8"))), f"{file}: {name}"


def test_no_leg_climbs_back() -> None:
    of = layers()
    for title, leg in legs():
        steps = [of[file.removeprefix("aifactory_train/").split("/")[0]] for file, _ in leg]
        assert steps == sorted(steps), f"{title}: {leg}"
