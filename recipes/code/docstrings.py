"""Python source (any package) to rows: signature of a public function to the first paragraph of its docstring.

The source is parsed, never imported or run. A module is held out as a whole: functions of one module share their words.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.recipes.common import asked, plain


@asked(
    "Python documentation.",
    {
        "signature-to-docstring": ("Document: {signature}", "{wording}"),
        "docstring-to-signature": ("Which signature? {wording}", "{signature}"),
    },
    what="documented function",
    words=(4, float("inf")),
)
def rows(path: Path) -> Iterator[dict[str, Any]]:
    """Public functions and methods of all ``*.py`` files in a folder, tests left out: ``{"id", "signature", "wording",
    "group"}``.

    The group is the module; the wording of some is empty.
    """
    for file in sorted(path.rglob("*.py")):
        module = file.relative_to(path).with_suffix("").as_posix()
        if "tests/" in f"/{module}/":
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue  # templates and Python 2 stand among the files of many packages; they are no Python source
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or node.name.startswith("_"):
                continue
            text = inspect.cleandoc(ast.get_docstring(node) or "").split("\n\n")[0]
            signature = f"def {node.name}({ast.unparse(node.args)})"
            key = f"{module}:{node.name}:{node.lineno}"
            yield {"id": key, "signature": signature, "wording": plain(text), "group": module}
