"""Launch parameters, configuration space and traffic of the LoRA epilogue."""

from aifactory_train.kernels.spec import ITEMSIZE, Config, Kernel, Operator, Shape, next_pow2


def arguments(dtype: str, shape: Shape) -> dict:
    p, n, r = "*" + dtype, shape["out"], shape["rank"]
    return {
        "Y": p,
        "T": p,
        "B": p,
        "scale": "fp32",
        "M": shape["rows"],
        "N": n,
        "R": r,
        "sy": n,
        "st": r,
        "sb_r": 1,
        "sb_n": r,
    }


def backward_arguments(dtype: str, shape: Shape) -> dict:
    """The same kernel on dx: N is the input width and lora_A lies the other way round."""
    k, r = shape["in"], shape["rank"]
    return arguments(dtype, shape) | {"N": k, "sy": k, "st": r, "sb_r": k, "sb_n": 1}


def constexprs(config: Config, dtype: str, shape: Shape) -> dict:
    """fp32 inputs are multiplied exactly (ieee); half inputs go to the matrix units, where the setting has no
    effect.
    """
    return {
        "BM": config["block_m"], "BN": config["block_n"],
        "BR": max(16, min(int(config["block_r"]), next_pow2(shape["rank"]))), "PRECISION": "ieee",
    }  # fmt: skip


def space(target, dtype: str, shape: Shape):
    for bm in (32, 64, 128):
        for bn in (64, 128):
            for warps in (4, 8):
                each = bm * bn // (warps * target.wave)
                if 8 <= each <= (32 if dtype == "fp32" else 64):
                    yield {"block_m": bm, "block_n": bn, "block_r": 32 if dtype == "fp32" else 64, "num_warps": warps,
                           "num_stages": 1}  # fmt: skip


def floor(direction: str, dtype: str, shape: Shape) -> int:
    """The GEMM's output is read and written once: 2 passes over [N, M]; T and B are thin. Bytes."""
    return 2 * ITEMSIZE[dtype] * shape["rows"] * shape["out" if direction == "forward" else "in"]


def inputs(make, shape: Shape) -> tuple:
    n, k, m, r = shape["rows"], shape["in"], shape["out"], shape["rank"]
    return make.normal(n, k), make.normal(m, k, scale=k**-0.5), make.normal(r, k, scale=k**-0.5), make.normal(m, r), 2.0


def elements(constants) -> int:
    return constants["BM"] * constants["BN"]


MODULE = "lora_linear.triton_kernels:lora_epilogue"
KERNELS = (
    Kernel("lora_linear_fwd", "forward", MODULE, arguments, constexprs, space, "out", matrix=True, tile=elements),
    Kernel(
        "lora_linear_bwd", "backward", MODULE, backward_arguments, constexprs, space, "in", matrix=True, tile=elements
    ),
)
CHECKS = tuple(
    {"rows": 8191, "in": i, "out": o, "rank": r}
    for i, o, r in (
        (2048, 2048, 16), (4096, 4096, 16), (4096, 4096, 64), (5120, 5120, 16), (8192, 8192, 16), (16384, 16384, 16),
        (4096, 14336, 16), (8192, 28672, 128),
    )
)  # fmt: skip
OPERATOR = Operator(
    "lora_linear", ("rows", "in", "out", "rank"), KERNELS, floor, CHECKS, inputs, pointwise=False,
    counted=("forward",), shrink={"in": 32}, eager=False,
    note="epilogue around the vendor's GEMM",
)  # fmt: skip
