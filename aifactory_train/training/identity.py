"""What a run computes from besides its configuration: the base model's content, the tokenizer, the tokens of the rows.

A checkpoint holds what was trained. Frozen weights, the tokenizer and the rows come from outside every time a run goes
on, under names that the configuration keeps: the content behind a name can change. ``inputs.json`` in the run folder
has the digests of the first attempt, and an attempt that goes on is compared with it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.core.files import read_json, write_json
from aifactory_train.run.folder import RunFolder
from aifactory_train.sources.digests import sha256_of
from aifactory_train.sources.model_folder import weight_files

INPUTS, FORMAT = "inputs.json", 1
#: Keys of config.json that say who wrote it, not what the model is.
_WRITTEN_BY = ("_name_or_path", "transformers_version")


def of_run(recipe: Recipe, data: Any, train_set: Any) -> dict[str, Any]:
    """Digests of everything that decides what the steps of this run compute, as JSON values.

    ``data`` is what :func:`aifactory_train.data.prepare` returned, ``train_set`` the view on its training set that the
    steps use.
    """
    from aifactory_train.model.base import base_folder
    from aifactory_train.sources import resolve_model

    base, own = base_folder(recipe), resolve_model(recipe.model)
    files = weight_files(base)
    if recipe.model.trust_remote_code:
        files += sorted(base.glob("*.py"))
    vocabulary = [own / "tokenizer.json"] if (own / "tokenizer.json").is_file() else []
    digests = sha256_of([*files, *vocabulary])
    info = data.tokenizer_info
    train = {"tokens": data.train.digest}
    desirable = getattr(train_set, "desirable", None)
    if desirable is not None:  # which answers are to become likelier stands in the rows, not in their tokens
        train["labels"] = hashlib.sha256(desirable.tobytes()).hexdigest()
    label_digest = getattr(train_set, "label_digest", None)
    if label_digest is not None:  # so with the labels of a head
        train["labels"] = label_digest
    held_out = {name: {"tokens": rows.digest} for name, rows in data.evals.items()}
    return {
        "format": FORMAT,
        "base": {
            "config": _config_digest(base / "config.json"),
            "files": {os.path.relpath(p, base): digests[p] for p in files},
        },
        "tokenizer": {
            "file": digests[vocabulary[0]] if vocabulary else None,
            "content": info["tokenizer_sha256"],
            "template": info["template_sha256"],
            "ids": [info["eos_id"], info["stop_ids"], info["pad_id"]],
        },
        "data": {"train": train, "eval": held_out, "eval_rows": recipe.data.eval_rows},
    }


def _config_digest(path: Path) -> str:
    """Of what config.json says, however it is written."""
    kept = {key: value for key, value in read_json(path, dict).items() if key not in _WRITTEN_BY}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def keep(run: RunFolder, inputs: dict[str, Any], *, fresh: bool) -> None:
    """Write ``inputs.json`` where the run starts at step 1 (``fresh``), or has none yet."""
    if fresh or not (run.path / INPUTS).is_file():
        write_json(run.path / INPUTS, inputs)


def check(run: RunFolder, recipe: Recipe, now: dict[str, Any]) -> list[str]:
    """Compare with the first attempt; returns lines to be reported. Raises :class:`UserError` naming what changed.

    Where all weights are trained they all come from the checkpoint: a base whose weights changed is reported and not
    refused.
    """
    path = run.path / INPUTS
    if not os.path.lexists(path):
        return [
            f"the run has no {INPUTS}: whether base model, tokenizer and rows are those of its first attempt was not "
            "checked (from now on it is)"
        ]
    try:
        before = read_json(path)
        changed, reported = _differences(before, now, recipe)
    except (KeyError, TypeError, AttributeError, UserError):
        raise UserError("is damaged", where=str(path), fix=_without(run)) from None
    if changed:
        lines = "\n    ".join(f"{key}: {what}" for key, what in changed)
        raise UserError(
            f"the run was begun with other inputs:\n    {lines}",
            where=", ".join(dict.fromkeys(key for key, _ in changed)),
            fix="; ".join(
                [
                    *as_before(run, recipe, {key for key, _ in changed}),
                    "put back what the run was begun with, or start a new run (--name NEW or --run-dir NEW)",
                    _without(run),
                ]
            ),
        )
    return reported


def as_before(run: RunFolder, recipe: Recipe, changed: set[str]) -> list[str]:
    """What to set where rows became other tokens because an earlier version, which began the run, read them
    otherwise; one line each. ``changed``: the keys that name what is other now."""
    from aifactory_train.sources import resolve_model

    if not changed <= {"data.train", "data.eval", "model.base"}:
        return []
    said: list[str] = []
    written = run.config_file.read_text(encoding="utf-8", errors="replace") if run.config_file.is_file() else ""
    if "control_tokens_in_content" not in written and recipe.data.control_tokens_in_content == "as_text":
        said.append(
            "the version that began this run read special tokens inside rows as the template's own: "
            "--set data.control_tokens_in_content=as_tokens"
        )
    if "model.base" in changed and recipe.model.chat_template is None and _named_templates(resolve_model(recipe.model)):
        said.append(
            "an earlier version used the tokenizer's default template for rows with tools too: --set "
            "model.chat_template=FILE, which holds that one (chat_template.jinja of the base)"
        )
    return said


def _named_templates(folder: Path) -> bool:
    """Whether the tokenizer in a model folder has several templates, of which tools choose one."""
    if (folder / "additional_chat_templates").is_dir():
        return True
    config = folder / "tokenizer_config.json"
    return config.is_file() and isinstance(read_json(config, dict).get("chat_template"), list)


def _without(run: RunFolder) -> str:
    return f"where you know that it makes no difference, move {run.path / INPUTS} away: the run then goes on unchecked"


def _differences(
    before: dict[str, Any], now: dict[str, Any], recipe: Recipe
) -> tuple[list[tuple[str, str]], list[str]]:
    changed: list[tuple[str, str]] = []
    reported: list[str] = []
    if before["base"]["config"] != now["base"]["config"]:
        changed.append(("model.base", f"config.json of {recipe.model.base} says something else"))
    old, new = before["base"]["files"], now["base"]["files"]
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            how = "is gone" if name not in new else "was not there" if name not in old else "has other content"
            what = f"{name} of {recipe.model.base} {how}"
            if recipe.adapter.kind == "none" and not name.endswith(".py"):
                reported.append(f"{what} since the run began; all weights come from the checkpoint")
            else:
                changed.append(("model.base", what))
    old, new = before["tokenizer"], now["tokenizer"]
    # Another version of the libraries may write the same file out differently, and the same tokenizer lie in another
    # file.
    same = old["content"] == new["content"] or (old["file"] is not None and old["file"] == new["file"])
    if not same or old["ids"] != new["ids"]:
        changed.append(
            ("model.base", f"the tokenizer of {recipe.model.base} is another one (tokenizer.json, special tokens)")
        )
    if old["template"] != new["template"]:
        key = "model.chat_template" if recipe.model.chat_template else "model.base"
        changed.append((key, "the chat template is another one"))
    if before["data"]["train"] != now["data"]["train"]:
        changed.append(("data.train", "the training rows, or their tokens, are others"))
    # With another data.eval_rows, which may change, other rows are drawn: then there is nothing to compare.
    old, new = before["data"]["eval"], now["data"]["eval"]
    changed.extend(
        ("data.eval", f"the held-out rows '{name}', or their tokens, are others")
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and before["data"]["eval_rows"] == now["data"]["eval_rows"]
    )
    return changed, reported
