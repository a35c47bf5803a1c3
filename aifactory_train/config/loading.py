"""From a recipe's name and ``--set`` values to the checked tree, and back."""

from __future__ import annotations

import os
import re
import unicodedata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from aifactory_train.config import wanted
from aifactory_train.config.data_blocks import as_sources
from aifactory_train.config.schema import Recipe
from aifactory_train.config.source_spec import has_revisions, parse
from aifactory_train.core import yaml_text
from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.core.output import note

RECIPES_DIR = (Path(__file__).parents[1] / "recipes").resolve()  # in a checkout a link to the folder at the top


def find_recipe(name: str) -> Path:
    """The YAML file of a recipe given by id (``health/phenotype-terms``) or by path."""
    as_path = Path(name)
    if as_path.suffix in (".yaml", ".yml"):
        if not as_path.is_file():
            raise UserError("no such recipe file", where=name)
        return as_path
    candidate = RECIPES_DIR / f"{name}.yaml"
    if ".." not in as_path.parts and not as_path.is_absolute() and candidate.is_file():
        return candidate
    known = recipe_ids()
    beside = [f"{name}.yaml"] if name and Path(f"{name}.yaml").is_file() else []
    raise UserError(
        f"unknown recipe '{name}'{did_you_mean(name, beside or known)}",
        fix="'aifactory recipes' lists them; a path must end in .yaml",
    )


def recipe_ids() -> list[str]:
    """Ids of the recipes that are installed, sorted."""
    return sorted(str(p.relative_to(RECIPES_DIR).with_suffix("")) for p in RECIPES_DIR.glob("*/*.yaml"))


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and apply ``a.b=c`` overrides.

    Raises :class:`UserError` that names ``file:line`` or the override.
    """
    path = find_recipe(name)
    document = yaml_text.read(path)
    if not isinstance(document.value, dict):
        raise UserError("a recipe is a mapping of keys", where=f"{path}:1", fix="see 'aifactory recipes RECIPE'")
    tree = wanted.as_written(document.value, document, Recipe)
    if "id" not in tree:
        inside = path.resolve().is_relative_to(RECIPES_DIR.resolve())
        stem = (
            str(path.resolve().relative_to(RECIPES_DIR.resolve()).with_suffix("")) if inside else f"local/{path.stem}"
        )
        tree["id"] = stem if inside else _id_of(stem)
    _resolve_paths(tree, path.parent)
    origin = _apply_overrides(tree, overrides or [])
    _resolve_paths(tree, None)  # what --set brought
    _settle_micro_batch(tree, origin)
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        raise _readable(error, path, document, origin) from None
    if recipe.model.revision is not None and not has_revisions(recipe.model.base):
        note(
            f"model.revision={recipe.model.revision} has no effect: {recipe.model.base} is no Hugging Face id, and is "
            f"used as it is"
        )
    return recipe


def _settle_micro_batch(tree: dict, origin: dict[tuple, str]) -> None:
    """``train.micro_batch_tokens: auto``, and a recipe file's figure that a longer ``data.sequence_length`` of the
    command line outgrew, become the default or the least that holds a document, whichever is more; the latter where it
    was outgrown. How a step is divided changes nothing of the training."""
    train, data = tree.get("train", {}), tree.get("data")
    if not isinstance(train, dict) or not isinstance(data, dict):
        return  # said by the schema
    default = Recipe.model_fields["train"].annotation.model_fields["micro_batch_tokens"].default  # type: ignore[union-attr]
    value, length = train.get("micro_batch_tokens", default), data.get("sequence_length", 0)
    mine = ("train", "micro_batch_tokens") not in origin and ("data", "sequence_length") in origin
    counts = isinstance(value, int) and isinstance(length, int) and train.get("grad_accum", "auto") == "auto"
    outgrown = mine and counts and value < length
    if value != "auto" and not outgrown:
        return
    least = length if isinstance(length, int) else default
    tree["train"] = {**train, "micro_batch_tokens": least if outgrown else max(default, least)}
    if outgrown:
        note(f"train.micro_batch_tokens: {length} instead of {value}, for documents of data.sequence_length {length}")


def _id_of(name: str) -> str:
    """An id made of a file's name, which may hold capitals, spaces and letters of any script."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    parts = [re.sub(r"[^a-z0-9._-]+", "-", part).strip("-._") for part in plain.split("/")]
    return "/".join(part or "recipe" for part in parts)


