"""The chunked loss equals cross-entropy on full logits, and full logits never exist."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from aifactory_train.model.loss import (
    CHUNK_BYTES,
    GPU_CHUNK_BYTES,
    chunk_rows,
    document_sums,
    linear_cross_entropy,
)


def case(n: int, dim: int, vocabulary: int, seed: int = 0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, dim, generator=generator).to(dtype).requires_grad_(True)
    weight = (0.3 * torch.randn(vocabulary, dim, generator=generator)).to(dtype).requires_grad_(True)
    return hidden, weight, torch.randint(0, vocabulary, (n,), generator=generator)


def reference(hidden, weight, labels, scale):
    """fp64 cross-entropy on full logits: value, gradients, and the NLL of each row."""
    h, w = (t.detach().double().requires_grad_(True) for t in (hidden, weight))
    nll = F.cross_entropy(scale * h @ w.t(), labels, reduction="none")
    nll.sum().backward()
    return nll.detach(), h.grad, w.grad


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    vocabulary=st.integers(2, 90),
    rows=st.integers(1, 50),
    scale=st.sampled_from([1.0, 0.25, 3.0]),
    upstream=st.sampled_from([1.0, -0.5, 1e-3]),
    seed=st.integers(0, 2**16),
    kernels=st.booleans(),
)
def test_value_and_gradients_equal_cross_entropy_on_full_logits(n, vocabulary, rows, scale, upstream, seed, kernels):
    hidden, weight, labels = case(n, 16, vocabulary, seed)
    loss = linear_cross_entropy(hidden, weight, labels, scale=scale, rows=rows, kernels=kernels)
    (upstream * loss).backward()
    nll, grad_hidden, grad_weight = reference(hidden, weight, labels, scale)
    assert loss.dtype == torch.float32
    assert abs(loss.item() - nll.sum().item()) <= 2e-6 * max(1.0, nll.sum().item())
    torch.testing.assert_close(hidden.grad.double(), upstream * grad_hidden, rtol=1e-4, atol=2e-5 * abs(upstream))
    torch.testing.assert_close(weight.grad.double(), upstream * grad_weight, rtol=1e-4, atol=2e-5 * abs(upstream))
    each = linear_cross_entropy(hidden, weight, labels, reduction="none", scale=scale, rows=rows, kernels=kernels)
    torch.testing.assert_close(each.detach().double(), nll, rtol=1e-5, atol=1e-5)


def test_frozen_weight_or_frozen_hidden_get_no_gradient_and_no_work():
    hidden, weight, labels = case(12, 8, 30)
    weight.requires_grad_(False)
    linear_cross_entropy(hidden, weight, labels, rows=5).backward()
    assert weight.grad is None
    _, expected, _ = reference(hidden, weight, labels, 1.0)
    torch.testing.assert_close(hidden.grad.double(), expected, rtol=1e-4, atol=1e-5)


def test_bf16_stays_within_its_rounding():
    hidden, weight, labels = case(64, 32, 200, dtype=torch.bfloat16)
    loss = linear_cross_entropy(hidden, weight, labels, rows=16)
    loss.backward()
    nll, grad_hidden, grad_weight = reference(hidden, weight, labels, 1.0)
    assert abs(loss.item() - nll.sum().item()) <= 2e-3 * nll.sum().item()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    for ours, exact in ((hidden.grad, grad_hidden), (weight.grad, grad_weight)):
        assert (ours.double() - exact).norm() <= 2e-2 * exact.norm()


@pytest.mark.parametrize("kernels", [False, True])
def test_bf16_gradients_are_scaled_by_the_number_itself(kernels):
    """One over a step's tokens is 0.2 % off in bf16, but the product must not know."""
    labels = case(256, 32, 200)[2]
    for units in (385, 1000, 12345):
        found = []
        for scale in (1.0, 1 / units):
            hidden, weight, _ = case(256, 32, 200, dtype=torch.bfloat16)
            (linear_cross_entropy(hidden, weight, labels, kernels=kernels) * scale).backward()
            found.append((hidden.grad.double(), weight.grad.double()))
        for plain, scaled in zip(*found, strict=True):
            assert abs(float((plain * scaled).sum() / plain.square().sum()) * units - 1) < 5e-4


def test_large_logits_do_not_overflow():
    hidden, weight, labels = case(8, 4, 20)
    big = (hidden.detach() * 1000).requires_grad_(True)
    loss = linear_cross_entropy(big, weight, labels, rows=3)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(big.grad).all()
    assert loss.item() == pytest.approx(reference(big, weight, labels, 1.0)[0].sum().item(), rel=1e-6)


def test_no_supervised_position_is_zero_with_a_connected_graph():
    hidden, weight, _ = case(0, 8, 30)
    loss = linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long))
    assert loss.item() == 0
    loss.backward()  # a rank without supervised tokens still takes part in the reduction
    assert weight.grad.abs().max() == 0
    assert linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.long), reduction="none").shape == (0,)


class _Largest(TorchDispatchMode):
    """The largest tensor whose trailing dimension is the vocabulary, over every operator's results."""

    def __init__(self, vocabulary: int):
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, torch.Tensor) and item.dim() and item.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, item.numel() // self.vocabulary)
        return out


