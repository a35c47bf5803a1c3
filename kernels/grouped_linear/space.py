"""Launch parameters, configuration space and traffic of the grouped linear."""

import itertools
from collections.abc import Callable, Iterable

from aifactory_train.kernels.hardware import Target
from aifactory_train.kernels.spec import ITEMSIZE, Config, Kernel, Operator, Shape, next_pow2

MODULE = "grouped_linear.triton_kernels"
#: The products, then the thin ones with the adapters' matrices, then what sums over the rows of an expert.
FORWARD, BACKWARD, DOWN, BACK = "grouped_fwd", "grouped_bwd", "grouped_fwd_thin", "grouped_bwd_thin"
WEIGHT, LORA_A, LORA_B = "grouped_weight", "grouped_lora_a", "grouped_lora_b"


def sizes(name: str, shape: Shape) -> tuple[int, int, int]:
    """(columns, length, rank) of the product ``name``: [rows, length] x [length, columns] + [rows, rank] x ...; of a
    sum over rows (rows of the result, columns, 0)."""
    k, m, r = shape["in"], shape["out"], shape["rank"]
    return {
        FORWARD: (m, k, r),
        BACKWARD: (k, m, r),
        DOWN: (r, k, 0),
        BACK: (r, m, 0),
        WEIGHT: (m, k, 0),
        LORA_A: (r, k, 0),
        LORA_B: (m, r, 0),
    }[name]


def constants(name: str, config: Config, shape: Shape) -> dict:
    """Compile-time arguments of the kernel ``name``. fp32 is multiplied exactly (ieee), half types are unaffected."""
    tiles = {"BM": config["block_m"], "BN": config["block_n"], "BK": config["block_k"]}
    if name in (WEIGHT, LORA_A, LORA_B):
        return tiles | {"PRECISION": "ieee"}
    rank = sizes(name, shape)[2]
    return tiles | {
        "BR": max(16, min(int(config["block_k"]), next_pow2(rank or 1))),
        "BE": next_pow2(shape["experts"]),
        "HAS_BIAS": name == FORWARD and bool(shape["bias"]),
        "LORA": rank > 0,
        "PRECISION": "ieee",
    }


def _product(name: str) -> Callable[[str, Shape], dict[str, str | int]]:
    def arguments(dtype: str, shape: Shape) -> dict[str, str | int]:
        n, k, r = sizes(name, shape)
        p, whole = "*" + dtype, shape["in"] * shape["out"]
        forward = name in (FORWARD, DOWN)  # W lies as [out, in]: what is walked is contiguous forward
        wide = whole if name in (FORWARD, BACKWARD) else n * k
        return {
            "X": p, "W": p, "OFF": "*i32", "BIAS": p, "T": p, "B": p, "Y": p, "scale": "fp32",
            "N": n, "K": k, "R": r or 17, "E": shape["experts"],
            "sx": k, "sw_e": wide, "sw_k": 1 if forward else n, "sw_n": k if forward else 1,
            "st": r or 17, "sb_e": n * (r or 1), "sb_r": 1 if forward else n, "sb_n": (r or 1) if forward else 1,
            "sy": n, "sbias": n,
        }  # fmt: skip

    return arguments


def _sum(name: str) -> Callable[[str, Shape], dict[str, str | int]]:
    def arguments(dtype: str, shape: Shape) -> dict[str, str | int]:
        m, n, _ = sizes(name, shape)
        p = "*" + dtype
        return {"A": p, "C": p, "OFF": "*i32", "OUT": p, "scale": "fp32", "M": m, "N": n, "sa": m, "sc": n,
                "so_e": m * n, "so_m": n, "so_n": 1}  # fmt: skip

    return arguments


def _space(name: str) -> Callable[[Target, str, Shape], Iterable[Config]]:
    """Tiles whose sums fit into a lane's registers; thin ones as narrow as a rank."""

    def space(target: Target, dtype: str, shape: Shape) -> Iterable[Config]:
        item = ITEMSIZE[dtype]
        first, second, _ = sizes(name, shape)
        over_rows = name in (WEIGHT, LORA_A, LORA_B)
        rows_of, columns_of = (first, second) if over_rows else (1 << 30, first)

        def fit(wide: tuple[int, ...], size: int) -> tuple[int, ...]:
            """The sizes up to the first that holds all."""
            return tuple(w for w in wide if w < 2 * max(16, next_pow2(size)))

        stages = 3 if target.wave == 32 and dtype != "fp32" else 1
        wide = itertools.product(fit((128, 64, 32, 16), rows_of), fit((128, 64, 32, 16), columns_of), (64, 32), (4, 8))
        for bm, bn, bk, warps in sorted(wide, key=lambda size: -size[0] * size[1]):
            lanes = warps * target.wave
            each = bm * bn // lanes
            loads = (bm + bn) * bk // lanes
            most = 32 if dtype == "fp32" else 64
            if each > most or each < 1 or loads * item > 128 or (bm + bn) * bk * item < 16 * lanes:
                continue
            if stages * (bm + bn) * bk * item <= target.block_memory and bm * bn >= 16 * 16 * warps // 4:
                yield {"block_m": bm, "block_n": bn, "block_k": bk, "num_warps": warps, "num_stages": stages}

    return space