_BESIDE = (
    ("model", "base"),
    ("model", "chat_template"),
    ("model", "vocabulary", "text"),
    ("methods", "distill", "teacher"),
    ("methods", "distill", "stored"),
)


#: Keys of single paths. Sources of rows (``data.train``, ``data.eval``) are paths too.
PATH_KEYS = (
    *_BESIDE,
    ("model", "start_from"),
    ("record", "organisation"),
    ("record", "sign_with"),
    ("privacy", "identity"),
)


def _resolve_paths(tree: dict, folder: Path | None) -> None:
    """Make the paths of ``tree`` absolute, so that the run can be used from any working directory.

    A model, template or source of rows that begins with ``./`` in a recipe file lies beside that file (``folder``;
    None: the values come from the command line). Any other relative path is one from the working directory, or, where
    nothing lies there, from the recipe's folder. What is no path that exists stays as it was written: an id of a hub, a
    package, or a mistake that is named later.
    """

    def fixed(value: Any) -> Any:
        if isinstance(value, str):
            return _absolute(value, folder, beside=True)
        if isinstance(value, list):
            return [fixed(item) for item in value]
        if isinstance(value, dict) and "source" in value:
            return {**value, "source": fixed(value["source"])}
        return value

    data = tree.get("data")
    if isinstance(data, dict):
        for key in ("train", "eval"):
            if key in data:
                data[key] = fixed(data[key])
    methods = tree.get("methods")
    grpo = methods.get("grpo") if isinstance(methods, dict) else None
    rewards = grpo.get("reward") if isinstance(grpo, dict) else None
    for reward in rewards if isinstance(rewards, list) else [rewards]:
        if isinstance(reward, dict) and isinstance(reward.get("file"), str):
            reward["file"] = _absolute(reward["file"], folder, beside=True)
    for *blocks, last in PATH_KEYS:
        node: Any = tree
        for block in blocks:
            node = node.get(block) if isinstance(node, dict) else None
        if not isinstance(node, dict) or not isinstance(node.get(last), str):
            continue
        if last == "start_from":
            node[last] = _run_folder(node[last], folder)
        else:
            node[last] = _absolute(node[last], folder, beside=(*blocks, last) in _BESIDE)


def _absolute(text: str, folder: Path | None, *, beside: bool = False) -> str:
    """``text`` as an absolute path if something lies there, else unchanged (see :func:`_resolve_paths`); ``beside``:
    ``./`` means the recipe's folder, whatever lies there."""
    if beside and folder is not None and text.startswith("./"):
        return str((folder / text).resolve())
    if not text or "\0" in text or text.startswith(("pypi:", "npm:")):
        return text
    if text.startswith(("hf:", _HUB_PAGE)):
        return _hub_name(text)
    path = Path(os.path.expanduser(text))
    if os.path.exists(path) or (str(path) != text and text.startswith("~")):
        return os.path.abspath(path)
    if folder is None or path.is_absolute() or not os.path.exists(folder / path):
        return text

    # What could be the id of a hub (org/name) stays one: what it means must not depend on what lies beside the recipe.
    return os.path.abspath(folder / path) if parse(text).kind == "local" else text


_HUB_PAGE = "https://huggingface.co/"


def _hub_name(text: str) -> str:
    """``ORG/NAME`` of ``hf:ORG/NAME`` or of the page's address."""
    name = text.removeprefix("hf:").removeprefix(_HUB_PAGE).removeprefix("datasets/").strip("/")
    if name.count("/") != 1:
        raise UserError("is no name of the hub", where=text, fix="hf:ORG/NAME, as the page shows it at its top")
    if os.path.exists(name):
        raise UserError(f"'{name}' lies in this folder too, and is taken first", where=text, fix="move one of the two")
    return name


def _run_folder(name: str, folder: Path | None) -> str:
    """An earlier run by path or by its name below ``runs/``, as an absolute path if it is there."""
    found = _absolute(name, folder)
    if not os.path.isabs(found) or not os.path.isfile(os.path.join(found, "run.yaml")):
        below = os.path.join("runs", name)
        if os.path.isfile(os.path.join(below, "run.yaml")):
            return os.path.abspath(below)
    return found