def test_the_full_logits_tensor_never_exists():
    n, dim, vocabulary, rows = 512, 8, 1009, 32
    hidden, weight, labels = case(n, dim, vocabulary)
    with _Largest(vocabulary) as largest:
        linear_cross_entropy(hidden, weight, labels, rows=rows).backward()
        linear_cross_entropy(hidden, weight, labels, reduction="none", rows=rows).sum().backward()
    # weight.t() and grad.t() are views of [V, D]-shaped data: the only other tensors with V columns have dim or rows
    # rows
    assert largest.rows <= rows
    with _Largest(vocabulary) as naive:  # the probe sees it where it does exist
        F.cross_entropy(hidden @ weight.t(), labels).backward()
    assert naive.rows == n


def test_default_chunk_is_bounded_in_bytes():
    for vocabulary in (400, 32_000, 49_152, 128_256, 262_144):
        rows = chunk_rows(vocabulary)
        assert rows >= 32
        assert rows * vocabulary * 4 <= max(CHUNK_BYTES, 32 * vocabulary * 4)
    assert chunk_rows(1000, 7) == 7


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_on_a_gpu_a_chunk_hides_the_traffic_of_the_weights_gradient(monkeypatch, reduction):
    """65 rows of a 256k vocabulary were 4 % of the machine's balance; loss_chunk_tokens still decides where it is
    given.
    """
    for vocabulary in (400, 32_000, 128_256, 151_936, 262_144):
        rows = chunk_rows(vocabulary, device="cuda")
        assert 1024 <= rows <= 4096 and rows & (rows - 1) == 0
        assert rows == 1024 or rows * vocabulary * 4 <= GPU_CHUNK_BYTES
        known = chunk_rows(vocabulary, device="cuda:1")
        assert known >= 1024
    assert chunk_rows(128_256, 300, device="cuda") == 300
    # what is asked of the operator is what chunk_rows says of the hidden states' device
    seen = []
    monkeypatch.setattr("aifactory_train.model.loss.chunk_rows", lambda v, rows, device: seen.append(device.type) or 7)
    name = "linear_cross_entropy" if reduction == "sum" else "linear_logps"
    asked = {}
    monkeypatch.setattr(
        f"aifactory_train.kernels.ops.{name}", lambda h, w, t, **how: asked.update(how) or torch.zeros(())
    )
    linear_cross_entropy(*case(5, 8, 30), reduction=reduction, scale=2.0, kernels=True)
    assert asked == {"scale": 2.0, "softcap": None, "chunk_size": 7} and seen == ["cpu"]


@pytest.mark.parametrize("kernels", [False, True])
def test_rows_weigh_what_the_objective_says(kernels):
    """Per-token and per-document likelihoods: gradients of a loss that weighs them unequally are those of full
    logits.
    """
    counts, factors = [5, 1, 9], torch.tensor([0.3, -2.0, 1.5])
    for dtype, close in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        hidden, weight, labels = case(15, 16, 50, dtype=dtype)
        h, w = (t.detach().double().requires_grad_(True) for t in (hidden, weight))
        full = F.cross_entropy(1.5 * h @ w.t(), labels, reduction="none")
        plain = torch.stack([part.sum() for part in full.split(counts)])
        how = {"reduction": "documents", "counts": counts, "scale": 1.5, "rows": 4, "kernels": kernels}
        found = linear_cross_entropy(hidden, weight, labels, **how)
        torch.testing.assert_close(found.double(), plain, rtol=close, atol=close)
        (found * factors).sum().backward()
        (plain * factors).sum().backward()
        for ours, exact in ((hidden.grad, h.grad), (weight.grad, w.grad)):
            assert ours.dtype == dtype and (ours.double() - exact).norm() <= close * exact.norm()
    assert linear_cross_entropy(hidden[:0], weight, labels[:0], reduction="documents", counts=[]).shape == (0,)


def test_a_frozen_weight_of_weighed_rows_gets_no_gradient():
    hidden, weight, labels = case(12, 8, 30)
    weight.requires_grad_(False)
    with _Largest(8) as largest:  # [V, D] would be the weight's gradient
        linear_cross_entropy(hidden, weight, labels, reduction="none", rows=5).sum().backward()
    assert weight.grad is None and largest.rows <= 12
    torch.testing.assert_close(hidden.grad.double(), reference(hidden, weight, labels, 1.0)[1], rtol=1e-4, atol=1e-5)


# ---- sums over documents


class _Launched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function._schema.name)
        return function(*args, **(kwargs or {}))


def test_on_a_device_one_operator_sums_all_documents() -> None:
    """Each document alone would be a launch of its own, and an index_add adds in no fixed order."""
    launched = []
    for counts in ([5, 0, 3], [2] * 200):
        each = torch.empty(sum(counts), device="meta", requires_grad=True)
        with _Launched() as seen:
            found = document_sums(each, counts)
            found.sum().backward()
        assert found.shape == (len(counts),) and each.grad is not None
        launched.append(len(seen.names))
        assert "aten::segment_reduce" in seen.names and not any("index_add" in name for name in seen.names)
    assert launched[0] == launched[1] < 20, launched


def test_both_ways_to_sum_documents_agree() -> None:
    torch.manual_seed(0)
    counts = [7, 1, 0, 900, 12]
    each = torch.rand(sum(counts), requires_grad=True)
    weights = torch.rand(len(counts))
    (document_sums(each, counts) * weights).sum().backward()
    other = each.detach().clone().requires_grad_()
    sums = torch.segment_reduce(other, "sum", lengths=torch.tensor(counts), unsafe=True)
    (sums * weights).sum().backward()
    torch.testing.assert_close(sums, document_sums(each, counts), rtol=1e-5, atol=0)
    assert torch.equal(each.grad, other.grad)
