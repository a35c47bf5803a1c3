"""Recipes, and the rows that they prepare."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from aifactory_train.api import showing
from aifactory_train.api.rows import Rows, as_source
from aifactory_train.config.loading import load_recipe, recipe_ids, to_tree
from aifactory_train.config.schema import Recipe
from aifactory_train.core import yaml_text
from aifactory_train.core.errors import UserError
from aifactory_train.core.files import write_atomic
from aifactory_train.core.output import note

if TYPE_CHECKING:
    from aifactory_train.data import PreparedData

#: A recipe as the functions of the API take it: its id, the path of its file, or what :func:`recipe` gave.
AnyRecipe: TypeAlias = "str | os.PathLike[str] | Recipe"
#: Where rows and recipes that came from memory are written, below the working directory.
FOLDER = "aifactory"


def recipe(
    name: AnyRecipe,
    *,
    data: Rows | None = None,
    held_out: Rows | None = None,
    settings: Mapping[str, Any] | None = None,
    base: str | None = None,
    licence: str | None = None,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    sector: str | None = None,
    group_by: str | None = None,
    time: str | None = None,
    folder: str | os.PathLike[str] = FOLDER,
) -> Recipe:
    """A recipe: an existing one, an existing one with other rows, or a new one for your rows.

    Args:
        name: id (``health/phenotype-terms``) or file of a recipe; with ``data`` also the id of a new one
            (``acme/tickets``), which is then understood from the rows as ``aifactory recipes new`` does and written
            to ``folder``.
        data: the rows to train on: a path, a list or generator of mappings, a ``pandas.DataFrame`` or a
            ``datasets.Dataset``. Rows from memory are written to ``folder/NAME-DIGEST.jsonl``.
        held_out: rows that the training never sees and is judged on; default: a part of ``data``.
        settings: values of the recipe by dotted key, e.g. ``{"train.epochs": 2}``, as ``--set`` on the command line.
        base: base model of a new recipe: a model's name or folder, or the recipe whose base is taken.
        licence: of the rows: ``own``, or an SPDX id.
        columns: what columns are read as, e.g. ``{"question": "prompt", "reply": "completion"}``.
        task: ``chat``, ``qa``, ``text``, ``preference`` or ``feedback``; default: from the columns.
        sector: of a new recipe, as the factories name it.
        group_by: rows of one value of this column are never divided between training and held-out rows.
        time: the newest rows by this column are held out.
        folder: where rows and new recipes are written.

    Raises:
        UserError: no such recipe, rows that cannot be understood, a value that a key does not take.

    >>> import aifactory_train as af
    >>> af.recipe("health/phenotype-terms", settings={"train.epochs": 1}).train.epochs
    1.0
    >>> rows = [{"frage": f"Was ist {n} + 1?", "antwort": f"Es ist {n + 1}."} for n in range(40)]
    >>> mine = af.recipe("acme/sums", data=rows, base="model", licence="own")
    >>> mine.data.train[0].columns
    {'frage': 'prompt', 'antwort': 'completion'}
    """
    overrides = overrides_of(settings)
    if data is None:
        given = {"held_out": held_out, "base": base, "licence": licence, "columns": columns, "task": task}
        given |= {"sector": sector, "group_by": group_by, "time": time}
        wrong = next((key for key, value in given.items() if value is not None), None)
        if wrong is not None:
            raise UserError("goes with data", where=wrong, fix="settings={…} changes a recipe")
        return as_recipe(name, settings)
    if isinstance(name, Recipe) or _is_there(os.fspath(name)):
        for key, value in {"task": task, "sector": sector, "base": base, "group_by": group_by, "time": time}.items():
            if value is not None:
                raise UserError("is for a new recipe; this one has it already", where=key, fix="settings={…}")
        return _with_rows(name, data, held_out, licence, columns, overrides, Path(folder))
    words = _Words(base, licence, dict(columns or {}), task, sector, group_by, time)
    return _new(os.fspath(name), data, held_out, words, overrides, Path(folder))


def prepare(
    recipe: AnyRecipe,
    *,
    settings: Mapping[str, Any] | None = None,
    whole_report: bool = False,
) -> PreparedRows:
    """Read, check, tokenise and mask the rows of a recipe, and keep them in the cache for the training.

    ``whole_report`` looks at every row for languages, repetition, leakage and personal data, however many there are.
    Raises :class:`UserError` with file and line for a row that cannot be used.

    >>> import aifactory_train as af
    >>> rows = af.prepare("recipe.yaml")
    >>> rows.sets["train"]["documents"]
    48
    >>> rows.warnings
    []
    """
    from aifactory_train.data import load_tokenizer
    from aifactory_train.data import prepare as prepare_rows
    from aifactory_train.data.pipeline import look_at

    found = as_recipe(recipe, settings)
    tokenizer = load_tokenizer(found)
    prepared = prepare_rows(found, tokenizer)
    if whole_report:
        look_at(found, tokenizer, prepared)
    return PreparedRows(found, prepared, tokenizer)


@dataclass(frozen=True)
class PreparedRows:
    """Rows as the training will see them.

    >>> import aifactory_train as af
    >>> shown = af.prepare("recipe.yaml").document(0)
    >>> [turn["role"] for turn in shown["row"]["messages"]]
    ['user', 'assistant']
    """

    recipe: Recipe
    _data: PreparedData = field(repr=False)
    _tokenizer: Any = field(repr=False)

    @property
    def report(self) -> dict[str, Any]:
        """What ``aifactory prepare --json`` prints: sources, sets, what was left out and why."""
        return self._data.report

    @property
    def warnings(self) -> list[str]:
        """What to look at before a training, one sentence each."""
        return list(self._data.report["warnings"])

    @property
    def sets(self) -> dict[str, dict[str, int]]:
        """``{"train" or the name of an evaluation set: {"documents", "tokens", "supervised_tokens"}}``"""
        both = {"train": self._data.train, **self._data.evals}
        return {
            name: {
                "documents": len(found),
                "tokens": int(found.lengths.sum()),
                "supervised_tokens": int(found.supervised.sum()),
            }
            for name, found in both.items()
        }

    def document(self, number: int, of: str = "train") -> dict[str, Any]:
        """A document of a set, from 0: its ``row``, and its tokens with what is supervised. Raises
        :class:`UserError` for a set or a number that is not there."""
        from aifactory_train.data.inspect import inspect_document

        both = {"train": self._data.train, **self._data.evals}
        if of not in both or not 0 <= number < len(both[of]):
            fix = ", ".join(f"{name}: 0 to {len(found) - 1}" for name, found in both.items())
            raise UserError(f"there is no document {number} of '{of}'", where="document", fix=fix)
        found: Any = inspect_document(both[of], number, self._tokenizer, self._data.tokenizer_info, as_json=True)
        return {**found, "row": both[of].row(number)}

    def _repr_html_(self) -> str:
        rows = [[name, *(f"{n:,}" for n in counts.values())] for name, counts in self.sets.items()]
        parts = [showing.table(["", "documents", "tokens", "supervised tokens"], rows)]
        parts += [showing.paragraph(f"warning: {line}") for line in self.warnings]
        return showing.fragment(f"rows of {self.recipe.id}", parts)


# ---- recipes by name, by file, as objects


def as_recipe(recipe: AnyRecipe, settings: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a name, a file or an object, with ``settings`` applied."""
    if isinstance(recipe, Recipe):
        return recipe if not settings else load_recipe(recipe_file(recipe), overrides_of(settings))
    return load_recipe(os.fspath(recipe), overrides_of(settings))