def _apply_overrides(tree: dict, overrides: list[str]) -> dict[tuple, str]:
    """Change ``tree`` in place; returns which override set which path."""
    origin: dict[tuple, str] = {}
    replaced = {key.strip(): raw for key, _, raw in (o.partition("=") for o in overrides)}
    keys = [_numbered(tree, o.partition("=")[0].strip(), replaced) for o in overrides]
    given = set(keys)
    for text, key in zip(overrides, keys, strict=True):
        _, separator, raw = text.partition("=")
        if not separator or not key:
            raise UserError("an override has the form a.b=c", where=_shown(text))
        path = tuple(int(p) if p.isdecimal() else p for p in key.split("."))
        value = wanted.given(raw, path, _shown(text))
        if path[:2] in (("data", "train"), ("data", "eval")) and len(path) > 2 and isinstance(tree.get("data"), dict):
            tree["data"][path[1]] = as_sources(tree["data"].get(path[1]))
        if any(p == "" for p in path):
            raise UserError("an empty name in the key", where=_shown(text))
        node: Any = tree
        for depth, part in enumerate(path[:-1]):
            if isinstance(node, list):
                if not isinstance(part, int) or part >= len(node):
                    raise _no_such_item(path[:depth], node, text)
                if not isinstance(node[part], dict):
                    node[part] = {"source": node[part]}
                node = node[part]
                continue
            if isinstance(part, int) and not isinstance(node, list):
                part = str(part)
            child = node.get(part)
            if child is None:
                child = node[part] = {}
            if not isinstance(child, (dict, list)):
                raise UserError(
                    f"'{'.'.join(map(str, path[: depth + 1]))}' is a value, not a block",
                    where=_shown(text),
                )
            node = child
        last = path[-1]
        if isinstance(node, list):
            if not isinstance(last, int) or last >= len(node):
                raise _no_such_item(path[:-1], node, text)
        else:
            last = str(last)
        node[last] = value
        _tell_replaced(origin, path, text)
        origin[path] = text
        if path == ("data", "train") and "data.eval" not in given:
            # The recipe's held-out rows say nothing about somebody else's data: hold out a part of the new rows.
            tree["data"].pop("eval", None)
        if path[:2] in (("data", "train"), ("data", "eval")) and path[2:] and path[-1] == "source":
            for stale in ("licence", "revision", "facts"):  # they were said of the source that this one replaces
                if not any(key.startswith(f"{'.'.join(map(str, path[:-1]))}.{stale}") for key in given):
                    node.pop(stale, None)
        for this, other in (("batch_rows", "batch_tokens"), ("batch_tokens", "batch_rows")):
            if path == ("train", this) and f"train.{other}" not in given:
                tree["train"].pop(other, None)  # the two exclude each other: the override wins over the recipe
        if path == ("model", "base") and isinstance(tree.get("model"), dict):
            _carry_option(tree["model"], given)
    return origin


def _tell_replaced(origin: dict[tuple, str], path: tuple, text: str) -> None:
    """Say which earlier overrides a later one makes void."""
    for earlier in [p for p in origin if p[: len(path)] == path]:
        replaced = origin.pop(earlier)
        if replaced != text:
            note(f"{_shown(replaced)} has no effect: {_shown(text)} comes after it")


def _no_such_item(path: tuple[str | int, ...], node: list[Any], text: str) -> UserError:
    block = ".".join(map(str, path))
    fix = f"say which one, counted from 0: {block}.0"
    return UserError(f"'{block}' is a list of {len(node)}", where=_shown(text), fix=fix)


def _shown(override: str) -> str:
    """An override as the place of a fault."""
    return f"--set {override}" if len(override) <= 200 else f"--set {override[:200]}..."


def _numbered(tree: dict, key: str, replaced: dict[str, str]) -> str:
    """``data.train.licence`` means ``data.train.0.licence`` where there is one source, in the recipe or in its place
    (``replaced``: the overrides by key)."""
    parts = key.split(".")
    if parts[:2] not in (["data", "train"], ["data", "eval"]) or len(parts) < 3 or parts[2].isdecimal():
        return key
    whole = replaced.get(".".join(parts[:2]))
    data = tree.get("data")
    sources = as_sources(data.get(parts[1])) if isinstance(data, dict) else None
    one = isinstance(sources, list) and len(sources) == 1 if whole is None else not whole.lstrip().startswith("[")
    return ".".join([*parts[:2], "0", *parts[2:]]) if one else key


