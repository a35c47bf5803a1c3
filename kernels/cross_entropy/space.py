"""Launch parameters, configuration space and traffic of the cross-entropy kernels."""

from aifactory_train.kernels.spec import ITEMSIZE, Config, Kernel, Operator, Shape, next_pow2, tile_space

VOCABULARIES = (32000, 128256, 151936, 262144)


def forward_arguments(dtype: str, shape: Shape) -> dict:
    return fused_arguments(dtype, shape) | {"LSE": "*fp32"}


def backward_arguments(dtype: str, shape: Shape) -> dict:
    v, p = shape["vocab"], "*" + dtype
    return {
        "G": "*fp32", "X": p, "L": "*i64", "LSE": "*fp32", "DX": p, "sg": 1, "sx": v, "sdx": v, "n_cols": v,
        "scale": "fp32", "softcap": "fp32",
    }  # fmt: skip


def fused_arguments(dtype: str, shape: Shape) -> dict:
    v = shape["vocab"]
    return {"X": "*" + dtype, "L": "*i64", "LOSS": "*fp32", "sx": v, "n_cols": v, "scale": "fp32", "softcap": "fp32"}


def block(config: Config, vocab: int) -> int:
    """Tile width: the configured one, or the row's next power of two when the row is shorter."""
    return min(int(config["block"]), next_pow2(vocab))


def constexprs(config: Config, dtype: str, shape: Shape) -> dict:
    return {"CAP": False, "BLOCK": block(config, shape["vocab"])}


def row_space(target, dtype: str, shape: Shape):
    """One program walks a whole row: tiles of 4096 to 32768, as many warps as can load 16 bytes a lane."""
    for size in (4096, 8192, 16384):
        for warps in (4, 8, 16, 32):
            lanes = warps * target.wave
            if lanes <= 1024 and lanes * 16 <= size * ITEMSIZE[dtype] and size // lanes <= 32:
                yield {"block": size, "num_warps": warps, "num_stages": 1}


def tiles(target, dtype: str, shape: Shape):
    return tile_space(target, dtype, shape["vocab"])


def floor(direction: str, dtype: str, shape: Shape) -> int:
    """Forward reads the logits once, backward reads them again and writes the gradient; bytes."""
    return (1 if direction == "forward" else 2) * ITEMSIZE[dtype] * shape["rows"] * shape["vocab"]


def inputs(make, shape: Shape) -> tuple:
    return make.normal(shape["rows"], shape["vocab"]), make.labels(shape["rows"], classes=shape["vocab"])


MODULE = "cross_entropy.triton_kernels"
KERNELS = (
    Kernel("cross_entropy_fwd", "forward", f"{MODULE}:ce_fwd", forward_arguments, constexprs, row_space, "vocab"),
    Kernel("cross_entropy_bwd", "backward", f"{MODULE}:ce_bwd", backward_arguments, constexprs, tiles, "vocab"),
)
CHECKS = tuple({"rows": 4095, "vocab": v} for v in VOCABULARIES)
OPERATOR = Operator(
    "cross_entropy", ("rows", "vocab"), KERNELS, floor, CHECKS, inputs, options={"reduction": "none"}, flops=5
)
