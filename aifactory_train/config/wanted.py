"""What kind of value each key of a recipe wants: text is taken as it was written, everything else by YAML's core
schema.

So a folder called ``2024``, a revision ``8e25123`` and the labels ``[01, 02]`` are text, in a recipe and after
``--set``.
"""

from __future__ import annotations

import os
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

from aifactory_train.config.data_blocks import DataSource
from aifactory_train.config.schema import Recipe
from aifactory_train.core import yaml_text
from aifactory_train.core.errors import UserError, did_you_mean

#: What transformers, peft, TRL and their users call some keys.
_OTHER_NAMES = {
    "lr": "learning_rate",
    "num_train_epochs": "epochs",
    "batch_size": "batch_rows",
    "per_device_train_batch_size": "batch_rows",
    "gradient_accumulation_steps": "grad_accum",
    "lr_scheduler_type": "schedule",
    "lr_scheduler": "schedule",
    "warmup_proportion": "warmup_ratio",
    "optim": "optimizer",
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "max_seq_length": "sequence_length",
    "max_length": "sequence_length",
    "cutoff_len": "sequence_length",
    "gradient_checkpointing": "activation_checkpointing",
    "eval_steps": "every_steps",
    "model_name_or_path": "base",
    "dataset": "train",
    "load_in_4bit": "quantise_base",
    "val_set_size": "eval_fraction",
}

#: Text in which spaces at the ends count.
_EXACT = ("eval", "label_separator")


def at(path: tuple) -> Any:
    """The annotation of the value at ``path`` in the recipe's schema; None where the schema has no such key, or leaves
    it open.
    """
    annotation: Any = Recipe
    for part in path:
        annotation = _below(annotation, part)
    return annotation


def keys(path: tuple) -> list[str]:
    """The keys of the block at ``path``, or of the blocks in the list there, sorted; none where it has no fixed
    keys.
    """
    for member in _members(at(path)):
        block = DataSource if _is_source(member) else (get_args(member) or (member,))[0]
        if isinstance(block, type) and issubclass(block, BaseModel):
            return sorted(block.model_fields)
    return []


def meant(key: str, known: list[str]) -> str:
    """`` (did you mean 'x'?)``: what other programs call a key, the nearest of the ``known`` ones, or the same word in
    another block.
    """
    name = _OTHER_NAMES.get(key, key)
    if name in known:
        return f" (did you mean '{name}'?)"
    there = [f"{block}.{name}" for block in keys(()) if name in keys((block,))]
    close = did_you_mean(key, known) if name == key or not there else ""
    return close or (f" (did you mean '{there[0]}'?)" if there else "")


def as_written(value: Any, document: yaml_text.YamlDocument, annotation: Any, inside: tuple = ()) -> Any:
    """``value`` (at ``inside`` in the document) with every number and boolean that stands where text is wanted as its
    written text.
    """
    if isinstance(value, dict):
        return {k: as_written(v, document, _below(annotation, k), (*inside, k)) for k, v in value.items()}
    if isinstance(value, list):
        return [as_written(v, document, _below(annotation, i), (*inside, i)) for i, v in enumerate(value)]
    members = _members(annotation)
    truth_for_a_number = isinstance(value, bool) and bool not in members and any(m in (int, float) for m in members)
    if truth_for_a_number or (isinstance(value, (bool, int, float)) and takes_text(annotation)):
        return document.written(inside)
    return value


def given(raw: str, path: tuple, where: str) -> Any:
    """The value of ``--set KEY=raw``: text where ``path`` wants text, one item where it wants a list of texts;
    ``[...]`` is a list, and a text in quotes is what the quotes hold. Raises :class:`UserError` that names
    ``where``."""
    if not raw.strip():
        return raw or None
    if not raw.isascii() and raw != raw.encode("utf-8", "replace").decode():
        raise UserError("not UTF-8 text", where=where.encode("utf-8", "replace").decode())
    annotation = at(path)
    members = _members(annotation)
    if not takes_text(annotation):
        try:
            document = yaml_text.parse(raw, where)
        except UserError as error:
            if annotation is None or annotation is Any:
                return raw  # open to any value, so to this text too
            raise UserError(error.what, where=where) from None
        return as_written(document.value, document, annotation)
    text = raw if path == _EXACT else raw.strip()
    if text in ("null", "Null", "NULL", "~"):
        return None
    if text[0] in "'\"" and text[-1] == text[0] and len(text) > 1:
        value = _or_none(text, where)
        text = value if isinstance(value, str) else text
    elif text[0] in "[{" and (items := _listed(text, where, annotation)) is not None:
        return items
    return text if _takes_one(members) else [text]


def takes_text(annotation: Any) -> bool:
    """Whether text is wanted: alone, as one item of a list, or as a source; not where a number is wanted too."""
    members = _members(annotation)
    if any(m in (int, float, bool, Any) for m in members):
        return False
    return _takes_one(members) or any(get_origin(m) is list and takes_text(get_args(m)[0]) for m in members)


def _listed(text: str, where: str, annotation: Any) -> Any:
    """The list (or, of sources, the block) that ``text`` writes where one is allowed; None where it is a text that
    begins like one.
    """
    members = _members(annotation)
    sources = any(_is_source(m) for m in members)
    if not sources and not (text[0] == "[" and any(get_origin(m) is list for m in members)):
        return None
    if os.path.exists(os.path.expanduser(text)):
        return None
    try:
        document = yaml_text.parse(text, where)
    except UserError as error:
        fix = "close the brackets, or put a text in quotes"
        raise UserError(f"not a list: {error.what}", where=where, fix=fix) from None
    return as_written(document.value, document, annotation)


def _or_none(text: str, where: str) -> Any:
    try:
        return yaml_text.parse(text, where).value
    except UserError:
        return None  # 'one' or 'two': not one text in quotes, so the quotes belong to it


def _members(annotation: Any) -> list[Any]:
    """The alternatives of an annotation, without ``Annotated``."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return [m for inner in get_args(annotation) for m in _members(inner)]
    return [annotation]


def _below(annotation: Any, part: Any) -> Any:
    """The annotation of a block's key or a list's item; None where it has none."""
    for member in _members(annotation):
        if _is_source(member) and not isinstance(part, int):
            member = DataSource  # a single one needs no list
        if isinstance(member, type) and issubclass(member, BaseModel):
            field = member.model_fields.get(str(part))
            if field is not None:
                return field.annotation
            continue
        origin, inner = get_origin(member), get_args(member)
        if origin in (list, tuple) and isinstance(part, int):
            return inner[min(part, len(inner) - 1)]
        if origin is dict:
            return inner[1]
    return None


def _is_source(member: Any) -> bool:
    """Sources of rows: each may be written as the text of its path or name."""
    return member is DataSource or get_args(member)[:1] == (DataSource,)


def _is_text(member: Any) -> bool:
    return member is str or (get_origin(member) is Literal and all(isinstance(word, str) for word in get_args(member)))


def _takes_one(members: list[Any]) -> bool:
    return any(_is_text(m) or _is_source(m) for m in members)
