"""Attention stays inside each document: equal to running each document alone, and its work grows with document
length.
"""

from __future__ import annotations

import sys
from types import ModuleType

import helpers
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from aifactory_train.core.errors import UserError
from aifactory_train.model import attention, attention_choice
from aifactory_train.model.attention import Documents
from aifactory_train.model.causal_lm import CausalLM

LENGTHS = [17, 1, 40, 5, 33]


def documents(lengths: list[int]) -> Documents:
    return Documents.of(torch.tensor([0, *lengths]).cumsum(0), "cpu")


def positions_of(lengths: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths]).unsqueeze(0)


def packed_model(family: str, **more) -> CausalLM:
    attention.register()
    model = helpers.tiny_model(family, **more)
    model.set_attn_implementation(attention.PER_DOCUMENT)
    return CausalLM(model)


def logits_of(wrapped: CausalLM, ids: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """``[T, V]`` from the packed path."""
    shape = ids.shape
    hidden = wrapped.hidden(ids, positions_of(lengths).reshape(shape), documents(lengths))
    return wrapped.logit_scale * hidden @ wrapped.output_weight.t()


@pytest.mark.parametrize("family", helpers.FAMILIES)
def test_packed_logits_equal_those_of_each_document_alone(family):
    wrapped = packed_model(family)
    plain = helpers.tiny_model(family)  # the same seed, transformers' own attention
    assert plain.config._attn_implementation == "sdpa"
    ids = torch.randint(4, 400, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        packed = logits_of(wrapped, ids, LENGTHS)
        alone = torch.cat([plain(part).logits[0] for part in ids.split(LENGTHS, dim=1)])
    assert alone.abs().max() > 0.1  # there is something to compare
    assert (packed - alone).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ("llama", "gemma3"))
def test_padded_rows_are_documents_with_a_tail(family):
    """``[B, T]`` with padded tails: each row's real part equals the row alone."""
    wrapped, plain = packed_model(family), helpers.tiny_model(family)
    real, width = [9, 24, 16], 24
    generator = torch.Generator().manual_seed(2)
    ids = torch.full((3, width), 3)
    lengths, position_ids = [], torch.zeros((3, width), dtype=torch.long)
    for i, n in enumerate(real):
        ids[i, :n] = torch.randint(4, 400, (n,), generator=generator)
        position_ids[i, :n] = torch.arange(n)
        lengths += [n, width - n] if n < width else [n]
    with torch.no_grad():
        hidden = wrapped.hidden(ids, position_ids, documents(lengths)).view(3, width, -1)
        for i, n in enumerate(real):
            alone = plain(ids[i : i + 1, :n]).logits[0]
            assert (hidden[i, :n] @ wrapped.output_weight.t() - alone).abs().max() <= 1e-5


def test_no_information_and_no_gradient_crosses_a_boundary():
    wrapped = packed_model("llama")
    ids = torch.randint(4, 400, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(3))
    changed = ids.clone()
    changed[0, : LENGTHS[0]] = torch.randint(4, 400, (LENGTHS[0],), generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        before, after = logits_of(wrapped, ids, LENGTHS), logits_of(wrapped, changed, LENGTHS)
    assert not torch.equal(before[: LENGTHS[0]], after[: LENGTHS[0]])
    assert torch.equal(before[LENGTHS[0] :], after[LENGTHS[0] :])

    embedded = wrapped.model.get_input_embeddings()(ids).detach().requires_grad_(True)
    out = wrapped.backbone(
        inputs_embeds=embedded, position_ids=positions_of(LENGTHS), use_cache=False, documents=documents(LENGTHS)
    )
    start, end = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    out.last_hidden_state[0, start:end].pow(2).sum().backward()
    inside = embedded.grad[0, start:end].abs().max()
    assert inside > 0
    assert embedded.grad[0, :start].abs().max() == 0
    assert embedded.grad[0, end:].abs().max() == 0


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]),
    scaling=st.sampled_from([None, 0.37]),
    seed=st.integers(0, 2**16),
)
def test_any_split_equals_a_block_diagonal_mask(lengths, heads, scaling, seed):
    """Values and gradients in fp64 against plain softmax with an explicit mask."""
    total, (h, kv), dim = sum(lengths), heads, 8
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, h, total, dim, generator=generator, dtype=torch.float64, requires_grad=True)
    k, v = (
        torch.randn(1, kv, total, dim, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    out, _ = attention.per_document_attention(
        torch.nn.Module(), q, k, v, None, scaling=scaling, documents=documents(lengths)
    )
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = (owner[:, None] == owner[None, :]) & torch.ones(total, total, dtype=torch.bool).tril()
    factor = scaling if scaling is not None else dim**-0.5
    keys, values = (states.repeat_interleave(h // kv, dim=1) for states in (k, v))
    scores = (factor * q @ keys.transpose(2, 3)).masked_fill(~allowed, float("-inf"))
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    upstream = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    ours = torch.autograd.grad(out, (q, k, v), upstream)
    theirs = torch.autograd.grad(expected, (q, k, v), upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


class _Work(TorchFunctionMode):
    """Counts query x key pairs of every SDPA call, and the masks passed."""

    def __init__(self):
        super().__init__()
        self.pairs, self.calls, self.masks = 0, 0, 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            self.calls += 1
            self.pairs += args[0].shape[2] * args[1].shape[2]
            self.masks += kwargs.get("attn_mask") is not None or len(args) > 3
        return function(*args, **kwargs)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operator returns, forward and backward."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, torch.Tensor):
                self.numel = max(self.numel, item.numel())
        return out


def attention_pairs(wrapped: CausalLM, lengths: list[int]) -> int:
    ids = torch.randint(4, 400, (1, sum(lengths)))
    with torch.no_grad(), _Work() as work:
        logits_of(wrapped, ids, lengths)
    assert work.calls == 2 * len(lengths)  # layers x documents
    assert work.masks == 0
    return work.pairs


def test_work_grows_with_document_length_not_with_pack_length():
    wrapped = packed_model("llama")
    one = attention_pairs(wrapped, [32])
    assert attention_pairs(wrapped, [32] * 8) == 8 * one  # eight documents: eight times the work, not sixty-four
    assert attention_pairs(wrapped, [256]) == 64 * one  # one document of the same total: the square


def test_no_tensor_of_pack_length_squared_exists():
    """Forward and backward of a pack of 64 documents: nothing of the size of a [T, T] mask is ever made."""
    wrapped = packed_model("llama")
    wrapped.loss_rows = 32  # so that the logits chunk is not the largest tensor
    lengths = [16] * 64
    total = sum(lengths)
    ids = torch.randint(4, 400, (1, total))
    with _Largest() as largest:
        positions = torch.arange(total)[positions_of(lengths)[0] > 0]
        wrapped(ids, positions_of(lengths), documents(lengths), positions, ids[0, positions]).backward()
    assert largest.numel < total * total / 4, largest.numel


def test_choice_of_backend_on_a_cpu():
    assert attention_choice.choose("auto", "cpu")[0] == attention.PER_DOCUMENT
    assert attention_choice.choose("per_document", "cuda")[0] == attention.PER_DOCUMENT
    for setting in ("varlen", "triton"):
        with pytest.raises(UserError, match="needs a GPU"):
            attention_choice.choose(setting, "cpu")


def test_kernels_without_fp32_are_not_chosen_for_it(monkeypatch):
    """On a GPU without bf16, or where the recipe asks for fp32."""
    monkeypatch.setattr(attention.compat, "varlen_attention", lambda: plain_varlen)
    assert attention_choice.choose("auto", "cuda:0", torch.bfloat16)[0] == attention.VARLEN
    assert attention_choice.choose("auto", "cuda:0", torch.float32)[0] == attention.PER_DOCUMENT
    for setting in ("varlen", "flash"):
        with pytest.raises(UserError, match="in bf16 only"):
            attention_choice.choose(setting, "cuda:0", torch.float32)


# ---- kernels that exist on GPUs only: what we hand them, and what we make of what they return


def plain_varlen(q, k, v, bounds, _bounds, longest, _longest, *, scale=None, window_size=(-1, 0), **_):
    """What variable-length kernels compute, written out; ``[N, H, D]`` and ``[N, H_kv, D]``."""
    assert longest == int(bounds.diff().max()) and q.is_contiguous() and bounds.dtype == torch.int32
    out = []
    for part in zip(*(t.transpose(0, 1).split(bounds.diff().tolist(), dim=1) for t in (q, k, v)), strict=True):
        n = part[0].shape[1]
        seen = torch.ones(n, n, dtype=torch.bool).tril()
        if window_size[0] >= 0:
            seen = seen.triu(-window_size[0])
        out.append(F.scaled_dot_product_attention(*part, attn_mask=seen, scale=scale, enable_gqa=True))
    return torch.cat(out, dim=1).transpose(0, 1)


@pytest.mark.parametrize("scaling", [None, 0.1])
@pytest.mark.parametrize("gqa", [True, False])
@pytest.mark.parametrize("kernel", ["varlen", "flash"])
def test_variable_length_kernels_agree_with_each_document_alone(kernel, gqa, scaling, monkeypatch):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 12, 8) for heads in (4, 2, 2))
    cut = documents([5, 7, 12])
    if kernel == "varlen":

        def attend(q, k, v, *bounds, is_causal, enable_gqa=False):
            assert is_causal and (enable_gqa or q.shape[1] == k.shape[1])
            return plain_varlen(q, k, v, *bounds)

        monkeypatch.setattr(attention.compat, "varlen_attention", lambda: attend)
        monkeypatch.setattr(attention.compat, "varlen_supports_gqa", lambda: gqa)
        function = attention.varlen_attention
    else:
        package = ModuleType("flash_attn")
        package.flash_attn_varlen_func = lambda *args, dropout_p, softmax_scale, causal, **more: plain_varlen(  # type: ignore[attr-defined]
            *args, scale=softmax_scale, **more
        )
        monkeypatch.setitem(sys.modules, "flash_attn", package)
        function = attention.flash_attention
    module = torch.nn.Module()
    found, _ = function(module, query, key, value, None, scaling=scaling, documents=cut)
    wanted, _ = attention.per_document_attention(module, query, key, value, None, scaling=scaling, documents=cut)
    assert found.shape == (2, 12, 4, 8)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    how = {"scaling": scaling, "documents": cut, "sliding_window": 6}
    found, _ = function(module, query, key, value, None, **how)
    narrow, _ = attention.per_document_attention(module, query, key, value, None, **how)
    torch.testing.assert_close(found, narrow, rtol=1e-5, atol=1e-6)
    assert (narrow - wanted).abs().max() > 0.01


def test_variable_length_kernels_follow_autocast_as_sdpa_does(monkeypatch):
    """Rotary embeddings leave queries and keys in fp32 under autocast, values are bf16: the kernels take one type, and
    no fp32.
    """
    seen = []

    def attend(q, k, v, *bounds, is_causal, enable_gqa=False):
        seen.append({q.dtype, k.dtype, v.dtype})
        return plain_varlen(q, k, v, *bounds)

    monkeypatch.setattr(attention.compat, "varlen_attention", lambda: attend)
    query, key, value = (torch.randn(1, heads, 12, 8) for heads in (4, 2, 2))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = attention.varlen_attention(
            torch.nn.Module(), query, key, value.bfloat16(), None, documents=documents([5, 7])
        )
    assert seen == [{torch.bfloat16}] and found.dtype == torch.bfloat16
    attention.varlen_attention(torch.nn.Module(), query, key, value, None, documents=documents([5, 7]))
    assert seen[1:] == [{torch.float32}]


def test_dropout_is_not_left_out_in_silence():
    states = torch.randn(1, 2, 4, 8)
    with pytest.raises(UserError, match=r"drops 0\.1 of its attention"):
        attention.varlen_attention(
            torch.nn.Module(), states, states, states, None, dropout=0.1, documents=documents([4])
        )
