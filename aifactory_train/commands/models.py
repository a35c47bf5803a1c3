"""``aifactory models``: will a model train here, and with what. Answers from the table that ``benchmarks/models.py``
wrote, without torch."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent / "model" / "data" / "families.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a model type (llama), an id, or a folder with config.json; none: all")
    parser.add_argument("--json", action="store_true", help="one line of JSON on standard output")


def run(args: argparse.Namespace) -> int:
    from aifactory_train.core import output

    table = json.loads(DATA.read_text(encoding="utf-8"))
    if args.model is None:
        if args.json:
            output.print_json(table)
            return 0
        rows = [[row["family"], row["trains"], _short(row)] for row in table["rows"]]
        output.table(None, ["family", "trains", "LoRA on, or why"], rows)
        print(_versions(table))
        return 0
    answer = about(args.model, table)
    if args.json:
        output.print_json(answer)
    else:
        words = {True: "yes", False: "no", None: "-"}
        print("\n".join(f"{key.replace('_', ' '):22}{words.get(v, v)}" for key, v in answer.items() if v != ""))
        print(_versions(table))
    return 0


def about(model: str, table: dict[str, Any]) -> dict[str, Any]:
    """The row of a model type, of a folder by its ``config.json``, or of an id whose configuration is at hand.

    Raises :class:`UserError` where the family cannot be told, is unknown, or the weights are quantised.
    """
    from aifactory_train.config.quantised_base import check_quantised, quantisation
    from aifactory_train.core.errors import UserError, did_you_mean

    rows = {row["family"]: row for row in table["rows"]}
    config = configuration(model)
    if config is not None:
        check_quantised(quantisation(config), model)
        kind = str(config.get("model_type"))
    else:
        kind = model
    kind = kind if kind in rows else table["aliases"].get(kind, kind)
    if kind in rows:
        return {"model": model, **rows[kind]}
    if config is None and "/" in model:
        method = next((m for m in ("gptq", "awq", "gguf", "fp8", "bnb", "exl2") if m in model.lower()), None)
        if method:
            raise UserError(
                f"by its name the weights of '{model}' are quantised ({method.upper()}), which cannot be trained",
                where="model",
                fix="name the base that it was made from",
            )
        raise UserError(
            f"the configuration of '{model}' is not here, so its family is not known",
            where="model",
            fix="give its model_type, a folder with its config.json, or run 'aifactory fetch' first",
        )
    raise UserError(
        f"no causal language model of transformers {table['versions']['transformers']} that was tried is of the type "
        f"'{kind}'{did_you_mean(kind, [*rows, *table['aliases']])}",
        where="model",
        fix="'aifactory models' lists the families; 'aifactory train' checks any other before it begins",
    )


def configuration(model: str) -> dict[str, Any] | None:
    """``config.json`` of a folder, or of an id in the cache; of an id whose dimensions ship with the package its
    ``model_type`` alone; None where there is none.
    """
    from aifactory_train.core.errors import UserError
    from aifactory_train.core.files import read_json
    from aifactory_train.model import shapes
    from aifactory_train.planning.dimensions import hub_folders

    folder = Path(model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError("no config.json here", where=str(folder), fix="name the folder of a model")
        found: dict[str, Any] = read_json(folder / "config.json", dict)
        return found
    for cached in hub_folders(model, None) if "/" in model else []:
        if (cached / "config.json").is_file():
            return dict(read_json(cached / "config.json", dict))
    shipped = shapes.known().get(model)
    return {"model_type": shipped.family} if shipped is not None else None


def _short(row: dict[str, Any]) -> str:
    return str(row.get("lora") or row.get("why") or "")[:90]


def _versions(table: dict[str, Any]) -> str:
    tried = f"{len(table['rows'])} of {table['classes']} classes, tried with "
    return tried + ", ".join(f"{name} {version}" for name, version in table["versions"].items())
