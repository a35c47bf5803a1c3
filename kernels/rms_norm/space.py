"""Launch parameters, configuration space and traffic of RMSNorm."""

from aifactory_train.kernels.spec import ITEMSIZE, Config, Kernel, Operator, Shape, row_space, split_row

#: floating-point operations an element
FLOPS = 4
HIDDEN = (128, 2048, 4096, 5120, 8192, 16384)


def sum_arguments(dtype: str, shape: Shape) -> dict:
    return {"P": "*fp32", "OUT": "*" + dtype, "n_rows": 264, "n_cols": shape.get("hidden", 256)}


def sum_constexprs(config: Config, dtype: str, shape: Shape) -> dict:
    return {"ROWS": config["rows"], "BLOCK": config["block"]}


def sum_space(target, dtype: str, shape: Shape):
    """Few columns a program: at hidden 4096 a block of 32 gives 128 programs, about one a unit."""
    for block, rows, warps in ((32, 32, 4), (64, 32, 4), (32, 64, 4), (128, 16, 4)):
        if rows * block * 4 >= warps * target.wave * 16:
            yield {"block": block, "rows": rows, "num_warps": warps, "num_stages": 1}


def column_sum(name: str) -> Kernel:
    """The finalising kernel of an operator that sums a gradient over rows."""
    return Kernel(name, "backward", "reduce:column_sum", sum_arguments, sum_constexprs, sum_space, "hidden")


def forward_arguments(residual: bool):
    def arguments(dtype: str, shape: Shape) -> dict:
        h, p = shape["hidden"], "*" + dtype
        return {
            "X": p, "RES": p, "W": p, "Y": p, "S": p, "R": "*fp32", "sx": h, "sres": h, "sy": h, "ss": h,
            "n_rows": shape["rows"], "n_cols": h, "eps": "fp32", "offset": "fp32",
        }  # fmt: skip

    return arguments


def forward_constexprs(residual: bool):
    def constexprs(config: Config, dtype: str, shape: Shape) -> dict:
        block, chunks = split_row(config, shape["hidden"])
        return {"HAS_RES": residual, "HAS_W": True, "ROWS": config["rows"], "BLOCK": block, "CHUNKS": chunks}

    return constexprs


def backward_arguments(dtype: str, shape: Shape) -> dict:
    h, p = shape["hidden"], "*" + dtype
    return {
        "DY": p, "DS": p, "X": p, "W": p, "R": "*fp32", "DX": p, "P": "*fp32", "sdy": h, "sds": h, "sx": h, "sdx": h,
        "n_rows": shape["rows"], "n_cols": h, "offset": "fp32",
    }  # fmt: skip


def backward_constexprs(residual: bool):
    def constexprs(config: Config, dtype: str, shape: Shape) -> dict:
        block, chunks = split_row(config, shape["hidden"])
        return {
            "HAS_DS": residual, "HAS_W": True, "ROWS": config["rows"], "BLOCK": block, "CHUNKS": chunks,
            "STAGES": config["stages"],
        }  # fmt: skip

    return constexprs


def space(backward: bool):
    return lambda target, dtype, shape: row_space(target, dtype, shape["hidden"], backward)


def kernels(op: str, residual: bool) -> tuple[Kernel, ...]:
    module = "rms_norm.triton_kernels"
    return (
        Kernel(
            f"{op}_fwd",
            "forward",
            f"{module}:rms_norm_fwd",
            forward_arguments(residual),
            forward_constexprs(residual),
            space(False),
            "hidden",
            inputs=2 if residual else 1,
        ),
        Kernel(
            f"{op}_bwd",
            "backward",
            f"{module}:rms_norm_bwd",
            backward_arguments,
            backward_constexprs(residual),
            space(True),
            "hidden",
            inputs=3 if residual else 2,
        ),
        column_sum(f"{op}_sum"),
    )


def floor(direction: str, dtype: str, shape: Shape) -> int:
    """Forward 2 passes over [N, H] (read x, write y), backward 3 (read dy and x, write dx); bytes."""
    return (2 if direction == "forward" else 3) * ITEMSIZE[dtype] * shape["rows"] * shape["hidden"]


def inputs(make, shape: Shape) -> tuple:
    return make.normal(shape["rows"], shape["hidden"]), make.scale(shape["hidden"]), 1e-6


CHECKS = tuple({"rows": 8191, "hidden": h} for h in HIDDEN)
OPERATOR = Operator("rms_norm", ("rows", "hidden"), kernels("rms_norm", False), floor, CHECKS, inputs, flops=FLOPS)
