"""Rows of your own (JSON Lines or CSV) with a small schema: which fields a row has, which values are allowed, what is
asked.

A schema is a JSON Schema file beside the recipe (``recipes/SECTOR/NAME.schema.json``) or one of your own, of which this
module reads ``properties`` (``type``: string or number; ``enum``; ``minLength``), ``required``, and three keys of our
own: ``x-prompt`` and ``x-completion`` (text with ``{field}`` in it) and ``x-system``. ``x-group`` names the field whose
equal values are never split over training and held-out rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.data import readers
from aifactory_train.data.read_json import parse_lines
from aifactory_train.recipes.common import no_rows

HERE = Path(__file__).resolve().parent
_NAME = re.compile(r"^[a-z][a-z-]*/[a-z][a-z0-9-]*$")
_FIELD = re.compile(r"\{(\w+)\}")


def rows(path: Path, *, schema: str) -> Iterator[dict[str, Any]]:
    """Rows in the ``prompt`` form, each checked against the schema.

    Args:
        path: ``.jsonl`` (one object a line) or ``.csv`` (first line: names of the fields).
        schema: id of a recipe, e.g. ``education/word-problems``, whose ``.schema.json`` is read; or a ``.json`` file of
        your own,
            found from the current folder or beside ``path``.

    Raises :class:`UserError` with ``file:line`` and the field: a value that is missing or has the wrong type, a label
    that is not in the schema, a file of neither form.
    """
    rules = own_schema(schema, path.parent) if schema.endswith(".json") else load_schema(schema)
    count = 0
    for line, row in _read(path):
        where = f"{path}:{line}"
        check(row, rules, where)
        values = {name: "" if row.get(name) is None else str(row[name]).strip() for name in rules["properties"]}
        count += 1
        yield {
            "id": str(row.get("id") or f"{path.name}:{line}"),
            "group": values.get(rules.get("x-group", ""), "") or f"{path.name}:{line}",
            "prompt": _fill(rules["x-prompt"], values),
            "completion": _fill(rules["x-completion"], values),
            "system": rules.get("x-system", ""),
        }
    if not count:
        raise no_rows(path, "row")


def load_schema(name: str) -> dict[str, Any]:
    """The schema of a recipe, by the recipe's id."""
    file = HERE / f"{name}.schema.json"
    if not _NAME.match(name) or not file.is_file():
        known = sorted(str(p.relative_to(HERE)).removesuffix(".schema.json") for p in HERE.glob("*/*.schema.json"))
        raise UserError(
            f"no schema '{name}'{did_you_mean(name, known)}", where="data: options.schema", fix=f"one of {known}"
        )
    return json.loads(file.read_text(encoding="utf-8"))


def own_schema(name: str, beside: Path) -> dict[str, Any]:
    """A schema file of the user's; :class:`UserError` with the file for what is missing in it."""
    file = next((f for f in (Path(name), beside / name) if f.is_file()), None)
    if file is None:
        raise UserError(f"no schema '{name}'", where="data: options.schema", fix="a .json file, or the id of a recipe")
    try:
        rules = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, ValueError) as error:
        raise UserError(f"not JSON: {error}", where=str(file)) from None
    properties = rules.get("properties") if isinstance(rules, dict) else None
    if not isinstance(properties, dict) or not properties or not all(isinstance(r, dict) for r in properties.values()):
        raise UserError(
            "'properties' names no fields", where=str(file), fix='"properties": {"text": {"type": "string"}}'
        )
    for key in ("x-prompt", "x-completion"):
        template = rules.get(key)
        if not isinstance(template, str) or not _FIELD.search(template):
            raise UserError(f"'{key}' is missing", where=str(file), fix=f'"{key}": text with a field in it, {{text}}')
        for field in _FIELD.findall(template):
            if field not in properties:
                raise UserError(f"'{key}' names the field '{field}'{did_you_mean(field, properties)}", where=str(file))
    for name_, rule in properties.items():
        labels = rule.get("enum", [])
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise UserError(f"the enum of '{name_}' is no list of labels", where=str(file))
        if not isinstance(rule.get("minLength", 0), int):
            raise UserError(f"the minLength of '{name_}' is no number", where=str(file))
    required = rules.get("required", [])
    unknown = [f for f in required if f not in properties] if isinstance(required, list) else [required]
    if unknown:
        raise UserError(f"'required' names '{unknown[0]}', which is not in 'properties'", where=str(file))
    return rules


def check(row: dict[str, Any], rules: dict[str, Any], where: str) -> None:
    """Refuse a row that does not meet the schema; ``where`` is ``file:line``."""
    for name in rules.get("required", []):
        if row.get(name) in (None, ""):
            given = sorted(k for k in row if k not in rules["properties"])
            raise UserError(f"the field '{name}' is missing{did_you_mean(name, given)}", where=where, fix=_form(rules))
    for name, rule in rules["properties"].items():
        value = row.get(name)
        if value in (None, ""):
            continue
        if rule.get("type") == "number":
            try:
                float(value)
            except (TypeError, ValueError):
                raise UserError(f"{name}: '{value}' is not a number", where=where) from None
        elif not isinstance(value, str):
            raise UserError(f"{name}: {value!r} is not text", where=where)
        if "enum" in rule and value not in rule["enum"]:
            raise UserError(
                f"{name}: the label '{value}' is not in the schema{did_you_mean(str(value), rule['enum'])}",
                where=where,
                fix=f"labels: {', '.join(rule['enum'])}; your own labels go into the enum of the schema",
            )
        if len(str(value)) < rule.get("minLength", 0):
            raise UserError(f"{name} is shorter than {rule['minLength']} characters", where=where)


def _form(rules: dict[str, Any]) -> str:
    return "fields: " + ", ".join(rules["properties"])


def _fill(template: str, values: dict[str, str]) -> str:
    return _FIELD.sub(lambda m: values[m[1]], template).strip()


def _read(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """``(line, row)`` of a JSON Lines or CSV file."""
    suffix = path.suffix.lower()
    if suffix not in (".jsonl", ".csv"):
        raise UserError(
            "is neither .jsonl nor .csv", where=str(path), fix="one JSON object a line, or a table with a head"
        )
    for block in readers.blocks(path):
        if block.lines is not None:
            numbered = parse_lines(block)
        else:
            numbered = ((block.number(i), row) for i, row in enumerate(block.rows or []))
        for number, row in numbered:
            if not isinstance(row, dict):
                raise UserError("a row is an object with named fields", where=f"{path}:{number}")
            yield number, row
