"""Launch parameters, configuration space and traffic of RoPE."""

from aifactory_train.kernels.rms_norm.space import sum_constexprs, sum_space
from aifactory_train.kernels.spec import ITEMSIZE, Config, Kernel, Operator, Shape, next_pow2


def _strides(name: str, heads: int, dim: int) -> dict[str, int]:
    """Strides of [B, heads, S, D] as attention makes it: a transposed view of [B, S, heads, D] with S = 4096."""
    return {f"{name}_b": 4096 * heads * dim, f"{name}_h": dim, f"{name}_s": heads * dim}


def forward_arguments(dtype: str, shape: Shape) -> dict:
    q, k, dim, p = shape["heads"], shape["kv_heads"], shape["head_dim"], "*" + dtype
    return {
        **dict.fromkeys(("Q", "K", "COS", "SIN", "QW", "KW", "QO", "KO"), p),
        **_strides("sq", q, dim),
        **_strides("sk", k, dim),
        **_strides("sqo", q, dim),
        **_strides("sko", k, dim),
        "sc_b": 0,
        "sc_s": dim,
        "seq": 4096,
        "q_heads": q,
        "k_heads": k,
        "half": dim // 2,
        "eps": "fp32",
        "offset": "fp32",
    }


def backward_arguments(dtype: str, shape: Shape) -> dict:
    q, k, dim, p = shape["heads"], shape["kv_heads"], shape["head_dim"], "*" + dtype
    forward = forward_arguments(dtype, shape)
    return {
        **forward,
        **dict.fromkeys(("DQO", "DKO", "DQ", "DK"), p),
        "P": "*fp32", **_strides("sdq", q, dim), **_strides("sdk", k, dim), "tokens": shape["rows"],
    }  # fmt: skip


def tiles(config: Config, shape: Shape) -> dict[str, int]:
    return {"HEADS": config["heads"], "HALF": next_pow2(shape["head_dim"] // 2)}


def constexprs(sign: int, norm: bool):
    return lambda config, dtype, shape: {"SIGN": sign, "HAS_NORM": norm, **tiles(config, shape)}


def norm_constexprs(config: Config, dtype: str, shape: Shape) -> dict:
    return tiles(config, shape)


def space(target, dtype: str, shape: Shape):
    """A few heads at a time, as many as give every lane 16 bytes (fewer heads would narrow its loads) and not many
    more.
    """
    for heads in (4, 8, 16, 32):
        for warps in (1, 2, 4):
            each = heads * next_pow2(shape["head_dim"] // 2) * ITEMSIZE[dtype] // (warps * target.wave)
            if 16 <= each <= 64:
                yield {"heads": heads, "num_warps": warps, "num_stages": 1}


def norm_space(target, dtype: str, shape: Shape):
    for config in space(target, dtype, shape):
        yield config | {"grid_mult": 4, "rows_each": 8}


def sum_arguments(dtype: str, shape: Shape) -> dict:
    return {"P": "*fp32", "OUT": "*" + dtype, "n_rows": 264, "n_cols": 2 * shape["head_dim"]}


def floor(direction: str, dtype: str, shape: Shape) -> int:
    """Read and write queries and keys once: 2 passes over N (Hq + Hk) D; bytes. cos and sin are not counted as
    unavoidable.
    """
    return 2 * ITEMSIZE[dtype] * shape["rows"] * (shape["heads"] + shape["kv_heads"]) * shape["head_dim"]


def inputs(make, shape: Shape) -> tuple:
    """Queries and keys as attention makes them: transposed views, so that the heads are strided."""
    n, dim = shape["rows"], shape["head_dim"]
    q, k = make.heads(n, shape["heads"], dim), make.heads(n, shape["kv_heads"], dim)
    return q, k, *make.rotation(n, dim)


def elements(constants) -> int:
    return 2 * constants["HALF"] * constants["HEADS"]


MODULE = "rope.triton_kernels"
KERNELS = (
    Kernel("rope_fwd", "forward", f"{MODULE}:rope_fwd", forward_arguments, constexprs(1, False), space, "head_dim",
           tile=elements),
    Kernel("rope_bwd", "backward", f"{MODULE}:rope_fwd", forward_arguments, constexprs(-1, False), space, "head_dim",
           tile=elements),
    Kernel("rope_norm_fwd", "forward", f"{MODULE}:rope_fwd", forward_arguments,
           constexprs(1, True), space, "head_dim", tile=elements),
    Kernel("rope_norm_bwd", "backward", f"{MODULE}:rope_norm_bwd", backward_arguments, norm_constexprs, norm_space, "head_dim", inputs=2,  # noqa: E501
           tile=elements, partial=lambda shape: 2 * shape["head_dim"]),
    Kernel("rope_sum", "backward", "reduce:column_sum", sum_arguments, sum_constexprs, sum_space, "head_dim"),
)  # fmt: skip

# heads x kv_heads x head_dim of the models in the acceptance list: hidden 2048 to 16384 at head_dim 64, 128 and 256
CHECKS = tuple(
    {"rows": 8191, "heads": h, "kv_heads": k, "head_dim": d}
    for h, k, d in ((32, 8, 64), (32, 8, 128), (40, 8, 128), (64, 8, 128), (128, 8, 128), (8, 4, 256))
)
OPERATOR = Operator("rope", ("rows", "heads", "kv_heads", "head_dim"), KERNELS, floor, CHECKS, inputs, flops=3)