def _carry_option(model: dict, given: set[str]) -> None:
    """A base that the recipe names among its options brings its own licence and revision, any other is 'unknown'."""
    options = [o for o in model.get("options") or [] if isinstance(o, dict) and o.get("base") == model["base"]]
    for key, default in (("licence", "unknown"), ("revision", None)):
        if f"model.{key}" not in given:
            model[key] = options[0].get(key, default) if options else default


_UNION_MEMBERS = (("int",), ("float",), ("str",), ("bool",))


def _readable(
    error: ValidationError, path: Path, document: yaml_text.YamlDocument, origin: dict[tuple, str]
) -> UserError:
    """The first validation error as one message with its place."""
    first = error.errors()[0]
    if first["type"] == "missing":  # a word that is misspelt in the same block is the likelier fault
        beside = (e for e in error.errors() if e["type"] == "extra_forbidden" and e["loc"][:-1] == first["loc"][:-1])
        first = next(beside, first)
    location = tuple(p for p in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error" and not location:
        key, _, rest = message.partition(": ")
        location, message = tuple(key.split(".")), rest
    # pydantic puts names of validators and union members into the path; only keys of the tree name a place
    last = location[-1:] if first["type"] == "extra_forbidden" else ()  # the user's own word, whatever it looks like
    location = tuple(p for p in location if isinstance(p, int) or (isinstance(p, str) and p.isidentifier()))
    if last and location[-1:] != last:
        location += last
    if not last and location[-1:] in _UNION_MEMBERS:
        location = location[:-1]
        others = (e["msg"] for e in error.errors() if tuple(e["loc"])[: len(location)] == location)
        message = " or ".join(others) or message
    key = ".".join(map(str, location))
    fix = None
    if first["type"] == "extra_forbidden":
        known = wanted.keys(location[:-1])
        message = f"unknown key '{key}'{wanted.meant(str(location[-1]), known)}"
        fix = f"known keys here: {', '.join(known)}" if known else None
    elif first["type"] == "missing":
        message = f"'{key}' is missing"
    else:
        value = first.get("input")
        shown = repr(value) if isinstance(value, (str, int, float, bool)) or value is None else ""
        message = f"{key}: {message}" if key else message
        message += f" (got {shown if len(shown) <= 80 else shown[:80] + '...'})" if shown else ""
        if value is None and wanted.takes_text(wanted.at(location)):
            fix = "leave the key out; the word itself is written in quotes: 'null'"
    names = tuple(map(str, location))  # an override's 0 may be an index or, wrongly, a key
    for override_path, text in origin.items():
        given = tuple(map(str, override_path))
        if names[: len(given)] == given or given[: len(names)] == names:
            return UserError(message, where=_shown(text), fix=fix)
    line = document.line(location)
    return UserError(message, where=f"{path}:{line}" if line else str(path), fix=fix)


def to_tree(recipe: Recipe) -> dict[str, Any]:
    """The resolved tree as plain values (JSON and YAML safe)."""
    return recipe.model_dump(mode="json")


def from_tree(tree: Any, where: str, document: yaml_text.YamlDocument | None = None) -> Recipe:
    """The recipe of a resolved tree. Raises :class:`UserError` with the place in ``where``, whose text ``document``
    is.
    """
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise _readable(error, Path(where), document or yaml_text.YamlDocument(None, None), {}) from None


def read_run_config(path: Path) -> Recipe:
    """The recipe of a ``run.yaml``, with everything resolved: no path in it is looked for again."""
    document = yaml_text.read(path)
    return from_tree(wanted.as_written(document.value, document, Recipe), str(path), document)


def json_schema() -> dict[str, Any]:
    """JSON Schema of a recipe, for editors (the comment in each recipe's first line points to it)."""
    schema = Recipe.model_json_schema()
    for block in schema.get("$defs", {}).values():
        if block.get("title") == "DataConfig":
            for key in ("train", "eval"):
                # What the loader accepts beyond the resolved form: one source, or plain strings.
                one = {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/DataSource"}]}
                description = block["properties"][key].get("description", "")
                block["properties"][key] = {
                    "anyOf": [one, {"type": "array", "items": one}, {"type": "null"}],
                    "description": description,
                }
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "aifactory-train recipe"
    return schema


def cache_dir() -> Path:
    """``$AIFACTORY_CACHE``, or ``$XDG_CACHE_HOME/aifactory``, or ``~/.cache/aifactory``."""
    if os.environ.get("AIFACTORY_CACHE"):
        return Path(os.environ["AIFACTORY_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "aifactory"