def recipe_file(recipe: AnyRecipe, folder: Path = Path(FOLDER)) -> str:
    """What a command can be given for a recipe: its name or path, or the file that an object is written to."""
    if not isinstance(recipe, Recipe):
        return os.fspath(recipe)
    text = yaml_text.dump(to_tree(recipe))
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    target = folder / f"{recipe.id.replace('/', '-')}-{digest}.yaml"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(target, f"# A recipe as Python had it, everything resolved.\n{text}")
    return str(target)


def overrides_of(settings: Mapping[str, Any] | None) -> list[str]:
    """``["a.b=c"]`` of ``{"a.b": c}``, so that every value is read as what it is in Python."""
    found = []
    for key, value in (settings or {}).items():
        try:
            text = json.dumps(value, ensure_ascii=False, allow_nan=False, default=os.fspath)
        except (TypeError, ValueError):
            fix = "text, a number, true or false, None, or a list or mapping of them"
            raise UserError(f"{value!r} is no value of a recipe", where=f"settings: {key}", fix=fix) from None
        found.append(f"{key}={text}")
    return found


def _is_there(name: str) -> bool:
    return name in recipe_ids() or name.endswith((".yaml", ".yml"))


def _with_rows(
    name: AnyRecipe,
    data: Rows,
    held_out: Rows | None,
    licence: str | None,
    columns: Mapping[str, str] | None,
    overrides: list[str],
    folder: Path,
) -> Recipe:
    """A recipe that is there already, with other rows."""
    stem = as_recipe(name).id.rpartition("/")[2]
    more: dict[str, Any] = {} if licence is None else {"licence": licence}
    if columns:
        more["columns"] = dict(columns)
    sources = {"data.train": {"source": as_source(data, stem, folder, "data"), **more}}
    if held_out is not None:
        sources["data.eval"] = {"source": as_source(held_out, f"{stem}-held-out", folder, "held_out"), **more}
    return load_recipe(recipe_file(name, folder), [*overrides_of(sources), *overrides])


@dataclass(frozen=True)
class _Words:
    """What the caller said of a new recipe."""

    base: str | None
    licence: str | None
    columns: dict[str, str]
    task: str | None
    sector: str | None
    group_by: str | None
    time: str | None


def _new(name: str, data: Rows, held_out: Rows | None, words: _Words, overrides: list[str], folder: Path) -> Recipe:
    """A recipe made for rows, as by ``aifactory recipes new``. Its file's name holds what it was made from, so that
    the same call finds it again, with what was changed in it since."""
    from aifactory_train.commands import recipes_new

    stem = name.replace("/", "-")
    source = as_source(data, stem.rpartition("/")[2], folder, "data")
    held = None if held_out is None else as_source(held_out, f"{stem}-held-out", folder, "held_out")
    known = json.dumps([name, _stamp(source), held and _stamp(held), vars(words)], sort_keys=True)
    out = folder / f"{stem}-{hashlib.sha256(known.encode()).hexdigest()[:12]}.yaml"
    if out.exists():
        note(f"recipe: {out} (was there already)")
        return load_recipe(str(out), overrides)
    args = argparse.Namespace(
        id=name,
        data=source,
        held=held,
        sector=words.sector,
        base=words.base,
        task=words.task,
        licence=words.licence,
        map=[f"{column}={role}" for column, role in words.columns.items()],
        group_by=words.group_by,
        time=words.time,
        out=str(out),
        json=False,
    )
    made = recipes_new.make(args)
    for line in recipes_new.remarks(made):
        note(line)
    note(f"recipe: {out}")
    return load_recipe(str(out), overrides)


def _stamp(path: str) -> list[Any]:
    """What tells whether a file or folder is still the one that a recipe was made for."""
    if not os.path.exists(path):
        return [path]  # refused by name when it is read
    facts = os.stat(path)
    return [os.path.abspath(path), facts.st_size, facts.st_mtime_ns if os.path.isdir(path) else 0]
