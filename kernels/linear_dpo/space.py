"""Launch parameters, configuration space and traffic of the chunked preference loss."""

from aifactory_train.kernels.cross_entropy.space import (
    MODULE,
    VOCABULARIES,
    backward_arguments,
    constexprs,
    floor,
    forward_arguments,
    row_space,
    tiles,
)
from aifactory_train.kernels.linear_cross_entropy.space import SHRINK
from aifactory_train.kernels.spec import Kernel, Operator, Shape


def inputs(make, shape: Shape) -> tuple:
    """Two sequences, chosen and rejected, of half the rows each, and the log-probabilities of the frozen reference."""
    n, h, v = shape["rows"] // 2, shape["hidden"], shape["vocab"]
    weight = make.normal(v, h, scale=h**-0.5)
    return make.normal(2, n, h), weight, make.labels(2, n, classes=v), make.constant(0.0, 2)


KERNELS = (
    Kernel("linear_dpo_fwd", "forward", f"{MODULE}:ce_fwd", forward_arguments, constexprs, row_space, "vocab"),
    Kernel("linear_dpo_bwd", "backward", f"{MODULE}:ce_bwd", backward_arguments, constexprs, tiles, "vocab"),
)
CHECKS = tuple({"rows": 4095, "hidden": 4096, "vocab": v} for v in VOCABULARIES)
OPERATOR = Operator(
    "linear_dpo",
    ("rows", "hidden", "vocab"),
    KERNELS,
    floor,
    CHECKS,
    inputs,
    pointwise=False,
    shrink=SHRINK,
    eager=False,
    note="log-probabilities forward; backward recomputes the logits, because a pair's weight is known only after both "
    "sequences",
)
