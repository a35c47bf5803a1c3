"""What may change between two attempts of a run, and what would make it another run."""

from __future__ import annotations

import hashlib
import json
import os
from typing import Any

from aifactory_train.config.loading import PATH_KEYS
from aifactory_train.core.errors import UserError

#: Keys that may differ between attempts: how the run is carried out and what it writes, not what it computes.
MAY_CHANGE = (
    "about.",
    "parallel.",
    "kernels.",
    "checkpoint.",
    "logging.",
    "export.",
    "eval.",
    "guard.",
    "record.",
    "tracking.",
    "id",
    "model.licence",
    "model.options",
    "model.attention",
    "data.workers",
    "data.batching",
    "data.eval_rows",
    "train.grad_accum",
    "train.micro_batch_tokens",
    "train.loss_chunk_tokens",
)
#: Keys that decide what rows become: digests of tokens and template, which are compared too, say whether anything
#: changed.
SEEN_IN_TOKENS = ("data.control_tokens_in_content", "model.chat_template")
#: Keys that prolong a run: allowed where the steps already made would have had the same learning rates.
PROLONG = ("train.epochs", "train.max_steps")


def may_change(key: str) -> bool:
    return any(key == free or (free.endswith((".", "options")) and key.startswith(free)) for free in MAY_CHANGE)


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; elements of lists by their number."""
    if isinstance(tree, dict) and tree:
        items = tree.items()
    elif isinstance(tree, list) and tree:
        items = enumerate(tree)  # type: ignore[assignment]
    else:
        return {prefix.rstrip("."): tree}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat.update(flatten(value, f"{prefix}{key}."))
    return flat


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """``(key, value before, value now)`` of every difference, sorted by key; a missing key counts as None."""
    old, new = flatten(before), flatten(now)
    return [
        (key, old.get(key), new.get(key)) for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)
    ]


def check_changes(before: dict[str, Any], now: dict[str, Any], *, same_rates: bool) -> list[str]:
    """The lines of the diff. Raises :class:`UserError` with it where a change alters the meaning of the run.

    ``same_rates``: the learning rates of the steps already made are the same under both configurations.
    """
    lines, refused = [], []
    for key, old, new in changes(before, now):
        if _is_path(key) and _same_place(old, new):
            continue
        line = f"{key}: {old} -> {new}"
        lines.append(line)
        moved = _is_path(key) and _moved(old, new)
        allowed = may_change(key) or key in SEEN_IN_TOKENS
        if not allowed and not moved and not (key in PROLONG and same_rates):
            refused.append(key)
    if refused:
        fix = "undo the change, or start a new run (--run-dir NEW)"
        if set(refused) <= set(PROLONG):
            fix += (
                "; schedules whose length decides the rate cannot be prolonged, 'constant' can (with "
                "train.warmup_steps)"
            )
        raise UserError(
            "the configuration changed in ways that change what the run computes:\n    " + "\n    ".join(lines),
            where=", ".join(refused),
            fix=fix,
        )
    return lines


def _is_path(key: str) -> bool:
    parts = tuple(key.split("."))
    return parts in PATH_KEYS or (parts[0] == "data" and parts[1] in ("train", "eval") and parts[-1] == "source")


def _same_place(old: Any, new: Any) -> bool:
    """Whether ``new`` is the absolute form of ``old``, which an earlier version kept as it was written, or a link to
    it.
    """
    if not isinstance(old, str) or not isinstance(new, str) or not os.path.isabs(new):
        return False
    if not os.path.isabs(old):
        return os.path.abspath(os.path.expanduser(old)) == new
    return os.path.exists(old) and os.path.exists(new) and os.path.samefile(old, new)


def _moved(old: Any, new: Any) -> bool:
    """Whether nothing lies at the path ``old`` any more and ``new`` has the same name: the project was moved or copied
    elsewhere.
    """
    from aifactory_train.sources import parse

    if not isinstance(old, str) or not isinstance(new, str) or not os.path.isabs(new):
        return False
    gone = parse(old).kind == "local" and not os.path.exists(os.path.expanduser(old))
    return gone and os.path.basename(os.path.normpath(old)) == os.path.basename(new)


def config_digest(tree: dict[str, Any]) -> str:
    """SHA-256 of the configuration without the keys that may change between attempts (see :func:`changes`)."""
    kept = {key: value for key, value in flatten(tree).items() if not may_change(key)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True, default=str).encode()).hexdigest()
