"""YAML as this project reads and writes it: the core schema of YAML 1.2, with the line and the written text of every
value.

The core schema knows ``true`` and ``false``, decimal numbers, ``0x`` and ``0o``, and ``null``. What YAML 1.1 guessed
beside them is text: ``on`` and ``no``, ``017`` as eight-based fifteen, ``1:30`` as ninety, ``2026-08-20`` as a date.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from aifactory_train.core.errors import UserError
from aifactory_train.core.files import check_regular

#: Brackets and indentation, also through aliases; no file of this project comes near it, and parsers end in a crash
#: without a limit.
DEEPEST = 100
#: Characters that a document with aliases may stand for: nine lines of nested aliases are otherwise worth a thousand
#: million values.
LARGEST = 1_000_000

#: A first line that says so is of a file that is whole only with YAML's end of a document as its last line: half of a
#: file that was cut between two keys reads as well as the whole.
ENDS = "The last line is '...'."

_TAG = "tag:yaml.org,2002:"
_CORE = {
    "null": (r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
}


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Plain data by the core schema; ``<<`` merges. A key is its written text."""

    yaml_implicit_resolvers: dict = {}
    yaml_constructors = {
        tag: make
        for tag, make in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.removeprefix(_TAG) in (*_CORE, "str", "seq", "map")
    }
    keeps_written = False
    _depth = 0

    def descend_resolver(self, parent: yaml.Node | None, index: Any) -> None:
        self._depth += 1
        if self._depth > DEEPEST:
            raise _fault(f"nested more than {DEEPEST} deep", parent)

    def ascend_resolver(self) -> None:
        self._depth -= 1

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep=deep)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            kind = node.tag.removeprefix(_TAG)
            shown = str(node.value) if len(str(node.value)) <= 40 else f"{str(node.value)[:40]}..."
            raise _fault(f"'{shown}' ({len(node.value)} characters) cannot be read as {kind}", node) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        self.flatten_mapping(node)
        for key, _ in node.value:
            self.construct_object(key)  # a tag that is unknown is refused, here too
        return {key.value: self.construct_object(value, deep=deep) for key, value in node.value}


class WrittenInt(int):
    """A number whose usual form is not the text that stands in the file: ``010``."""

    written = ""


class WrittenFloat(float):
    """The same of ``1e3`` and ``1.50``."""

    written = ""


def _integer(loader: Any, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    base = {"0x": 16, "0o": 8}.get(text[:2].lower(), 10)
    return _kept(loader, WrittenInt, int(text[2:] if base != 10 else text, base), text)


def _float(loader: Any, node: yaml.ScalarNode) -> float:
    return _kept(loader, WrittenFloat, loader.construct_yaml_float(node), node.value)


def _kept(loader: Any, kind: Any, value: Any, text: str) -> Any:
    if not loader.keeps_written or text == str(value):
        return value
    value = kind(value)
    value.written = text
    return value


for _name, (_pattern, _first) in _CORE.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), _first)
_Loader.add_implicit_resolver(_TAG + "merge", re.compile("^<<$"), ["<"])
_Loader.add_constructor(_TAG + "int", _integer)
_Loader.add_constructor(_TAG + "float", _float)
_Loader.add_constructor(_TAG + "merge", yaml.SafeLoader.construct_yaml_str)


class _Dumper(yaml.SafeDumper):
    """Text that either version of YAML would read as something else is quoted."""


for _name, (_pattern, _first) in _CORE.items():
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(f"^(?:{_pattern})$"), _first)


def _fault(what: str, node: yaml.Node | None) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark if node is not None else None)


@dataclass(frozen=True)
class YamlDocument:
    """One YAML text, read. A path is the keys (text) and list indices that lead to a value."""

    value: Any
    node: yaml.Node | None

    @cached_property
    def _places(self) -> dict[tuple, tuple[int, yaml.Node]]:
        found: dict[tuple, tuple[int, yaml.Node]] = {}

        def walk(node: yaml.Node, path: tuple) -> None:
            pairs: list[tuple[Any, yaml.Node, yaml.Node]] = []
            if isinstance(
                node, yaml.MappingNode
            ):  # what was merged stands first: a key of its own comes later and wins
                pairs = [(key.value, key, value) for key, value in node.value]
            elif isinstance(node, yaml.SequenceNode):
                pairs = [(i, value, value) for i, value in enumerate(node.value)]
            for name, begin, value in pairs:
                here = (*path, name)
                found[here] = (begin.start_mark.line + 1, value)
                walk(value, here)

        if self.node is not None:
            found[()] = (self.node.start_mark.line + 1, self.node)
            walk(self.node, ())
        return found

    def line(self, path: tuple) -> int | None:
        """The line (from 1) of the key or list item, or of its nearest parent; None in an empty document."""
        for depth in range(len(path), -1, -1):
            if path[:depth] in self._places:
                return self._places[path[:depth]][0]
        return None

    def written(self, path: tuple) -> str | None:
        """A plain value (number, boolean, word) as it was written: ``017``, ``1e3``, ``true``. None for a block or a
        list.
        """
        node = self._places[path][1] if path in self._places else None
        return node.value if isinstance(node, yaml.ScalarNode) else None


