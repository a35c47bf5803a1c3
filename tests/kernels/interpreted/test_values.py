"""Every operator, forward and backward, against fp64: dtypes x shapes of the acceptance list."""

import pytest
import torch
from judge import compare, judge

from aifactory_train.kernels import ops
from aifactory_train.kernels.cross_entropy.reference import cross_entropy
from aifactory_train.kernels.geglu.reference import geglu
from aifactory_train.kernels.layer_norm.reference import layer_norm
from aifactory_train.kernels.linear_cross_entropy.reference import linear_cross_entropy
from aifactory_train.kernels.linear_dpo.reference import dpo, linear_logps
from aifactory_train.kernels.lora_linear.reference import lora_linear
from aifactory_train.kernels.rms_norm.reference import rms_norm
from aifactory_train.kernels.rms_norm_residual.reference import rms_norm_residual
from aifactory_train.kernels.rope.reference import rope
from aifactory_train.kernels.swiglu.reference import swiglu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (leading shape, width, strided): one row, no rows, widths below and above a block, no power of two, a strided view
SHAPES = [
    ((1,), 96, False),
    ((0,), 96, False),
    ((2, 3), 1000, False),
    ((5,), 4096, False),
    ((7,), 1000, True),
    ((3,), 5120, False),
]
shapes = pytest.mark.parametrize(
    "lead,width,strided", SHAPES, ids=lambda v: "x".join(map(str, v)) if isinstance(v, tuple) else None
)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])


def rows(lead, width, strided, dtype, scale=1.0):
    """Random rows; strided ones are every second row of a wider buffer, starting off its edge."""
    if not strided:
        return (torch.randn(*lead, width) * scale).to(dtype)
    return (torch.randn(2 * lead[0], width + 48) * scale).to(dtype)[::2, 16 : 16 + width]


@dtypes
@shapes
@pytest.mark.parametrize("weighted", [True, False])
def test_rms_norm(dtype, lead, width, strided, weighted):
    if not weighted and (width != 1000 or dtype == torch.float16):
        pytest.skip("without a weight one width is enough")
    x, w = rows(lead, width, strided, dtype), (1 + 0.1 * torch.randn(width)).to(dtype) if weighted else None
    for offset in (0.0, 1.0):
        compare(
            "rms_norm",
            lambda a, b, o=offset: ops.rms_norm(a, b, 1e-5, o),
            lambda a, b, o=offset: rms_norm(a, b, 1e-5, o),
            (x, w),
            (True, weighted),
        )


@dtypes
@shapes
def test_rms_norm_residual(dtype, lead, width, strided):
    x, r = (rows(lead, width, strided, dtype) for _ in range(2))
    w = (1 + 0.1 * torch.randn(width)).to(dtype)
    compare(
        "rms_norm_residual",
        lambda *a: ops.rms_norm_residual(*a, 1e-5),
        lambda *a: rms_norm_residual(*a, 1e-5),
        (x, r, w),
        (True,) * 3,
    )


@dtypes
@shapes
@pytest.mark.parametrize("affine", ["both", "weight", "none"])
def test_layer_norm(dtype, lead, width, strided, affine):
    if affine != "both" and (width != 1000 or dtype == torch.float16):
        pytest.skip("the other forms need one width only")
    x = rows(lead, width, strided, dtype) + 3
    w = (1 + 0.1 * torch.randn(width)).to(dtype) if affine != "none" else None
    b = torch.randn(width).to(dtype) if affine == "both" else None
    compare(
        "layer_norm",
        lambda *a: ops.layer_norm(*a, 1e-5),
        lambda *a: layer_norm(*a, 1e-5),
        (x, w, b),
        (True, w is not None, b is not None),
    )


@dtypes
@shapes
@pytest.mark.parametrize("kind", ["silu", "tanh", "none"])
def test_gated_activations(dtype, lead, width, strided, kind):
    gate, up = rows(lead, width, strided, dtype, 3.0), rows(lead, width, strided, dtype)
    if kind == "silu":
        compare("swiglu", ops.swiglu, swiglu, (gate, up), (True, True))
    else:
        compare("geglu", lambda a, b: ops.geglu(a, b, kind), lambda a, b: geglu(a, b, kind), (gate, up), (True, True))


