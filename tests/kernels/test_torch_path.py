"""The torch path: what runs on a CPU, and what the registered operators do there. Gradients against finite differences
in fp64.
"""

import copy

import pytest
import torch

from aifactory_train.kernels import ops, registry, runtime
from aifactory_train.kernels.workbench import inputs

aif = torch.ops.aifactory


def d(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


COS = torch.randn(1, 3, 4, dtype=torch.float64).repeat(1, 1, 2)
FIXED = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
LABELS = torch.tensor([1, -100, 4])
CASES = {
    "rms_norm": (
        lambda x, w: aif.rms_norm_fwd(x, w, 1e-6, 1.0)[0],
        lambda x, w: ops.rms_norm(x, w, 1e-6, 1.0),
        lambda: (d(3, 8), d(8)),
    ),
    "rms_norm_residual": (
        lambda x, r, w: aif.rms_norm_residual_fwd(x, r, w, 1e-6, 0.0)[:2],
        lambda x, r, w: ops.rms_norm_residual(x, r, w, 1e-6),
        lambda: (d(3, 8), d(3, 8), d(8)),
    ),
    "layer_norm": (
        lambda x, w, b: aif.layer_norm_fwd(x, w, b, 1e-5)[0],
        lambda x, w, b: ops.layer_norm(x, w, b, 1e-5),
        lambda: (d(3, 8), d(8), d(8)),
    ),
    "swiglu": (lambda a, b: aif.glu_fwd(a, b, 0), ops.swiglu, lambda: (d(3, 8), d(3, 8))),
    "geglu": (lambda a, b: aif.glu_fwd(a, b, 1), ops.geglu, lambda: (d(3, 8), d(3, 8))),
    "geglu_exact": (
        lambda a, b: aif.glu_fwd(a, b, 2),
        lambda a, b: ops.geglu(a, b, "none"),
        lambda: (d(3, 8), d(3, 8)),
    ),
    "rope": (
        lambda q, k: aif.rope_fwd(q, k, COS, COS.cos(), None, None, 1e-6, 0.0),
        lambda q, k: ops.rope(q, k, COS, COS.cos()),
        lambda: (d(1, 2, 3, 8), d(1, 1, 3, 8)),
    ),
    "rope_norm": (
        lambda q, k, v, w: aif.rope_fwd(q, k, COS, COS.cos(), v, w, 1e-6, 0.0),
        lambda q, k, v, w: ops.rope(q, k, COS, COS.cos(), v, w, 1e-6),
        lambda: (d(1, 2, 3, 8), d(1, 1, 3, 8), d(8), d(8)),
    ),
    "linear_cross_entropy": (
        lambda h, w, b: aif.linear_cross_entropy_fwd(h, w, LABELS, b, 0.7, 3.0, 2, -1, True, True)[0],
        lambda h, w, b: ops.linear_cross_entropy(h, w, LABELS, b, 0.7, 3.0),
        lambda: (d(3, 4), d(6, 4), d(6)),
    ),
    "linear_logps": (
        lambda h, w: aif.linear_logps_fwd(h, w, LABELS, None, 0.7, 3.0, 2)[0],
        lambda h, w: ops.linear_logps(h, w, LABELS, scale=0.7, softcap=3.0),
        lambda: (d(3, 4), d(6, 4)),
    ),
    "lora_linear": (
        lambda x, w, a, b, c: aif.lora_linear_fwd(x, w, a, b, 2.0, c, None)[0],
        lambda x, w, a, b, c: ops.lora_linear(x, w, a, b, 2.0, c),
        lambda: (d(3, 5), d(6, 5), d(2, 5), d(6, 2), d(6)),
    ),
    "lora_linears": (
        lambda s, a, b, c, e: _several(aif.lora_linears_fwd, s, a, b, c, e, (s.detach(), None, 1e-6, 0.0)),
        lambda s, a, b, c, e: _several(ops.lora_linears, s, a, b, c, e, None),
        lambda: (d(3, 5), d(2, 5), d(6, 2), d(2, 5), d(4, 2)),
    ),
    "lora_gated_down": (
        lambda g, u, r, a, b: aif.lora_gated_down_fwd(g * 1, u * 1, r, FIXED[:4].to(g.dtype), a, b, 2.0, 0)[0],
        lambda g, u, r, a, b: ops.lora_gated_down(g * 1, u * 1, r, FIXED[:4].to(g.dtype), a, b, 2.0, 0),
        lambda: (d(3, 5), d(3, 5), d(3, 4), d(2, 5), d(4, 2)),
    ),
}


def _several(function, s, a, b, c, e, origin):
    """Two adapted layers of one normalised input; the registered form makes the input again in backward."""
    weights = [FIXED.to(s.dtype), FIXED[:4].to(s.dtype)]
    x = ops.rms_norm(s, None, 1e-6)
    if origin is None:
        return torch.cat(function(x, weights, [a, c], [b, e], 2.0), -1)
    return torch.cat(function(x, weights, [a, c], [b, e], 2.0, *origin)[0], -1)


@pytest.mark.parametrize("name", sorted(CASES))
def test_gradients_by_finite_differences(name):
    registered, public, inputs = CASES[name]
    torch.manual_seed(0)
    values = inputs()
    torch.testing.assert_close(registered(*values), public(*values), atol=1e-6, rtol=1e-6)
    assert torch.autograd.gradcheck(public, values, fast_mode=True)


@pytest.mark.parametrize("name", sorted(CASES))
def test_registered_operators_agree_with_the_torch_path(name):
    """The registered backward on a CPU (closed forms) against autograd through the public function; fp32, as it keeps
    fp32 statistics.
    """
    registered, public, inputs = CASES[name]
    torch.manual_seed(0)
    values = [v.detach().float().requires_grad_() for v in inputs()]
    if name.startswith("rope"):
        global COS
        before, COS = COS, COS.float()
    try:
        outs = registered(*values), public(*values)
    finally:
        if name.startswith("rope"):
            COS = before
    outs = [o if isinstance(o, tuple) else (o,) for o in outs]
    grads = [torch.randn_like(o) for o in outs[0]]
    ours, theirs = (torch.autograd.grad(o, values, grads) for o in outs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", registry.OPERATORS)
def test_every_operator_on_a_cpu(name):
    """As its folder declares it, in fp64: the operator is its oracle, and its gradients are those of finite
    differences.
    """
    torch.manual_seed(0)
    shape = {d: min(size, 24) for d, size in inputs.small(registry.operator(name))[0].items()}
    run, oracle, values = inputs.function(name), inputs.oracle(name), inputs.draw(name, shape, torch.float64)
    wanted = [v for v in values if isinstance(v, torch.Tensor) and v.requires_grad]
    if not wanted:  # an update in place
        other = copy.deepcopy(values)
        assert run(*values) is None and oracle(*other) is None
        assert torch.equal(values[0], other[0])
        return
    ours, theirs = run(*values), oracle(*values)
    torch.testing.assert_close(ours, theirs)

    def first(*leaves):
        left = iter(leaves)
        out = run(*(next(left) if isinstance(v, torch.Tensor) and v.requires_grad else v for v in values))
        return out[0] if isinstance(out, tuple) else out

    assert torch.autograd.gradcheck(first, wanted, fast_mode=True)


def test_a_cpu_takes_the_torch_path():
    assert not runtime.use_triton("rms_norm", torch.randn(2, 8))
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), runtime.interpret():
        pass


def test_supervised_rows_only():
    """Rows with label -100 are not computed: the masked rows hold NaN and touch nothing."""
    hidden = torch.randn(6, 8)
    hidden[3:] = float("nan")
    hidden.requires_grad_()
    weight = torch.randn(20, 8, requires_grad=True)
    labels = torch.tensor([1, 2, 3, -100, -100, -100])
    for supervised in (None, 3):
        with torch.no_grad():
            loss = ops.linear_cross_entropy(hidden, weight, labels, supervised=supervised)
        assert loss.isfinite()
    dh, dw = torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, labels, supervised=3), (hidden, weight))
    assert dw.isfinite().all() and (dh[3:] == 0).all() and dh[:3].isfinite().all()


