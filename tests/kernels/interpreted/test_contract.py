"""The registered operators keep torch's contracts: opcheck, whole-graph compilation, no read-back from the device."""

import pytest
import torch
from calls import calls_of

from aifactory_train.kernels import OPERATORS, ops, runtime
from aifactory_train.kernels.adamw8bit.op import new_state

aif = torch.ops.aifactory


def t(*shape, grad=True):
    return torch.randn(*shape, requires_grad=grad)


def cases():
    """Registered operators in forms that ``test_every_operator.py`` does not reach; those with a backward require gradients."""
    labels = torch.tensor([1, -100, 3])
    cos = torch.randn(1, 2, 8).repeat(1, 1, 2)
    p = torch.randn(300)
    return {
        "rms_norm_fwd": (t(3, 48), t(48), 1e-6, 0.0),
        "rms_norm_bwd": (t(3, 48, grad=False), t(3, 48, grad=False), t(48, grad=False), torch.rand(3), 1e-6, 0.0),
        "rms_norm_residual_fwd": (t(3, 48), t(3, 48), t(48), 1e-6, 0.0),
        "rms_norm_residual_bwd": (*(t(3, 48, grad=False) for _ in range(3)), t(48, grad=False), torch.rand(3), 1e-6, 0.0),
        "layer_norm_fwd": (t(3, 48), t(48), t(48), 1e-5),
        "layer_norm_bwd": (t(3, 48, grad=False), t(3, 48, grad=False), t(48, grad=False), True, torch.rand(3), torch.rand(3), 1e-5),
        "glu_fwd": (t(3, 48), t(3, 48), 0),
        "glu_bwd": (*(t(3, 48, grad=False) for _ in range(3)), 1),
        "rope_fwd": (t(1, 2, 2, 16), t(1, 1, 2, 16), cos, cos, None, None, 1e-6, 0.0),
        "rope_bwd": (t(1, 2, 2, 16, grad=False), t(1, 1, 2, 16, grad=False), cos, cos),
        "rope_norm_bwd": (
            t(1, 2, 2, 16, grad=False), t(1, 1, 2, 16, grad=False), t(1, 2, 2, 16, grad=False), t(1, 1, 2, 16, grad=False),
            cos, cos, t(16, grad=False), t(16, grad=False), 1e-6, 0.0,
        ),
        "cross_entropy_fwd": (t(3, 50), labels, 1.0, 0.0),
        "cross_entropy_bwd": (torch.randn(3), t(3, 50, grad=False), labels, torch.rand(3), 1.0, 0.0),
        "linear_cross_entropy_fwd": (t(3, 16), t(50, 16), labels, t(50), 1.0, 0.0, 2, -1, True, True),
        "linear_logps_fwd": (t(3, 16), t(50, 16), labels, None, 1.0, 0.0, 2),
        "linear_logps_bwd": (torch.randn(3), t(3, 16, grad=False), t(50, 16, grad=False), labels, None, torch.rand(3), 1.0, 0.0, 2),
        "lora_linear_fwd": (t(3, 32), t(48, 32), t(4, 32), t(48, 4), 2.0, None, None),
        "lora_linear_bwd": (
            t(3, 48, grad=False), t(3, 32, grad=False), t(48, 32, grad=False), t(4, 32, grad=False), t(48, 4, grad=False),
            t(3, 4, grad=False), 2.0, None, True, True, True,
        ),
        "lora_linears_fwd": (
            t(3, 32), [t(48, 32, grad=False), t(16, 32, grad=False)], [t(4, 32), t(4, 32)], [t(48, 4), t(16, 4)], 2.0,
            None, None, 0.0, 0.0,
        ),
        "lora_linears_bwd": (
            [t(3, 48, grad=False), t(3, 16, grad=False)], t(3, 32, grad=False),
            [t(48, 32, grad=False), t(16, 32, grad=False)], [t(4, 32, grad=False), t(4, 32, grad=False)],
            [t(48, 4, grad=False), t(16, 4, grad=False)], t(3, 8, grad=False), 2.0, True, t(32, grad=False), 1e-6, 0.0,
            True,
        ),
        "lora_gated_down_fwd": (
            t(3, 48), t(3, 48), t(3, 32), t(32, 48, grad=False), t(4, 48), t(32, 4), 2.0, 0,
        ),
        "lora_gated_down_bwd": (
            t(3, 32, grad=False), t(3, 48, grad=False), t(3, 48, grad=False), t(32, 48, grad=False),
            t(4, 48, grad=False), t(32, 4, grad=False), t(3, 4, grad=False), 2.0, 0,
        ),
        "adamw8bit_step": (p, torch.randn(300), *new_state(p).values(), 0.01, 0.9, 0.99, 1e-8, 0.0, 0.1, 0.01, -1),
    }  # fmt: skip


