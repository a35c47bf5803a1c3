"""Launch parameters, configuration space and traffic of the gated activations."""

from aifactory_train.kernels.spec import ITEMSIZE, Kernel, Operator, Shape, tile_space


def forward_arguments(dtype: str, shape: Shape) -> dict:
    w, p = shape["width"], "*" + dtype
    return {"A": p, "B": p, "C": p, "sa": w, "sb": w, "sc": w, "n_cols": w}


def backward_arguments(dtype: str, shape: Shape) -> dict:
    w, p = shape["width"], "*" + dtype
    return {
        "DC": p, "A": p, "B": p, "DA": p, "DB": p, "sdc": w, "sa": w, "sb": w, "sda": w, "sdb": w, "n_cols": w,
    }  # fmt: skip


def constexprs(kind: int):
    return lambda config, dtype, shape: {"KIND": kind, "BLOCK": config["block"]}


def space(target, dtype: str, shape: Shape):
    return tile_space(target, dtype, shape["width"])


def floor(direction: str, dtype: str, shape: Shape) -> int:
    """Forward 3 passes over [N, I] (read gate and up, write the product), backward 5 (read 3, write 2); bytes."""
    return (3 if direction == "forward" else 5) * ITEMSIZE[dtype] * shape["rows"] * shape["width"]


def inputs(make, shape: Shape) -> tuple:
    n, w = shape["rows"], shape["width"]
    return make.normal(n, w), make.normal(n, w)


def build(op: str, kind: int, checks: tuple[dict[str, int], ...], flops: int) -> Operator:
    module = "swiglu.triton_kernels"
    kernels = (
        Kernel(
            f"{op}_fwd", "forward", f"{module}:glu_fwd", forward_arguments, constexprs(kind), space, "width", inputs=2
        ),
        Kernel(
            f"{op}_bwd", "backward", f"{module}:glu_bwd", backward_arguments, constexprs(kind), space, "width", inputs=3
        ),
    )
    return Operator(op, ("rows", "width"), kernels, floor, checks, inputs, flops=flops)


WIDTHS = (2048, 4096, 5120, 8192, 14336, 16384, 28672)
CHECKS = tuple({"rows": 8191, "width": w} for w in WIDTHS)
OPERATOR = build("swiglu", 0, CHECKS, flops=6)
