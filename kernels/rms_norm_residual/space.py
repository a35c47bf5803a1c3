"""Launch parameters, configuration space and traffic of residual + RMSNorm."""

from aifactory_train.kernels.rms_norm.space import CHECKS, kernels
from aifactory_train.kernels.spec import ITEMSIZE, Operator, Shape


def floor(direction: str, dtype: str, shape: Shape) -> int:
    """Forward 4 passes over [N, H] (read x and residual, write y and s), backward 4 (read dy, ds and s, write the
    gradient).
    """
    return 4 * ITEMSIZE[dtype] * shape["rows"] * shape["hidden"]


def inputs(make, shape: Shape) -> tuple:
    n, h = shape["rows"], shape["hidden"]
    return make.normal(n, h), make.normal(n, h), make.scale(h), 1e-6


OPERATOR = Operator(
    "rms_norm_residual", ("rows", "hidden"), kernels("rms_norm_residual", True), floor, CHECKS, inputs, flops=5
)