def registered():
    """Names of everything in the aifactory namespace, so that a new operator cannot escape the check."""
    return {
        s.split("::")[1].split(".")[0] for s in torch._C._dispatch_get_all_op_names() if s.startswith("aifactory::")
    }


def test_every_registered_operator_is_checked():
    called = {f._schema.name.split("::")[1] for op in OPERATORS for f, _ in calls_of(op)}
    assert registered() == set(cases()) | called


@pytest.mark.parametrize("name", sorted(cases()))
def test_opcheck(name):
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if name == "lora_gated_down_fwd":
        # Its backward writes into what forward keeps, so that no graph of both directions is made of it: compiled
        # blocks are without it (model/operators.py).
        checks.pop()
    result = torch.library.opcheck(getattr(aif, name).default, cases()[name], test_utils=checks)
    assert set(result.values()) == {"SUCCESS"}, result


def test_rope_with_norms_compiles_as_one_graph():
    """The form that ``test_every_operator.py`` does not compile: same outputs and gradients as from eager execution."""
    cos = torch.randn(1, 2, 8).repeat(1, 1, 2)
    inputs = (t(1, 2, 2, 16), t(1, 1, 2, 16), t(16), t(16))

    def function(q, k, w, v):
        return torch.cat(ops.rope(q, k, cos, cos, w, v), 1)

    eager = function(*inputs)
    grads = torch.autograd.grad(eager.sum(), inputs)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(torch.autograd.grad(compiled.sum(), inputs), grads, strict=True):
        torch.testing.assert_close(a, b)


def test_the_optimizer_step_compiles_as_one_graph():
    p, g = torch.randn(512), torch.randn(512)
    state = new_state(p)
    expect, other = p.clone(), {k: v.clone() for k, v in state.items()}
    ops.adamw8bit(expect, g, other, step=1, lr=0.1)
    torch.compile(lambda: ops.adamw8bit(p, g, state, step=1, lr=0.1), fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(p, expect)
    for key, value in state.items():
        assert torch.equal(value, other[key]), key


def test_gradients_do_not_clobber_their_inputs():
    """Backward twice from one graph, and the incoming gradient unchanged: nothing is computed in place behind the caller's back."""
    gate, up = t(3, 48), t(3, 48)
    y = ops.swiglu(gate, up)
    g = torch.randn_like(y)
    kept = g.clone()
    first = torch.autograd.grad(y, (gate, up), g, retain_graph=True)
    second = torch.autograd.grad(y, (gate, up), g)
    assert torch.equal(g, kept)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    h, w = t(5, 16), t(40, 16)
    loss = ops.linear_cross_entropy(h, w, torch.arange(5))
    first = torch.autograd.grad(3 * loss, (h, w), retain_graph=True)
    second = torch.autograd.grad(loss, (h, w))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 3 * b)


def test_a_weight_used_twice_gets_both_gradients():
    """A tied embedding: the same weight as lookup table and as output projection."""
    table = t(40, 16)
    ids = torch.tensor([3, 7, 9])
    loss = ops.linear_cross_entropy(torch.nn.functional.embedding(ids, table), table, ids.roll(-1))
    (ours,) = torch.autograd.grad(loss, table)
    again = torch.nn.functional.cross_entropy(
        torch.nn.functional.embedding(ids, table) @ table.t(), ids.roll(-1), reduction="sum"
    )
    torch.testing.assert_close(ours, torch.autograd.grad(again, table)[0], atol=1e-5, rtol=1e-4)


def test_no_logits_outlive_a_chunk():
    """Peak of tensors with a vocabulary dimension: one chunk of logits, never all rows (counted through the dispatcher)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from aifactory_train.kernels.linear_cross_entropy.op import linear_cross_entropy_fwd

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, tuple) else (out,):
                if isinstance(x, torch.Tensor) and x.dim() == 2 and x.shape[1] == 1000:
                    largest = max(largest, x.shape[0])
            return out

    hidden, weight = torch.randn(64, 4), torch.randn(1000, 4)
    with Watch():
        linear_cross_entropy_fwd._init_fn(hidden, weight, torch.arange(64), None, 1.0, 0.0, 8, -1, True, True)
    assert largest == 8


def test_operators_do_not_read_back_from_the_device():
    """With fake tensors any ``.item()``, ``nonzero`` or data-dependent branch raises."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    for name, inputs in cases().items():
        with FakeTensorMode(allow_non_fake_inputs=True):
            getattr(aif, name)(*inputs)


def test_use_triton_says_why_not(caplog):
    runtime.say_once.cache_clear()
    assert not runtime.use_triton("rms_norm", torch.randn(2, dtype=torch.float64))
    assert "float64" in caplog.text
