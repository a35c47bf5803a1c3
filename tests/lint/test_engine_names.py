"""Outside ``parallel/`` nobody asks which engine it is: :mod:`aifactory_train.parallel.traits` says what an engine is
and can do.
"""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

from aifactory_train.parallel.traits import ENGINES

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("aifactory_train", "sites", "launchers", "kernels", "recipes", "benchmarks")
#: Comparisons that stay, by file, and why.
ALLOWED = {
    "aifactory_train/config/rules.py": 1,  # shard_size has a meaning for hsdp alone; config may not import parallel
    "benchmarks/planner/open_data.py": 1,  # reads what other people's tables call their engines
}


def names_in(node: ast.AST) -> set[str]:
    """Names of engines among the constants of ``node``."""
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and n.value in ENGINES}


def comparisons(tree: ast.AST) -> list[int]:
    """Lines where a name of an engine decides: comparisons, ``match``, tables by name, and ``startswith("zero")``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            reported = any(names_in(part) for part in (node.left, *node.comparators) if not isinstance(part, ast.Call))
        elif isinstance(node, ast.MatchValue):
            reported = bool(names_in(node))
        elif isinstance(node, ast.Dict):
            reported = sum(bool(key is not None and names_in(key)) for key in node.keys) > 1
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            prefixes = [a.value for a in node.args if isinstance(a, ast.Constant)]
            reported = node.func.attr == "startswith" and ("zero" in prefixes or "fsdp" in prefixes)
        else:
            continue
        if reported:
            found.append(node.lineno)
    return sorted(found)


def test_names_of_engines_are_compared_in_their_room_alone() -> None:
    found: dict[str, list[int]] = {}
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            if not name.startswith("aifactory_train/parallel/"):
                lines = comparisons(ast.parse(path.read_text(encoding="utf-8")))
                if lines:
                    found[name] = lines
    over = {name: lines for name, lines in found.items() if len(lines) > ALLOWED.get(name, 0)}
    assert not over, f"ask aifactory_train.parallel.traits instead: {over}"
    stale = Counter(ALLOWED) - Counter({name: len(lines) for name, lines in found.items()})
    assert not stale, f"no longer needed in ALLOWED: {dict(stale)}"


@pytest.mark.parametrize(
    "text",
    [
        'engine == "zero3"',
        'layout.engine in ("fsdp2", "hsdp")',
        '"ddp" if engine != "single" and engine != "ddp" else engine',
        'engine.startswith("zero")',
        'match engine:\n    case "ddp" | "hsdp":\n        pass',
        '{"ddp": 1, "fsdp2": 2}[engine]',
    ],
)
def test_each_way_of_comparing_is_seen(text: str) -> None:
    assert comparisons(ast.parse(text))


@pytest.mark.parametrize("text", ['engine = "ddp"', '{"fsdp2": settings}', 'f("zero3") == 1', 'kind == "full"'])
def test_what_compares_nothing_is_not_counted(text: str) -> None:
    assert not comparisons(ast.parse(text))
