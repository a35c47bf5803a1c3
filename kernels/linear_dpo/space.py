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
from aifactory_train.kernels.spec import Kernel, Operator

KERNELS = (
    Kernel("linear_dpo_fwd", "forward", f"{MODULE}:ce_fwd", forward_arguments, constexprs, row_space, "vocab"),
    Kernel("linear_dpo_bwd", "backward", f"{MODULE}:ce_bwd", backward_arguments, constexprs, tiles, "vocab"),
)
CHECKS = tuple({"rows": 4095, "hidden": 4096, "vocab": v} for v in VOCABULARIES)
OPERATOR = Operator(
    "linear_dpo", ("rows", "hidden", "vocab"), KERNELS, floor, CHECKS, pointwise=False,
    note="log-probabilities forward; backward recomputes the logits, because a pair's weight is known only after both sequences",
)  # fmt: skip
