"""What lies in a model folder, looked at before any library is given it: configuration and weight files are what they
must be.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

from aifactory_train.config.quantised_base import check_quantised, quantisation
from aifactory_train.core.errors import UserError
from aifactory_train.core.files import parse_json, read_json

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
_AGAIN = "take the model folder anew from where it comes from, or save it again with save_pretrained"
#: Safetensors allows no longer header.
_HEADER = 100_000_000
#: Layers that a configuration may claim whatever the files hold: libraries build a list entry for each.
_LAYERS = 10_000
#: Types of weights that are numbers by themselves; those of fewer bits mean nothing without their scales.
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_COUNTS = re.compile(r"n_?layers?|num_(hidden_|decoder_|encoder_)?layers|num_nextn_predict_layers")


def check_weight_index(path: Path) -> None:
    """Refuse a model folder whose index of shards names anything but safetensors files inside the folder.

    transformers opens whatever an index names, other forms through pickle, and from where it says.
    """
    for index in sorted(path.glob("*.safetensors.index.json")):
        places = _places(index)
        for name in sorted(set(places.values())):
            why = None
            if name.startswith("/") or "\\" in name or "\0" in name or ".." in PurePosixPath(name).parts:
                why = "lies outside the model folder"
            elif not name.endswith(".safetensors"):
                why = "is not a safetensors file (pickle files are not loaded)"
            if why is not None:
                tensor = next(t for t, file in places.items() if file == name)
                raise UserError(
                    f"weight_map names {name[:200]!r} for {tensor[:200]}, which {why}",
                    where=str(index),
                    fix="use the model as its publisher gives it, or convert the weights with save_pretrained",
                )


def _places(index: Path) -> dict[str, str]:
    try:
        places = read_json(index, {"weight_map": dict})["weight_map"]
        if not all(isinstance(name, str) for name in places.values()):
            raise UserError("a file's name is not text")
    except UserError as error:
        raise UserError(
            f"is not an index of weights, a JSON object whose weight_map names a file for each tensor ({error.what})",
            where=str(index),
            fix=_AGAIN,
        ) from None
    return places


def weight_files(folder: Path) -> list[Path]:
    """The files that a model folder's weights are read from, with the index that names them."""
    whole, index = folder / WHOLE, folder / INDEX
    found = {whole} if whole.is_file() else set()
    if index.is_file():
        found |= {index, *(folder / name for name in _places(index).values())}
    return sorted(found) or sorted(folder.glob("*.safetensors"))


def check_contents(folder: Path) -> None:
    """Refuse a configuration that is no object, weight files whose header is damaged, more layers than there are
    tensors, and weights that are quantised otherwise than the 4 bits of bitsandbytes.
    """
    config = read_json(folder / "config.json", dict)
    how = quantisation(config)
    check_quantised(how, str(folder / "config.json"))
    tensors = sum(_tensors(file, any_type=how is not None) for file in weight_files(folder) if file.name != INDEX)
    for key, value in _counts(config):
        if value > max(tensors, _LAYERS):
            raise UserError(
                f"{key} is {value:,}, but the weight files hold {tensors:,} tensors",
                where=str(folder / "config.json"),
                fix=_AGAIN,
            )


def _counts(tree: Any, depth: int = 0) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, (int, float)) and _COUNTS.fullmatch(str(key)):
            found.append((key, value))
        elif isinstance(value, dict) and depth < 4:
            found += _counts(value, depth + 1)
    return found


def _tensors(file: Path, *, any_type: bool) -> int:
    """Number of tensors in a safetensors file, whose header must fit to its size. ``any_type``: weights may be other
    than floating-point numbers of 16 bits or more."""
    if not file.is_file():  # a pipe would be waited for without end
        raise UserError("is missing, or no regular file", where=str(file), fix=_AGAIN)
    try:
        with open(file, "rb") as opened:
            size = file.stat().st_size
            start = opened.read(8)
            length = int.from_bytes(start, "little")
            if start == b"version ":  # https://git-lfs.github.com/spec/v1
                raise UserError("is a pointer of Git LFS, not the file itself", where=str(file), fix="git lfs pull")
            if len(start) < 8 or not 2 <= length <= min(_HEADER, size - 8):
                raise _damaged(file, "its header is longer than the file")
            raw = opened.read(length)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(file), fix=_AGAIN) from None
    header, covered = parse_json(raw, file, dict), 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        at = entry.get("data_offsets") if isinstance(entry, dict) else None
        numbers = isinstance(at, list) and len(at) == 2 and all(type(n) is int for n in at)
        if not numbers or not 0 <= at[0] <= at[1] <= size - 8 - length:  # type: ignore[index]
            raise _damaged(file, f"{name[:200]!r} does not lie inside the file")
        if not isinstance(entry.get("shape"), list) or not isinstance(entry.get("dtype"), str):
            raise _damaged(file, f"{name[:200]!r} has no shape or type")
        if not any_type and name.endswith(".weight") and entry["dtype"] not in _FLOATS:
            raise UserError(
                f"{name[:200]!r} is of type {entry['dtype'][:20]}: quantised weights cannot be trained",
                where=str(file),
                fix="name the base that it was made from, whose weights are floating-point numbers",
            )
        covered += at[1] - at[0]  # type: ignore[index]
    if covered != size - 8 - length:
        raise _damaged(file, f"{size - 8 - length:,} bytes follow its header, its tensors have {covered:,}")
    return len(header) - ("__metadata__" in header)


def _damaged(file: Path, why: str) -> UserError:
    return UserError(f"is not a whole safetensors file: {why}", where=str(file), fix=_AGAIN)
