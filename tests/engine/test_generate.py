"""Greedy decoding equals plain transformers, with left padding, a cache, and the stop token of the recipe."""

from __future__ import annotations

import itertools

import helpers
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aifactory_train.core.errors import UserError
from aifactory_train.evaluation.generate import BATCH_TOKENS, batches, generate
from aifactory_train.model import attention
from aifactory_train.model.causal_lm import CausalLM


def pair(family: str, **more):
    """Our wrapped model and the same weights under transformers' own attention."""
    attention.register()
    more.setdefault("tied", False)  # tied random weights repeat one token
    ours, plain = helpers.tiny_model(family, **more), helpers.tiny_model(family, **more)
    ours.set_attn_implementation(attention.PER_DOCUMENT)
    return CausalLM(ours), plain


def prompts(count: int, seed: int = 5) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    return [torch.randint(4, 400, (n,), generator=generator).tolist() for n in lengths]


def reference(plain, prompt: list[int], new_tokens: int, stops: set[int]) -> list[int]:
    """transformers' generate on one prompt, cut at the first stop token."""
    out = plain.generate(
        torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False, eos_token_id=sorted(stops), pad_token_id=3
    )[0, len(prompt) :].tolist()
    for i, token in enumerate(out):
        if token in stops:
            return out[:i]
    return out


@pytest.mark.parametrize("family", helpers.FAMILIES)
def test_batched_answers_equal_plain_transformers_one_by_one(family):
    ours, plain = pair(family)
    asked = prompts(7)
    found = generate(ours, asked, max_new_tokens=12, stop_ids=[2], pad_id=3, device="cpu", batch=4)
    assert found == [reference(plain, p, 12, {2}) for p in asked]
    assert any(len(set(answer)) > 2 for answer in found)  # not one token repeated


def test_sliding_window_models_generate_beyond_their_window():
    ours, plain = pair("mistral", sliding_window=8)
    asked = prompts(5, seed=9)
    assert max(map(len, asked)) > 16
    found = generate(ours, asked, max_new_tokens=12, stop_ids=[2], pad_id=3, device="cpu")
    assert found == [reference(plain, p, 12, {2}) for p in asked]


def test_stops_at_the_given_tokens_only_and_leaves_them_out():
    ours, plain = pair("llama")
    prompt = prompts(1)[0]
    free = reference(plain, prompt, 10, {2})
    stop = free[4]
    expected = free[: free.index(stop)]
    found = generate(ours, [prompt], max_new_tokens=10, stop_ids=[stop, 2], pad_id=3, device="cpu")[0]
    assert found == expected
    assert stop not in found
    assert generate(ours, [prompt], max_new_tokens=0, stop_ids=[2], pad_id=3, device="cpu") == [[]]


@pytest.mark.parametrize("window", [None, 8])
def test_rows_that_end_leave_the_batch_and_change_no_other_answer(window):
    """Stop tokens that end the answers one after another; layers with a window keep transformers' own cache."""
    ours, plain = pair("mistral", sliding_window=window)
    asked = prompts(12, seed=3)
    free = [reference(plain, p, 16, {2}) for p in asked]
    stops = sorted({answer[k] for k, answer in enumerate(free[:9]) if k < len(answer)} | {2})
    sizes: list[int] = []
    decode = CausalLM.decode
    ours.decode = lambda ids, *rest, **more: sizes.append(len(ids)) or decode(ours, ids, *rest, **more)
    found = generate(ours, asked, max_new_tokens=16, stop_ids=stops, pad_id=3, device="cpu")
    assert found == [reference(plain, p, 16, set(stops)) for p in asked]
    assert len({len(answer) for answer in found}) > 2 and sizes[0] == 12 > sizes[-1], (sizes, "rows have left")
    ours._decode = lambda *rest: decode(ours, *rest)
    alone = [generate(ours, [p], max_new_tokens=16, stop_ids=stops, pad_id=3, device="cpu")[0] for p in asked]
    assert found == alone


@settings(max_examples=60)
@given(st.lists(st.integers(1, 20_000), max_size=150), st.integers(1, 2_000), st.integers(1, 70))
def test_batches_hold_every_prompt_once_within_their_bounds(lengths, new, most):
    found = batches(lengths, new, most)
    assert sorted(i for chosen in found for i in chosen) == list(range(len(lengths)))
    for chosen in found:
        assert 1 <= len(chosen) <= most
        assert len(chosen) == 1 or len(chosen) * (max(lengths[i] for i in chosen) + new) <= BATCH_TOKENS
    widths = [[lengths[i] for i in chosen] for chosen in found]
    assert all(max(a) <= min(b) for a, b in itertools.pairwise(widths)), "like lengths together"


def test_the_cache_equals_a_concatenation_also_beyond_its_room():
    from transformers.cache_utils import DynamicLayer

    from aifactory_train.evaluation.kv_cache import ReservedLayer

    ours, plain = ReservedLayer(5), DynamicLayer()
    generator = torch.Generator().manual_seed(1)
    for step, tokens in enumerate([3, 1, 1, 1, 4, 1]):
        states = [torch.randn(4 if step < 3 else 2, 2, tokens, 8, generator=generator) for _ in range(2)]
        if step == 3:
            for layer in (ours, plain):
                layer.batch_select_indices(torch.tensor([0, 3]))
        for found, expected in zip(ours.update(*states), plain.update(*states), strict=True):
            assert torch.equal(found, expected)
        assert ours.get_seq_length() == plain.get_seq_length()


def test_training_mode_is_restored_and_dropout_is_off_meanwhile():
    ours, _ = pair("llama", attention_dropout=0.5)
    ours.train()
    asked = prompts(2)
    first = generate(ours, asked, max_new_tokens=6, stop_ids=[2], pad_id=3, device="cpu")
    assert ours.training
    assert generate(ours, asked, max_new_tokens=6, stop_ids=[2], pad_id=3, device="cpu") == first


def test_a_prompt_without_tokens_is_refused():
    ours, _ = pair("llama")
    with pytest.raises(UserError, match="without tokens"):
        generate(ours, [[5], []], max_new_tokens=1, stop_ids=[2], pad_id=3, device="cpu")


def test_our_attention_also_serves_transformers_generate():
    """A model loaded with our attention answers through ``model.generate`` too (batched, left padding)."""
    ours, plain = pair("llama")
    asked = prompts(3)
    width = max(map(len, asked))
    ids = torch.tensor([[3] * (width - len(p)) + p for p in asked])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in asked])
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 3}
    with attention.decoding(ours.model):
        found = ours.model.generate(ids, **options)
    assert torch.equal(found, plain.generate(ids, **options))
    assert ours.model.config._attn_implementation == attention.PER_DOCUMENT


def test_a_forward_without_mask_is_refused_where_it_would_be_wrong():
    ours, _ = pair("mistral", sliding_window=8)
    with pytest.raises(ValueError, match="attention_mask"), attention.decoding(ours.model):
        ours.model(torch.randint(4, 400, (1, 20)))
    with pytest.raises(ValueError, match="documents"):  # a mask would not be looked at: padding would count as text
        ours.model(torch.randint(4, 400, (1, 20)), attention_mask=torch.ones(1, 20))
