"""The main keys of a recipe as fields of a form, and their values put into the text of the recipe, which keeps its
comments: the YAML is the source of truth, the form only a way to write it."""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from aifactory_train.config.loading import RECIPES_DIR, load_recipe
from aifactory_train.config.schema import Recipe
from aifactory_train.core import yaml_text
from aifactory_train.core.errors import UserError
from aifactory_train.core.files import read_json, write_atomic

#: key -> what people call it
KEYS = {
    "about.title": "Title",
    "model.base": "Base model",
    "model.licence": "Licence of the base model",
    "adapter.kind": "What is trained",
    "adapter.rank": "Rank of the adapter",
    "data.sequence_length": "Longest document, in tokens",
    "data.eval_fraction": "Share held out",
    "train.epochs": "Epochs",
    "train.max_steps": "Steps at most",
    "train.batch_rows": "Documents a step",
    "train.learning_rate": "Learning rate",
    "train.schedule": "Schedule of the learning rate",
    "eval.every_steps": "Held-out loss every so many steps",
    "eval.generate_rows": "Held-out rows that are answered",
    "eval.max_new_tokens": "Longest answer, in tokens",
    "privacy.profile": "Privacy profile",
}
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
_SCALARS = ("string", "integer", "number", "boolean")


@dataclass(frozen=True)
class RecipeField:
    """A key as the page asks for it. ``value`` is what stands in the recipe; empty where the default holds."""

    key: str
    label: str
    help: str
    value: str
    default: str
    choices: tuple[str, ...]
    number: bool


def fields(text: str) -> list[RecipeField]:
    """The fields of :data:`KEYS`, with the values of a recipe's ``text``, as far as it can be read."""
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        node = None
    schema = read_json(RECIPES_DIR / "recipe.schema.json", dict)
    found = []
    for key, label in KEYS.items():
        rule = _rule(schema, key)
        kinds = {option.get("type") for option in rule.get("anyOf", [rule])}
        default = rule.get("default")
        value = _find(node, key.split("."))
        found.append(
            RecipeField(
                key,
                label,
                rule.get("description", ""),
                value.value if isinstance(value, yaml.ScalarNode) else "",
                "" if default is None else str(default),
                tuple(rule.get("enum", ())),
                bool(kinds & {"integer", "number"}),
            )
        )
    return found


def _rule(schema: dict[str, Any], key: str) -> dict[str, Any]:
    """What the JSON schema says of a key."""
    node = schema
    for part in key.split("."):
        while "$ref" in node:
            node = schema["$defs"][node["$ref"].rpartition("/")[2]]
        node = node["properties"][part]
    return node


def _find(node: yaml.Node | None, parts: list[str]) -> yaml.Node | None:
    for part in parts:
        if not isinstance(node, yaml.MappingNode):
            return None
        node = next((value for name, value in node.value if name.value == part), None)
    return node


def with_values(text: str, values: Mapping[str, str]) -> str:
    """``text`` with the values that differ from what stands there; an empty one takes its key away.

    Raises :class:`UserError` where the text is no YAML, or a key cannot be changed without its neighbours.
    """
    for field in fields(text):
        new = values.get(field.key)
        if new is not None and new.strip() != field.value:
            text = _put(text, field, new.strip())
    return text


def _put(text: str, field: RecipeField, new: str) -> str:
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise _no_yaml(error) from None
    block, name = field.key.split(".")
    written = new if _PLAIN.fullmatch(new) and (field.number or field.choices) else json.dumps(new, ensure_ascii=False)
    node, parent = _find(root, [block, name]), _find(root, [block])
    if isinstance(node, yaml.ScalarNode):
        if not new:
            return _without_line(text, field.key, node)
        return text[: node.start_mark.index] + written + text[node.end_mark.index :]
    if not new:
        return text
    if node is not None or (parent is not None and not _is_block(parent)):
        raise UserError("is written in a way that the form does not change", where=field.key, fix="change the YAML")
    if parent is None:
        return (
            f"{text.rstrip()}\n\n{block}:\n  {name}: {written}\n"
            if text.strip()
            else f"{block}:\n  {name}: {written}\n"
        )
    first = parent.value[0][0].start_mark
    at = first.index - first.column
    return f"{text[:at]}{' ' * first.column}{name}: {written}\n{text[at:]}"


def _is_block(node: yaml.Node) -> bool:
    return isinstance(node, yaml.MappingNode) and not node.flow_style and bool(node.value)


def _without_line(text: str, key: str, node: yaml.ScalarNode) -> str:
    """The text without the line ``name: value``."""
    begin = text.rfind("\n", 0, node.start_mark.index) + 1
    end = text.find("\n", node.end_mark.index)
    line = text[begin : len(text) if end < 0 else end]
    name = key.rpartition(".")[2]
    if not re.match(rf"\s+['\"]?{re.escape(name)}['\"]?\s*:", line) or node.end_mark.line != node.start_mark.line:
        raise UserError("is written in a way that the form does not change", where=key, fix="change the YAML")
    return text[:begin] + ("" if end < 0 else text[end + 1 :])


def _no_yaml(error: yaml.YAMLError) -> UserError:
    mark = getattr(error, "problem_mark", None)
    line = f":{mark.line + 1}" if mark is not None else ""
    return UserError(f"is no YAML: {getattr(error, 'problem', None) or error}", where=f"recipe{line}")


def check(path: Path, text: str) -> Recipe:
    """The recipe that ``text`` would be in the place of ``path``. Raises :class:`UserError` that names line and key."""
    beside = path.with_name(f".{secrets.token_hex(6)}-{path.name}")
    write_atomic(beside, text, sync=False)
    try:
        return load_recipe(str(beside))
    except UserError as error:
        where = None if error.where is None else error.where.replace(str(beside), path.name)
        raise UserError(error.what.replace(str(beside), path.name), where=where, fix=error.fix) from None
    finally:
        beside.unlink(missing_ok=True)


def digest(text: str) -> str:
    """What tells whether a recipe is still the one that a page showed."""
    return hashlib.sha256(text.encode()).hexdigest()


def save(path: Path, text: str, seen: str) -> Recipe:
    """Write the recipe, if it is one and the file still is the one of the digest ``seen``."""
    recipe = check(path, text)
    if digest(path.read_text(encoding="utf-8")) != seen:
        raise UserError("was changed meanwhile, and nothing was written", where=path.name, fix="open the page again")
    write_atomic(path, text)
    return recipe


def read(path: Path) -> str:
    """The text of a recipe. Raises :class:`UserError` for what is no text or no YAML at all."""
    yaml_text.read(path)
    return path.read_text(encoding="utf-8")
