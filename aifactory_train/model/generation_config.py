"""The base's ``generation_config.json``, in a form that transformers will save.

transformers reads files whose settings contradict each other (a temperature without ``do_sample``) and refuses to write
them once anything was changed, and every export changes the end of turn. So the file is looked at before the first
step: what contradicts the rest is repaired and named, and what is no JSON object at all is refused while nothing is
lost yet.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.core.errors import UserError

if TYPE_CHECKING:
    from transformers import GenerationConfig

NAME = "generation_config.json"

#: Settings that mean nothing without sampling: whoever gives one meant ``do_sample``.
_SAMPLING = {"temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"}
#: Keys that an export sets itself: what the base says of them can contradict nothing.
_REPLACED = {"eos_token_id", "pad_token_id", "transformers_version"}


@dataclass(frozen=True)
class BaseGeneration:
    """What an export starts from. ``repaired`` says in words what was changed; ``loadable``: transformers reads the
    file as it is.
    """

    config: GenerationConfig
    repaired: tuple[str, ...] = ()
    loadable: bool = True

    def describe(self) -> str:
        """One line for people: what was repaired, and what that means for the base itself."""
        text = "; ".join(self.repaired)
        if not self.loadable:
            text += f". Plain transformers does not load this base until its {NAME} is repaired the same way"
        return text


def read_base(folder: Path) -> BaseGeneration:
    """Read and, where transformers would not save it, repair the generation configuration of the model in ``folder``.

    Raises :class:`UserError` for a file that is no JSON object.
    """
    from transformers import GenerationConfig

    if not (folder / NAME).is_file():
        return BaseGeneration(GenerationConfig())
    tree = _read(folder / NAME)
    with _quiet():
        loadable = True
        try:
            config = GenerationConfig.from_pretrained(folder)
        except (
            Exception
        ):  # whatever transformers' checks raise on values of any type: ValueError, TypeError, AttributeError ...
            loadable = False
        else:
            if _saves(tree):
                return BaseGeneration(config)
        kept, dropped = _consistent(tree)
        repaired: list[str] = []
        if _SAMPLING & dropped.keys() and tree.get("do_sample") is None:
            sampled, left = _consistent({**tree, "do_sample": True})
            if len(left) < len(dropped):
                flags = ", ".join(k for k in tree if k in _SAMPLING & dropped.keys() - left.keys())
                repaired.append(f"do_sample: true added, because {flags} is given")
                kept, dropped = sampled, left
        repaired += [
            f"{key}: {json.dumps(value)[:80]} dropped, it contradicts the rest" for key, value in dropped.items()
        ]
        return BaseGeneration(GenerationConfig.from_dict(kept), tuple(repaired), loadable)


def loading(folder: Path) -> dict[str, Any]:
    """Arguments for ``from_pretrained`` where transformers would not load ``folder`` because of its generation
    configuration.
    """
    found = read_base(folder)
    return {} if found.loadable else {"generation_config": found.config}


def _read(path: Path) -> dict[str, Any]:
    fix = f"repair the file, or take it away: {NAME} is only needed for its defaults of generation"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"is not JSON: {error.msg}", where=f"{path}:{error.lineno}", fix=fix) from None
    except (ValueError, RecursionError) as error:  # not UTF-8, a number of thousands of digits, nested without end
        raise UserError(f"is not JSON: {str(error)[:200]}", where=str(path), fix=fix) from None
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path), fix=fix) from None
    if not isinstance(tree, dict):
        raise UserError(f"is not a JSON object but a {type(tree).__name__}", where=str(path), fix=fix)
    return tree


def _saves(tree: dict[str, Any]) -> bool:
    """Whether transformers saves these settings after a change of the end of turn."""
    from transformers import GenerationConfig

    try:
        config = GenerationConfig.from_dict({k: v for k, v in tree.items() if k not in _REPLACED})
        config.validate(strict=True)
        with tempfile.TemporaryDirectory(prefix="aifactory-generation-") as scratch:
            config.save_pretrained(scratch)
    except OSError:
        raise  # of the scratch folder, not of the settings
    except Exception:  # as above: these are transformers' checks of values of any type
        return False
    return True


def _consistent(tree: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``(kept, dropped)``: as many settings as go together. One that is fine only beside a later one gets a second
    try.
    """
    kept: dict[str, Any] = {}
    # the two switches that decide what the others mean come first
    waiting = {k: tree[k] for k in sorted(tree, key=lambda k: k not in ("do_sample", "num_beams"))}
    while True:
        again = {}
        for key, value in waiting.items():
            if _saves({**kept, key: value}):
                kept[key] = value
            else:
                again[key] = value
        if len(again) == len(waiting) or not again:
            return {k: tree[k] for k in tree if k in kept}, again
        waiting = again


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns of every contradiction that is tried here; what is repaired is said once, by us."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(before)
