"""The registered operators that each operator of the registry calls, with the arguments of a small forward and backward
pass.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from aifactory_train.kernels import registry
from aifactory_train.kernels.workbench import inputs


def copied(value):
    """The same arguments for another run: an operator may update them in place."""
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value


class Calls(TorchDispatchMode):
    """Collects the calls of this project's registered operators."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "aifactory":
            self.seen.append((func, tuple(copied(a) for a in args)))
        return func(*args, **(kwargs or {}))


def calls_of(op):
    """(registered operator, arguments) of a forward and a backward pass; only those of the forward pass ask for
    gradients.
    """
    operator = registry.operator(op)
    shape = inputs.small(operator)[0]
    arguments = inputs.draw(op, shape, torch.float32)
    with Calls() as forward:
        out = inputs.function(op)(*arguments)
    outs = [o for o in (out if isinstance(out, tuple) else (out,)) if isinstance(o, torch.Tensor) and o.requires_grad]
    with Calls() as backward:
        if outs:
            torch.autograd.backward(outs, [torch.randn_like(o) for o in outs])
    plain = [(f, tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in args)) for f, args in backward.seen]
    return forward.seen + plain
