"""The random-number states of one rank, as a checkpoint keeps them."""

from __future__ import annotations

import random
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aifactory_train.core.files import parse_json
from aifactory_train.parallel.layout import state_file
from aifactory_train.parallel.storage import json_bytes, read_tree
from aifactory_train.private import vault

#: Under which key a rank's file keeps them.
RANDOM = "random"


def random_state(device: str) -> dict[str, Any]:
    """Every generator of this process, as JSON values."""
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    state = {
        "python": [version, list(internal), gauss],
        "numpy": [kind, [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
    }
    if device != "cpu":
        state["device"] = torch.cuda.get_rng_state(device).numpy().tobytes().hex()
    return state


def set_random_state(state: dict[str, Any], device: str) -> None:
    """The inverse of :func:`random_state`."""

    def tensor(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray(bytes.fromhex(text)), dtype=torch.uint8)

    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensor(state["torch"]))
    if device != "cpu" and "device" in state:
        torch.cuda.set_rng_state(tensor(state["device"]), device)


def packed_random_state(state: dict[str, Any]) -> torch.Tensor:
    """:func:`random_state` as compressed JSON, uint8 ``[bytes]``."""
    return torch.frombuffer(bytearray(zlib.compress(json_bytes(state))), dtype=torch.uint8)


def read_random_state(folder: Path, rank: int, form: int) -> dict[str, Any]:
    """What ``rank`` kept in a checkpoint of format ``form``."""
    if form == 1:
        return read_tree(folder, f"rank-{rank:05d}.json")["random"]
    with vault.open_tensors(folder / state_file(rank)) as shard:
        raw = shard.get_tensor(RANDOM).numpy().tobytes()
    return parse_json(zlib.decompressobj().decompress(raw, 1 << 20), folder / state_file(rank), dict)
