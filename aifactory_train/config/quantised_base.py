"""Whether the weights of a base are quantised, by its own configuration, and whether such a base can be trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aifactory_train.core.errors import UserError

#: The one form of quantised weights that an adapter can be trained over: what ``adapter.quantise_base: nf4`` makes.
FOUR_BIT = "bitsandbytes, 4 bits"


def quantisation(config: Mapping[str, Any]) -> str | None:
    """How the weights that belong to a ``config.json`` are quantised, in words; None where they are not."""
    for tree in (config, config.get("text_config")):
        for key in ("quantization_config", "compression_config"):
            found = tree.get(key) if isinstance(tree, Mapping) else None
            if not found:
                continue
            if not isinstance(found, Mapping):
                return repr(found)[:60]
            if found.get("load_in_4bit") is True and found.get("quant_method", "bitsandbytes") == "bitsandbytes":
                return FOUR_BIT
            return str(found.get("quant_method") or "method not named")[:60]
    return None


def check_quantised(how: str | None, where: str, quantise_base: str | None = None, copies: Sequence[str] = ()) -> None:
    """Refuse a base whose weights are quantised ``how`` (:func:`quantisation`): libraries that do not know the method
    take the stored numbers for weights. ``quantise_base``: the recipe's, None where it is not known; ``copies``: bases
    that hold the same weights as floating-point numbers."""
    if how is None or (how == FOUR_BIT and quantise_base != "none"):
        return
    fix = "name the base that it was made from, whose weights are floating-point numbers; where these are, take "
    fix += "quantization_config out of config.json"
    if copies:
        fix = f"--set model.base={copies[0]}, which holds them as floating-point numbers"
    raise UserError(
        f"its configuration says that the weights are quantised ({how}), and such weights cannot be trained",
        where=where,
        fix="--set adapter.kind=lora --set adapter.quantise_base=nf4" if how == FOUR_BIT else fix,
    )
