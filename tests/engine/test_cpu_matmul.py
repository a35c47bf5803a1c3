"""Matrix products by oneDNN are torch's, to the rounding of fp32, and the choice depends on the machine alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aifactory_train.model import cpu_matmul

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
BOTH = ["torch", pytest.param("onednn", marks=pytest.mark.skipif(not HAS_ONEDNN, reason="this torch has no oneDNN"))]


@pytest.fixture(params=BOTH)
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(cpu_matmul, "library", lambda: (request.param, "test"))
    return request.param


@pytest.mark.parametrize("rows,inner,columns", [(1, 1, 1), (0, 8, 3), (7, 33, 5), (64, 16, 192), (130, 192, 16)])
def test_products_are_those_of_double_precision(library: str, rows: int, inner: int, columns: int) -> None:
    torch.manual_seed(rows + inner)
    left, right = torch.randn(rows, inner), torch.randn(columns, inner)
    wanted = left.double() @ right.double().t()
    bound = 2.0**-23 * inner * left.abs().double() @ right.abs().double().t()  # Higham 2002, (3.13)
    assert ((cpu_matmul.by_rows(left, right) - wanted).abs() <= bound).all()
    assert ((cpu_matmul.by_columns(left, right.t().contiguous()) - wanted).abs() <= bound).all()
    # views, as a layer's gradient and a slice of the hidden states are
    assert ((cpu_matmul.by_columns(left, right.t()) - wanted).abs() <= bound).all()
    wide = torch.randn(rows, inner + 3)
    wide[:, :inner] = left
    assert ((cpu_matmul.by_rows(wide[:, :inner], right) - wanted).abs() <= bound).all()


def test_a_product_is_the_same_each_time(library: str) -> None:
    left, right = torch.randn(65, 48), torch.randn(31, 48)
    assert torch.equal(cpu_matmul.by_rows(left, right), cpu_matmul.by_rows(left, right))


def test_where_logits_are_compared_products_are_torchs(library: str) -> None:
    torch.manual_seed(1)
    left, right = torch.randn(65, 576), torch.randn(192, 576)
    with cpu_matmul.as_torch():
        assert torch.equal(cpu_matmul.by_rows(left, right), left @ right.t())
        assert torch.equal(cpu_matmul.by_columns(left, right.t()), left @ right.t())
    if library == "onednn":
        assert cpu_matmul._onednn(left)


def test_other_types_stay_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_matmul, "library", lambda: ("onednn", "test"))
    left, right = torch.randn(4, 8, dtype=torch.bfloat16), torch.randn(3, 8, dtype=torch.bfloat16)
    assert torch.equal(cpu_matmul.by_rows(left, right), left @ right.t())
    assert cpu_matmul.by_columns(left.to("meta"), right.to("meta").t()).shape == (4, 3)


@pytest.mark.parametrize("maker,wanted", [("GenuineIntel", "torch"), ("AuthenticAMD", "onednn"), (None, "torch")])
def test_the_maker_of_the_processor_decides(maker: str | None, wanted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise") or not torch.backends.mkl.is_available():
        pytest.skip("this torch has one library only")
    text = "processor\t: 0\n" + (f"vendor_id\t: {maker}\n" if maker else "")
    monkeypatch.setattr(cpu_matmul.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(Path, "read_text", lambda self, **_: text)
    name, why = cpu_matmul.library.__wrapped__()
    assert name == wanted and why
    monkeypatch.setattr(cpu_matmul.platform, "machine", lambda: "aarch64")
    assert cpu_matmul.library.__wrapped__() == ("torch", "aarch64 processor")
