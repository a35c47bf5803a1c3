"""Launch parameters, configuration space and traffic of LayerNorm."""

from aifactory_train.kernels.rms_norm.space import CHECKS, column_sum, floor, space
from aifactory_train.kernels.spec import Config, Kernel, Operator, Shape, split_row


def forward_arguments(dtype: str, shape: Shape) -> dict:
    h, p = shape["hidden"], "*" + dtype
    return {
        "X": p,
        "W": p,
        "B": p,
        "Y": p,
        "M": "*fp32",
        "R": "*fp32",
        "sx": h,
        "sy": h,
        "n_rows": shape["rows"],
        "n_cols": h,
        "eps": "fp32",
    }


def forward_constexprs(config: Config, dtype: str, shape: Shape) -> dict:
    block, chunks = split_row(config, shape["hidden"])
    return {"HAS_W": True, "HAS_B": True, "ROWS": config["rows"], "BLOCK": block, "CHUNKS": chunks}


def backward_arguments(dtype: str, shape: Shape) -> dict:
    h, p = shape["hidden"], "*" + dtype
    return {
        "DY": p, "X": p, "W": p, "M": "*fp32", "R": "*fp32", "DX": p, "P": "*fp32", "sdy": h, "sx": h, "sdx": h,
        "n_rows": shape["rows"], "n_cols": h,
    }  # fmt: skip


def backward_constexprs(config: Config, dtype: str, shape: Shape) -> dict:
    block, chunks = split_row(config, shape["hidden"])
    return {
        "HAS_W": True,
        "SUMS": True,
        "ROWS": config["rows"],
        "BLOCK": block,
        "CHUNKS": chunks,
        "STAGES": config["stages"],
    }


def wider(space):
    """Two partial sums instead of one: twice the rows a program keep their share of the traffic at 8 %."""

    def configurations(target, dtype, shape):
        for config in space(target, dtype, shape):
            yield config | {"rows_each": 2 * config["rows_each"]}

    return configurations


MODULE = "layer_norm.triton_kernels"
KERNELS = (
    Kernel(
        "layer_norm_fwd",
        "forward",
        f"{MODULE}:layer_norm_fwd",
        forward_arguments,
        forward_constexprs,
        space(False),
        "hidden",
    ),
    Kernel(
        "layer_norm_bwd",
        "backward",
        f"{MODULE}:layer_norm_bwd",
        backward_arguments,
        backward_constexprs,
        wider(space(True)),
        "hidden",
        inputs=2,
        partial=lambda shape: 2 * shape["hidden"],
    ),
    column_sum("layer_norm_sum"),
)


def inputs(make, shape: Shape) -> tuple:
    h = shape["hidden"]
    return make.normal(shape["rows"], h), make.scale(h), make.normal(h), 1e-5


OPERATOR = Operator("layer_norm", ("rows", "hidden"), KERNELS, floor, CHECKS, inputs, flops=6)