def test_weight_gradient_is_accumulated_in_fp32():
    """Many chunks that bf16 accumulation would lose: each adds less than half an ulp of the sum."""
    torch.manual_seed(0)
    n, v = 2048, 16
    hidden = torch.full((n, 4), 1.0, dtype=torch.bfloat16)
    weight = (0.1 * torch.randn(v, 4)).bfloat16().requires_grad_()
    labels = torch.zeros(n, dtype=torch.int64)
    (ours,) = torch.autograd.grad(ops.linear_cross_entropy(hidden, weight, labels, chunk_size=1), weight)
    exact = weight.detach().double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(hidden.double() @ exact.t(), labels, reduction="sum")
    (truth,) = torch.autograd.grad(loss, exact)
    worst = (ours.double() - truth).abs().max() / truth.abs().max()
    assert worst < 0.01, worst  # adding 2048 terms in bf16 stops growing at 256 terms: an error of 87 %


def test_autocast_is_followed():
    hidden, weight = torch.randn(4, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ops.linear_cross_entropy(hidden, weight, torch.arange(4))
    loss.backward()
    assert loss.dtype == torch.float32 and weight.grad.dtype == torch.float32
    want = torch.nn.functional.cross_entropy(
        hidden.bfloat16() @ weight.bfloat16().t(), torch.arange(4), reduction="sum"
    )
    assert abs(loss - want.float()) < 0.05


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="expected \\[N, D\\]"):
        ops.linear_cross_entropy(torch.randn(3, 8), torch.randn(20, 9), torch.arange(3))
    with pytest.raises(ValueError, match="'tanh' or 'none'"):
        ops.geglu(torch.randn(2, 4), torch.randn(2, 4), "fast")
    with pytest.raises(ValueError, match="both q_weight and k_weight"):
        ops.rope(
            torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4), torch.ones(1, 1, 4), torch.ones(1, 1, 4), torch.ones(4)
        )
    with pytest.raises(ValueError, match="chosen sequences first"):
        ops.linear_dpo(torch.randn(3, 2, 4), torch.randn(9, 4), torch.zeros(3, 2, dtype=torch.int64), torch.zeros(3))
    with pytest.raises(ValueError, match="betas"):
        ops.AdamW8bit([torch.nn.Parameter(torch.ones(3))], betas=(1.5, 0.9))


def test_adamw8bit_trains_like_adamw():
    """A regression converges to the same loss within 5 % of torch's AdamW, with a quarter of its state."""

    def train(make):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
        x = torch.randn(256, 16)
        y = torch.sin(x.sum(1, keepdim=True))
        optimizer = make(model.parameters())
        for _ in range(150):
            loss = torch.nn.functional.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return loss.item(), optimizer

    theirs, _ = train(lambda p: torch.optim.AdamW(p, lr=3e-3))
    ours, optimizer = train(lambda p: ops.AdamW8bit(p, lr=3e-3))
    assert ours < 1.05 * theirs + 0.005, (ours, theirs)
    p = optimizer.param_groups[0]["params"][0]
    size = sum(v.numel() * v.element_size() for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))
    assert size == 2 * p.numel() + 8 * -(-p.numel() // 256)
    again = ops.AdamW8bit([torch.nn.Parameter(torch.ones(3))])
    again.load_state_dict(ops.AdamW8bit([torch.nn.Parameter(torch.ones(3))]).state_dict())
