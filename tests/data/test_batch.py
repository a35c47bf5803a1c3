"""Tensors: shifted labels never cross documents, padding carries nothing, packed and padded hold the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from chat_families import byte_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from aifactory_train.config.schema import Recipe
from aifactory_train.data import collate, prepare


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("batch")
    rows = [{"prompt": "q" * (1 + i % 13), "completion": "a" * (1 + (i * 5) % 17) + str(i)} for i in range(30)]
    (folder / "r.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    recipe = Recipe.model_validate({"model": {"base": "x/y"}, "data": {"train": str(folder / "r.jsonl")}})
    return prepare(recipe, byte_tokenizer(), cache_dir=folder / "cache").train


docs = st.lists(st.integers(0, 20), min_size=1, max_size=6, unique=True)


def pairs(batch) -> list[tuple[int, int, int]]:
    """(input token, position, target) of every supervised place."""
    keep = batch.labels != -100
    return sorted(
        zip(batch.input_ids[keep].tolist(), batch.position_ids[keep].tolist(), batch.labels[keep].tolist(), strict=True)
    )


@settings(max_examples=60, deadline=None)
@given(docs=docs, multiple=st.sampled_from([1, 8, 64]))
def test_packed_and_padded_hold_the_same_targets(data, docs, multiple):
    packed = collate(data, docs, "packed", 0, multiple)
    padded = collate(data, docs, "padded", 0, multiple)
    assert pairs(packed) == pairs(padded)
    assert packed.num_tokens == padded.num_tokens == int(data.lengths[docs].sum())
    assert packed.num_supervised == padded.num_supervised == int(data.supervised[docs].sum())
    assert packed.input_ids.shape[0] == 1 and padded.input_ids.shape[0] == len(docs)
    for batch in (packed, padded):
        assert batch.input_ids.shape[1] % multiple == 0
        assert batch.cu_seqlens[0] == 0 and batch.cu_seqlens[-1] == batch.input_ids.numel()
        assert len(batch.cu_seqlens) == len(docs) + 1 and batch.cu_seqlens.dtype == torch.int32
        assert batch.max_seqlen == int(batch.cu_seqlens.diff().max())


@settings(max_examples=60, deadline=None)
@given(docs=docs)
def test_labels_are_the_next_supervised_token_of_the_same_document(data, docs):
    batch = collate(data, docs, "packed")
    edges = batch.cu_seqlens.tolist()
    for a, b, doc in zip(edges[:-1], edges[1:], docs, strict=True):
        tokens, mask = data.tokens(doc), data.mask(doc)
        assert batch.input_ids[0, a:b].tolist() == tokens.tolist()
        assert batch.position_ids[0, a:b].tolist() == list(range(b - a))
        want = np.append(np.where(mask[1:], tokens[1:], -100), -100)
        assert batch.labels[0, a:b].tolist() == want.tolist()


def test_padding_has_no_label_and_the_pad_id(data):
    batch = collate(data, [0, 1], "padded", 7, 64)
    for row, doc in enumerate((0, 1)):
        tail = slice(int(data.lengths[doc]), None)
        assert (batch.input_ids[row, tail] == 7).all() and (batch.labels[row, tail] == -100).all()


def test_text_only_leaves_out_the_end_of_turn(data):
    full, text = collate(data, [3], "packed"), collate(data, [3], "packed", text_only=True)
    assert full.num_supervised - text.num_supervised == 1
    assert text.num_supervised == data.text_bytes(3)  # a token a byte


def test_no_documents_give_a_batch_without_labels(data):
    batch = collate(data, [], "packed", 5, 8)
    assert batch.num_supervised == batch.num_tokens == 0 and batch.input_ids.tolist() == [[5] * 8]


def test_importing_the_data_package_imports_no_torch():
    import subprocess
    import sys

    code = (
        "import sys, aifactory_train.data.pipeline, aifactory_train.data.sampler, aifactory_train.data.encoder; "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False", "False"]
