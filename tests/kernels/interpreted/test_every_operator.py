"""What holds for every operator that the registry finds, with the inputs and shapes that its own folder declares."""

import pytest
import torch
from calls import calls_of, copied
from judge import compare

from aifactory_train.kernels import ops, registry
from aifactory_train.kernels.workbench import inputs

OPERATORS = list(registry.OPERATORS)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).split(".")[1])
@pytest.mark.parametrize("op", OPERATORS)
def test_values(op, dtype):
    """Forward and backward against the oracle in fp64: at most twice the error of the oracle in the same dtype."""
    for shape in inputs.small(registry.operator(op)):
        arguments = inputs.draw(op, shape, dtype)

        def in_place(run):
            """An operator that returns nothing has updated its first argument."""

            def ran(*given):
                given = tuple(v if isinstance(v, torch.Tensor) and v.requires_grad else copied(v) for v in given)
                out = run(*given)
                return given[0] if out is None else out

            return ran

        compare(
            f"{op} {shape}", in_place(inputs.function(op)), in_place(inputs.oracle(op)), arguments,
            tuple(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments),
        )  # fmt: skip


@pytest.mark.parametrize("op", OPERATORS)
def test_opcheck(op):
    found = calls_of(op)
    assert found, "the operator calls nothing that is registered in the namespace aifactory"
    for registered, arguments in found:
        result = torch.library.opcheck(registered, arguments)
        assert set(result.values()) == {"SUCCESS"}, (registered, result)


@pytest.mark.parametrize("op", OPERATORS)
def test_compiles_as_one_graph(op):
    """Same outputs, gradients and updates from ``torch.compile(fullgraph=True)`` as from eager execution."""
    arguments = inputs.draw(op, inputs.small(registry.operator(op))[0], torch.float32)
    run = inputs.function(op)
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        given = tuple(copied(a) for a in arguments)
        torch._dynamo.reset()
        out = function(*given)
        outs = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, torch.Tensor)]
        asked = [a for a in given if isinstance(a, torch.Tensor) and a.requires_grad]
        total = sum(o.sum() for o in outs if o.requires_grad)
        results.append(
            (
                [*outs, *(a for a in given if isinstance(a, torch.Tensor))],
                torch.autograd.grad(total, asked) if asked else (),
            )
        )
    torch.testing.assert_close(results[1], results[0])


def test_the_package_offers_them_all():
    for op in OPERATORS:
        assert callable(getattr(ops, op)) and op in ops.__all__
    with pytest.raises(AttributeError, match="no operator offers 'rms_nrm'"):
        _ = ops.rms_nrm
