"""The base with stretched rotary positions (``model.rope_scaling``): a model folder like any other, in the cache, whose
configuration says so and whose other files are links to the base's; everything downstream reads it as the base model,
and so do those who get the export.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.core.errors import UserError
from aifactory_train.core.files import foreign, read_json, write_json

if TYPE_CHECKING:
    from aifactory_train.config.rope_block import RopeScalingConfig

_KEY = "model.rope_scaling"


def scaled(folder: Path, settings: RopeScalingConfig, *, trust_remote_code: bool = False) -> Path:
    """The model folder with the scaling of ``settings``, built in the cache where it is not there yet; ``folder``
    itself where its configuration says the same.

    Raises :class:`UserError` for a model without rotary positions or with other ones in each kind of layer, and where
    the base has another scaling of its own.
    """
    from aifactory_train.config.loading import cache_dir

    rope, original = _own(folder, trust_remote_code)
    wanted = settings.parameters(original)
    if rope.get("rope_type", "default") != "default":
        if {key: rope.get(key) for key in wanted} == wanted:
            return folder
        own = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
        raise UserError(
            f"the base has a scaling of its own: {json.dumps(own)}",
            where=_KEY,
            fix="leave model.rope_scaling out, or choose a base without one",
        )
    place = f"{folder.resolve()}\0{json.dumps(wanted, sort_keys=True)}\0".encode()
    digest = hashlib.sha256(place + (folder / "config.json").read_bytes())
    for path in sorted(folder.iterdir()):
        digest.update(f"{path.name}|{path.resolve()}\n".encode())
    root = cache_dir() / "rope"
    target = root / f"{folder.name}-{digest.hexdigest()[:16]}"
    if (target / "config.json").is_file():
        return target
    root.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(dir=root, prefix=f".{target.name}-"))
    try:
        for path in folder.iterdir():
            if path.name != "config.json":
                (scratch / path.name).symlink_to(path.resolve())
        write_json(scratch / "config.json", _configuration(folder, rope, wanted, settings.positions(original)))
        try:
            os.replace(scratch, target)
        except OSError:
            if not (target / "config.json").is_file():  # another rank was faster with the same content: use that
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _own(folder: Path, trust_remote_code: bool) -> tuple[dict[str, Any], int]:
    """``rope_parameters`` of the model in ``folder``, and the positions that it was trained on."""
    from transformers import AutoConfig

    with foreign(str(folder), "no usable model configuration"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    text = config.get_text_config()
    rope, length = getattr(text, "rope_parameters", None), getattr(text, "max_position_embeddings", None)
    if not rope or not length:
        raise UserError(
            f"a model of type {text.model_type} has no rotary positions that could be stretched",
            where=_KEY,
            fix="leave model.rope_scaling out, or choose another base",
        )
    if any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            f"a model of type {text.model_type} has other positions in each kind of layer ({', '.join(rope)})",
            where=_KEY,
            fix="leave model.rope_scaling out, or choose another base",
        )
    return rope, int(rope.get("original_max_position_embeddings") or length)


def _configuration(folder: Path, rope: dict[str, Any], wanted: dict[str, Any], positions: int) -> dict[str, Any]:
    """``config.json`` of the base with the scaling in it."""
    tree: dict[str, Any] = read_json(folder / "config.json", dict)
    text = tree["text_config"] if isinstance(tree.get("text_config"), dict) else tree
    kept = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if rope.get(key) is not None}
    text.pop("rope_scaling", None)
    text |= {"rope_parameters": {**kept, **wanted}, "max_position_embeddings": positions}
    return tree