def covers(dtype: str, shape: Shape) -> bool:
    """Whether there are kernels for so many experts: a program reads all bounds at once."""
    return shape["experts"] <= 1024


def floor(direction: str, dtype: str, shape: Shape) -> int:
    """Forward: the experts' matrices, the rows and the result once. Backward: rows and gradient of the result for the
    sums over rows, matrices and both gradients for the rows' gradient. Bytes; what adapters add is thin and left out,
    as are their own gradients."""
    item, n = ITEMSIZE[dtype], shape["rows"]
    weights, x, y = shape["experts"] * shape["in"] * shape["out"], n * shape["in"], n * shape["out"]
    if direction == "forward":
        return item * (weights + x + y)
    return item * (2 * weights + 2 * x + 2 * y)


def inputs(make, shape: Shape) -> tuple:
    """Rows dealt unevenly, but each expert gets some where there are two for each: none else in turn."""
    import torch

    n, e, k, m, r = (shape[key] for key in ("rows", "experts", "in", "out", "rank"))
    counts = [n // e] * e
    counts[0] += n - sum(counts)
    if n >= 2 * e and e > 1:
        counts[0], counts[1] = counts[0] + counts[1] - 1, 1
    offsets = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
    lora = (make.normal(e, r, k, scale=k**-0.5), make.normal(e, m, r)) if r else (None, None)
    bias = make.normal(e, m) if shape["bias"] else None
    return make.normal(n, k), make.normal(e, m, k, scale=k**-0.5), offsets, *lora, 2.0, bias


def elements(constants) -> int:
    return (constants["BM"] + constants["BN"]) * constants["BK"] // 2


def _kernel(name: str, direction: str, key: str) -> Kernel:
    over_rows = name in (WEIGHT, LORA_A, LORA_B)
    return Kernel(
        name, direction, f"{MODULE}:{'grouped_outer' if over_rows else 'grouped_mm'}",
        _sum(name) if over_rows else _product(name), lambda config, dtype, shape: constants(name, config, shape),
        _space(name), key, matrix=True, inputs=2, tile=elements, thin=True,
    )  # fmt: skip


KERNELS = (
    _kernel(DOWN, "forward", "in"),
    _kernel(FORWARD, "forward", "out"),
    _kernel(BACK, "backward", "out"),
    _kernel(BACKWARD, "backward", "in"),
    _kernel(WEIGHT, "backward", "out"),
    _kernel(LORA_A, "backward", "in"),
    _kernel(LORA_B, "backward", "out"),
)

DIMS = ("rows", "experts", "in", "out", "rank", "bias")


def _shape(experts: int, wide: int, out: int, rank: int = 16, bias: int = 0, rows: int = 8191) -> dict[str, int]:
    return {"rows": rows, "experts": experts, "in": wide, "out": out, "rank": rank, "bias": bias}


#: Qwen3-30B-A3B (gate and up, down); Mixtral 8x7B; gpt-oss-20b; OLMoE; DeepSeek-V3
CHECKS = (
    _shape(128, 2048, 1536), _shape(128, 768, 2048), _shape(8, 4096, 28672), _shape(8, 14336, 4096, 64),
    _shape(32, 2880, 5760, 16, 1), _shape(64, 2048, 2048, 32), _shape(256, 7168, 4096, 16),
)  # fmt: skip
SMALL = (
    _shape(3, 48, 80, 4, 0, 37), _shape(4, 33, 20, 8, 1, 70), _shape(4, 24, 40, 4, 1, 3), _shape(2, 32, 16, 4, 0, 0),
)  # fmt: skip
OPERATOR = Operator(
    "grouped_linear", DIMS, KERNELS, floor, CHECKS, inputs, pointwise=False, small=SMALL, eager=False, covers=covers,
    shrink={"in": 64, "out": 32, "experts": 4},
    dry=False,  # the bounds of the experts decide what is read
    note="experts' linear layers over sorted rows, with adapters; no atomics, no waiting for the device",
)  # fmt: skip