@dtypes
@pytest.mark.parametrize(
    "batch,heads,kv,seq,dim", [(2, 4, 2, 3, 64), (1, 3, 1, 1, 96), (1, 4, 4, 0, 64), (2, 8, 2, 2, 128)]
)
@pytest.mark.parametrize("norm", [False, True])
def test_rope(dtype, batch, heads, kv, seq, dim, norm):
    # As attention makes them: a transposed view of [B, S, heads, D], so the heads are strided.
    q, k = (torch.randn(batch, seq, h, dim).to(dtype).transpose(1, 2) for h in (heads, kv))
    angle = (torch.randn(1, seq, dim // 2) * 3).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    w = [(1 + 0.1 * torch.randn(dim)).to(dtype) if norm else None for _ in range(2)]
    compare("rope", ops.rope, rope, (q, k, cos, sin, *w), (True, True, False, False, norm, norm))


def labels_of(kind, n, vocab):
    labels = torch.randint(0, vocab, (n,))
    if kind == "all":
        labels[:] = -100
    elif kind == "some":
        labels[::3] = -100
    return labels


@dtypes
@pytest.mark.parametrize(
    "n,vocab,strided", [(1, 96, False), (0, 96, False), (4, 1000, False), (3, 4096, True), (2, 9001, False)]
)
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_cross_entropy(dtype, n, vocab, strided, ignored):
    logits = (torch.randn(n, vocab + (16 if strided else 0)) * 3).to(dtype)[:, :vocab]
    labels = labels_of(ignored, n, vocab)
    for scale, cap in ((1.0, None), (0.5, 5.0)):
        compare(
            "cross_entropy",
            lambda a, b, s=scale, c=cap: ops.cross_entropy(a, b, s, c, reduction="none"),
            lambda a, b, s=scale, c=cap: cross_entropy(a, b, s, c),
            (logits, labels),
            (True, False),
        )


@dtypes
@pytest.mark.parametrize("n,vocab", [(1, 96), (0, 96), (7, 1000), (5, 4096)])
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_linear_cross_entropy(dtype, n, vocab, ignored):
    d = 64
    hidden, weight = torch.randn(n, d).to(dtype), (torch.randn(vocab, d) / 8).to(dtype)
    labels = labels_of(ignored, n, vocab)
    # In several chunks, with a bias, a scale and a soft cap, and with the number of supervised rows announced.
    known = int((labels != -100).sum())

    def chunked(h, w, y, b, s, c, k):
        """Plain torch over the same chunks: a CPU's GEMM of two rows is up to ten times less exact than that of
        many.
        """
        h, y = h[y != -100], y[y != -100]
        k = k or max(1, len(y))
        parts = [linear_cross_entropy(h[i : i + k], w, y[i : i + k], b, s, c) for i in range(0, len(y), k)]
        return sum(parts, start=linear_cross_entropy(h[:0], w, y[:0], b, s, c))

    for bias, scale, cap, chunk, supervised in (
        (None, 1.0, None, 2, None),
        (torch.randn(vocab).to(dtype), 0.5, 5.0, None, known),
    ):
        compare(
            "linear_cross_entropy",
            lambda h, w, y, b, s=scale, c=cap, k=chunk, u=supervised: ops.linear_cross_entropy(h, w, y, b, s, c, k, u),
            lambda h, w, y, b, s=scale, c=cap, k=chunk: chunked(h, w, y, b, s, c, k),
            (hidden, weight, labels, bias),
            (True, True, False, bias is not None),
        )


@pytest.mark.parametrize("reduction", ["sum", "none", "documents"])
def test_the_loss_of_training_by_kernels_is_that_of_its_own_chunks(reduction):
    from aifactory_train.model import loss

    labels, counts = torch.randint(0, 300, (7,)), [3, 4] if reduction == "documents" else None
    found = []
    for kernels in (True, False):
        generator = torch.Generator().manual_seed(1)
        hidden, weight = (torch.randn(n, 32, generator=generator).requires_grad_() for n in (7, 300))
        how = {"reduction": reduction, "counts": counts, "scale": 0.5, "rows": 3}
        value = loss.linear_cross_entropy(hidden, weight, labels, kernels=kernels, **how)
        (value * torch.arange(1, value.numel() + 1).view(value.shape)).sum().backward()
        found.append((value.detach(), hidden.grad, weight.grad))
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_linear_cross_entropy_announced_too_few():
    hidden, weight, labels = torch.randn(6, 32), torch.randn(50, 32), torch.arange(6)
    assert ops.linear_cross_entropy(hidden, weight, labels, supervised=5).isnan()
    assert ops.linear_cross_entropy(hidden, weight, labels, supervised=6).isfinite()
    labels[4:] = -100
    want = ops.linear_cross_entropy(hidden, weight, labels)
    assert torch.allclose(ops.linear_cross_entropy(hidden, weight, labels, supervised=5), want)


def test_a_label_outside_the_vocabulary_poisons_the_loss():
    logits = torch.randn(3, 40)
    assert ops.cross_entropy(logits, torch.tensor([1, 40, 2])).isnan()
    assert ops.linear_cross_entropy(torch.randn(3, 8), torch.randn(40, 8), torch.tensor([1, -7, 2])).isnan()


@dtypes
@pytest.mark.parametrize(
    "n,fan_in,fan_out,rank", [(1, 96, 64, 4), (0, 96, 64, 4), (6, 100, 1000, 16), (3, 4096, 96, 64)]
)
@pytest.mark.parametrize("form", ["plain", "bias", "dropout"])
def test_lora_linear(dtype, n, fan_in, fan_out, rank, form):
    x = torch.randn(n, fan_in).to(dtype)
    w, a, b = ((torch.randn(*s) / s[1] ** 0.5).to(dtype) for s in ((fan_out, fan_in), (rank, fan_in), (fan_out, rank)))
    bias = torch.randn(fan_out).to(dtype) if form == "bias" else None
    adapter = x * (torch.rand_like(x) < 0.8).to(dtype) if form == "dropout" else None
    compare(
        "lora_linear",
        lambda x, w, a, b, c, d: ops.lora_linear(x, w, a, b, 2.0, c, d),
        lambda x, w, a, b, c, d: lora_linear(x, w, a, b, 2.0, c, d),
        (x, w, a, b, bias, adapter),
        (True, True, True, True, bias is not None, adapter is not None),
    )


@dtypes
@pytest.mark.parametrize("shape", [(1,), (0,), (1000,), (3, 4096)])
def test_adamw8bit(dtype, shape):
    from aifactory_train.kernels.adamw8bit import reference
    from aifactory_train.kernels.adamw8bit.op import new_state

    arguments = {
        "lr": 0.01,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "bias1": 1 - 0.9**3,
        "bias2": 1 - 0.999**3,
    }
    start = torch.randn(shape).to(dtype)
    state = new_state(start)
    with torch.no_grad():  # a state that two steps have filled
        for _ in range(2):
            reference.step(start, torch.randn(shape).to(dtype), *state.values(), **arguments)
    grad = torch.randn(shape).to(dtype)
    exact = [t.double().clone() for t in (start, grad)]
    flat = [reference._blocked(t) for t in exact]
    moments = reference.decode(*state.values(), dtype=torch.float64)
    want, first, second = reference.update(*flat, *moments, **arguments)

    def after(step):
        p, s = start.clone(), {k: v.clone() for k, v in state.items()}
        step(p, s)
        return p, *reference.decode(*s.values(), dtype=torch.float64)

    ours = after(lambda p, s: torch.ops.aifactory.adamw8bit_step(p, grad, *s.values(), *arguments.values(), -1))
    theirs = after(lambda p, s: reference.step(p, grad, *s.values(), **arguments))
    for label, a, b, c in zip(
        ("parameter", "first moment", "second moment"), ours, theirs, (want, first, second), strict=True
    ):
        n = start.numel()
        judge(f"adamw8bit {label}", a.reshape(-1)[:n], b.reshape(-1)[:n], c.reshape(-1)[:n])


def test_adamw8bit_rounds_at_random_without_bias():
    """An update far below half an ulp of bf16 is lost by rounding to nearest and kept on average by stochastic
    rounding.
    """
    p = torch.ones(4096, dtype=torch.bfloat16)
    grad = torch.ones_like(p)
    from aifactory_train.kernels.adamw8bit.op import new_state

    nearest, lucky = p.clone(), p.clone()
    ops.adamw8bit(nearest, grad, new_state(p), step=1, lr=5e-4, weight_decay=0.0)
    ops.adamw8bit(lucky, grad, new_state(p), step=1, lr=5e-4, weight_decay=0.0, seed=7)
    assert (nearest == 1).all()
    # 1 - 5e-4 lies an eighth of an ulp (2^-8) below 1: the mean must be that, within 4 standard deviations
    assert abs(lucky.double().mean().item() - (1 - 5e-4)) < 4 * (2**-8) * (0.128 * 0.872 / 4096) ** 0.5


@dtypes
@pytest.mark.parametrize("ignored", ["none", "some", "all"])
def test_linear_logps(dtype, ignored):
    hidden, weight = torch.randn(5, 64).to(dtype), (torch.randn(1000, 64) / 8).to(dtype)
    labels = labels_of(ignored, 5, 1000)
    for cap, chunk in ((None, 2), (5.0, None)):
        compare(
            "linear_logps",
            lambda h, w, y, c=cap, k=chunk: ops.linear_logps(h, w, y, softcap=c, chunk_size=k),
            lambda h, w, y, c=cap: linear_logps(h, w, y, softcap=c),
            (hidden, weight, labels),
            (True, True, False),
        )


@dtypes
def test_linear_dpo(dtype):
    pairs, seq, d, vocab = 2, 5, 32, 300
    hidden, weight = torch.randn(2 * pairs, seq, d).to(dtype), (torch.randn(vocab, d) / 6).to(dtype)
    labels = torch.randint(0, vocab, (2 * pairs, seq))
    labels[:, :2] = -100
    base = torch.randn(2 * pairs) - 20

    def reference(h, w):
        logps = linear_logps(h.reshape(-1, d), w, labels.reshape(-1)).view(labels.shape).sum(-1)
        return dpo(logps, base.to(logps.dtype), 0.1, 0.1)[0]

    compare(
        "linear_dpo",
        lambda h, w: ops.linear_dpo(h, w, labels, base, beta=0.1, smoothing=0.1)[0],
        reference,
        (hidden, weight),
        (True, True),
    )
