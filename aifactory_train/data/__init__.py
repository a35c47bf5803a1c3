"""The data path: read, validate, render, mask, tokenise, cache, sample, collate.

Public names are loaded on first use: numpy and tokenizers with the pipeline, torch only with :class:`Batch` and
:func:`collate`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aifactory_train.data.batch import Batch as Batch
    from aifactory_train.data.batch import collate as collate
    from aifactory_train.data.batch import shifted_labels as shifted_labels
    from aifactory_train.data.pipeline import PreparedData as PreparedData
    from aifactory_train.data.pipeline import prepare as prepare
    from aifactory_train.data.sampler import Cursor as Cursor
    from aifactory_train.data.sampler import Sampler as Sampler
    from aifactory_train.data.sampler import Shares as Shares
    from aifactory_train.data.sampler import split_step as split_step
    from aifactory_train.data.store import TokenDataset as TokenDataset
    from aifactory_train.data.tokenizer import check_vocabulary as check_vocabulary
    from aifactory_train.data.tokenizer import load_tokenizer as load_tokenizer

_WHERE = {
    "Batch": "batch",
    "collate": "batch",
    "shifted_labels": "batch",
    "PreparedData": "pipeline",
    "prepare": "pipeline",
    "Cursor": "sampler",
    "Sampler": "sampler",
    "Shares": "sampler",
    "split_step": "sampler",
    "TokenDataset": "store",
    "check_vocabulary": "tokenizer",
    "load_tokenizer": "tokenizer",
}
__all__ = [
    "Batch",
    "Cursor",
    "PreparedData",
    "Sampler",
    "Shares",
    "TokenDataset",
    "check_vocabulary",
    "collate",
    "load_tokenizer",
    "prepare",
    "shifted_labels",
    "split_step",
]


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