def read(path: Path, *, keep_written: bool = False) -> YamlDocument:
    """A YAML file; ``keep_written``: ``010`` is a :class:`WrittenInt`. Raises :class:`UserError` with file and line: no
    file, not UTF-8, bad YAML, a key given twice, aliases that unfold without end."""
    check_regular(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError("no such file", where=str(path)) from None
    except IsADirectoryError:
        raise UserError("is a folder, not a YAML file", where=str(path)) from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {getattr(error, 'strerror', None) or error}", where=str(path)) from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError("not UTF-8 text", where=f"{path}:{line}", fix="save the file as UTF-8") from None
    return parse(text, str(path), keep_written=keep_written)


def parse(text: str, where: str, *, doubled: bool = False, keep_written: bool = False) -> YamlDocument:
    """A YAML text; ``where`` names it in messages. Raises as :func:`read`; ``doubled``: of a key that stands twice the
    last counts, in what strangers wrote."""
    if ENDS in text.partition("\n")[0] and not text.rstrip().endswith("\n..."):
        lines = text.rstrip().count("\n") + 1
        raise UserError(
            "was cut: its last line is not '...'",
            where=f"{where}:{lines}",
            fix="take it from a copy; if nothing is missing, add that line",
        )
    try:
        loader = _Loader(text)
        loader.keeps_written = keep_written
        try:
            node = loader.get_single_node()
            if node is None:
                return YamlDocument(None, None)
            # Without aliases a document unfolds to no more than its text.
            _check(node, {}, max(LARGEST, 2 * len(text)), doubled)
            return YamlDocument(loader.construct_document(node), node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        line = mark.line + 1 if mark else None
        if isinstance(error, yaml.reader.ReaderError):
            line = text.encode("utf-8")[: error.position].count(b"\n") + 1
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
        raise UserError(f"not valid YAML: {problem}", where=f"{where}:{line}" if line else where) from None
    except UnicodeEncodeError:
        raise UserError("not UTF-8 text", where=where) from None


def dump(value: Any, **how: Any) -> str:
    """YAML that :func:`read` gives back as ``value``: keys in their order, letters of any script. ``how``: options of
    ``yaml.dump``.
    """
    return yaml.dump(value, Dumper=_Dumper, **{"sort_keys": False, "allow_unicode": True, **how})


def _check(node: yaml.Node, seen: dict[int, tuple[int, int] | None], most: int, doubled: bool) -> tuple[int, int]:
    """Refuse doubled keys, keys that are no words, and aliases without end. Returns how many characters the node
    unfolds to (at most ``most``), and how deep it is."""
    if id(node) in seen:  # an alias
        known = seen[id(node)]
        if known is None:
            raise _fault("a value that holds itself, by an alias", node)
        return known
    seen[id(node)] = None
    if isinstance(node, yaml.ScalarNode):
        seen[id(node)] = found = len(node.value) + 1, 0
        return found
    children = [(None, child) for child in node.value] if isinstance(node, yaml.SequenceNode) else node.value
    if isinstance(node, yaml.MappingNode):
        _check_keys(node, doubled)
    size, height = 1, 0
    for name, value in children:
        more, below = _check(value, seen, most, doubled)
        size, height = size + more + (len(name.value) if name else 0), max(height, below + 1)
        if size > most:
            raise _fault(f"its aliases unfold to more than {most:,} characters", name or value)
        if height > DEEPEST:
            raise _fault(f"nested more than {DEEPEST} deep", name or value)
    seen[id(node)] = size, height
    return size, height


def _check_keys(node: yaml.MappingNode, doubled: bool) -> None:
    first: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _fault("a key is a word", key)
        if key.value in first and not doubled:
            raise _fault(f"key '{key.value}' is given twice (first in line {first[key.value]})", key)
        first[key.value] = key.start_mark.line + 1
