"""Launch parameters, configuration space and traffic of attention."""

import itertools
from collections.abc import Callable, Iterable

from aifactory_train.kernels.hardware import Target
from aifactory_train.kernels.spec import ITEMSIZE, Config, Kernel, Operator, Shape, next_pow2

MODULE = "attention.triton_kernels"
FORWARD, DELTA, QUERIES, KEYS = "attention_fwd", "attention_delta", "attention_bwd_q", "attention_bwd_kv"


def width(dim: int) -> int:
    """Columns of a tile that holds heads of ``dim`` numbers: matrix units want at least 16."""
    return max(16, next_pow2(dim))


def constants(name: str, config: Config, shape: Shape) -> dict:
    """Compile-time arguments of the kernel ``name``. fp32 is multiplied exactly (ieee), half types are unaffected."""
    wide = width(shape["head_dim"])
    if name == DELTA:
        return {"BM": config["block_m"], "BV": wide}
    switches = {
        "WINDOW": bool(shape["window"]),
        "CHUNK": bool(shape["chunk"]),
        "SOFTCAP": bool(shape["softcap"]),
        "SLOPES": bool(shape["slopes"]),
    } | ({"SINK": bool(shape["sinks"])} if name == FORWARD else {})
    tiles = {"BM": config["block_m"], "BN": config["block_n"], "BD": wide, "BV": wide}
    return tiles | switches | {"PRECISION": "ieee"}


def _arguments(pointers: tuple[str, ...], strides: tuple[str, ...], whole: tuple[str, ...]) -> Callable[..., dict]:
    """The run-time arguments of a kernel: tensors, strides (tokens and heads of each), and the common ones."""

    def arguments(dtype: str, shape: Shape) -> dict:
        n, h, kv, d = (shape[key] for key in ("rows", "heads", "kv_heads", "head_dim"))
        kinds = {"CU": "*i32", "LSE": "*fp32", "DELTA": "*fp32"}
        found: dict = {p: kinds.get(p, "*" + dtype) for p in pointers}
        for s in strides:  # the key heads are fewer
            found |= {f"{s}_n": (kv if s in ("sk", "sv", "sok", "sov") else h) * d, f"{s}_h": d}
        values = {"rows": n, "groups": h // kv, "dim": d, "vdim": d, "scale": "fp32", "softcap": "fp32",
                  "window": shape["window"] or 17, "chunk": shape["chunk"] or 17}  # fmt: skip
        return found | {w: values[w] for w in whole}

    return arguments


_WHOLE = ("rows", "groups", "dim", "vdim", "scale", "softcap", "window", "chunk")


#: Heads up to this width are compiled in fp32, which has no matrix unit on NVIDIA GPUs: wider ones would spill, and
#: take the torch path.
WIDEST_FP32 = 128

#: Registers that a lane of the keys' kernel may take on NVIDIA GPUs. Without being told, the assembler keeps to 128, so
#: that two blocks fit, and spills.
WIDE_LANES = 224

#: Sums that a lane may keep, by kernel: waves of 32, of 64, and both in fp32. From compiling for every target.
_SUMS = {FORWARD: (128, 128, 32, 64), QUERIES: (50, 128, 24, 64), KEYS: (80, 40, 20, 20)}


def tiles(kernel: str) -> Callable[[Target, str, Shape], Iterable[Config]]:
    """A kernel's tiles whose sums fit into a lane's registers: as wide as a head, over queries, or over keys twice."""
    each = 2 if kernel == KEYS else 1

    def space(target: Target, dtype: str, shape: Shape) -> Iterable[Config]:
        wide, item = width(shape["head_dim"]), ITEMSIZE[dtype]
        most = _SUMS[kernel][(target.wave == 64) + 2 * (dtype == "fp32")] * (0.74 if wide > 128 else 1)
        if shape["softcap"] and kernel == KEYS and dtype != "fp32":
            most *= 0.58  # the cap's slope is held beside the sums
        if dtype == "fp32" and kernel == FORWARD and wide > 64 and target.wave == 32:
            most = 30
        if kernel == QUERIES and sum(bool(shape[key]) for key in ("window", "chunk", "softcap", "slopes")) > 2:
            most *= 0.74
        roomy = kernel == KEYS and target.backend == "cuda" and wide == 128
        roomy = roomy and (dtype == "fp32" or not shape["softcap"])
        tall = (128, 64, 32, 16) if each == 1 else (32, 16) if dtype == "fp32" else (64, 32, 16)
        sizes = itertools.product(tall, (64, 32, 16), (4, 8))
        for bm, bn, warps in sorted(sizes, key=lambda size: -size[0] * size[1]):
            lanes = warps * target.wave
            held = each * (bm if each == 1 else bn) * wide // lanes + 2 * bm * bn // lanes
            memory = 2 * (bm + bn) * wide * item
            if held <= most and memory <= target.block_memory and bm * bn >= 2 * lanes and bm >= 4 * warps:
                found = {"block_m": bm, "block_n": bn, "num_warps": warps, "num_stages": 1}
                yield found | ({"maxnreg": WIDE_LANES} if roomy and warps == 8 else {})

    return space


def covers(dtype: str, shape: Shape) -> bool:
    """Whether the kernels are made for heads of this width in this dtype."""
    return dtype != "fp32" or width(shape["head_dim"]) <= WIDEST_FP32


def delta_space(target: Target, dtype: str, shape: Shape) -> Iterable[Config]:
    wide = width(shape["head_dim"])
    for bm, warps in itertools.product((64, 32, 16, 128), (4, 2, 8)):
        lanes = warps * target.wave
        if lanes * 16 <= bm * wide * ITEMSIZE[dtype] and bm * wide // lanes <= 32:
            yield {"block_m": bm, "num_warps": warps, "num_stages": 1}


def floor(direction: str, dtype: str, shape: Shape) -> int:
    """Forward: queries, keys, values and the result once, 4 bytes a query for the logarithm. Backward without atomics:
    one pass makes the queries' gradient and one that of keys and values, so each reads all operands; a third, over
    result and its gradient, makes a number a query. Bytes."""
    n, h, kv, d = (shape[key] for key in ("rows", "heads", "kv_heads", "head_dim"))
    q, k = ITEMSIZE[dtype] * n * h * d, ITEMSIZE[dtype] * n * kv * d
    if direction == "forward":
        return 2 * q + 2 * k + 4 * n * h
    return (2 * q + 4 * n * h) + (3 * q + 2 * k + 8 * n * h) + (2 * q + 4 * k + 8 * n * h)


def inputs(make, shape: Shape) -> tuple:
    """Three documents, the first of one token; softcap and scale are small enough to matter."""
    import torch

    n, h, kv, d = (shape[key] for key in ("rows", "heads", "kv_heads", "head_dim"))
    bounds = sorted({0, min(1, n), n // 3, n}) if n else [0]
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    return (
        make.normal(n, h, d), make.normal(n, kv, d), make.normal(n, kv, d), torch.tensor(bounds, dtype=torch.int32),
        max(lengths, default=0), make.normal(h) if shape["sinks"] else None,
        make.fixed(h).abs() / 8 if shape["slopes"] else None, None, shape["window"], shape["chunk"],
        2.0 if shape["softcap"] else 0.0,
    )  # fmt: skip


KERNELS = (
    Kernel(
        FORWARD, "forward", f"{MODULE}:{FORWARD}",
        _arguments(("Q", "K", "V", "SINKS", "SLOPE", "CU", "OUT", "LSE"), ("sq", "sk", "sv", "so"), _WHOLE),
        lambda config, dtype, shape: constants(FORWARD, config, shape), tiles(FORWARD), "head_dim", matrix=True,
        inputs=3, ranges=(64, 128),
    ),
    Kernel(
        DELTA, "backward", f"{MODULE}:{DELTA}",
        _arguments(("OUT", "DO", "DELTA"), ("so", "sd"), ("rows", "vdim")),
        lambda config, dtype, shape: constants(DELTA, config, shape), delta_space, "head_dim", inputs=2,
        ranges=(64, 128),
    ),
    Kernel(
        QUERIES, "backward", f"{MODULE}:{QUERIES}",
        _arguments(
            ("Q", "K", "V", "SLOPE", "CU", "DO", "LSE", "DELTA", "DQ"), ("sq", "sk", "sv", "sd", "so"), _WHOLE
        ),
        lambda config, dtype, shape: constants(QUERIES, config, shape), tiles(QUERIES), "head_dim", matrix=True,
        inputs=4, ranges=(64, 128),
    ),
    Kernel(
        KEYS, "backward", f"{MODULE}:{KEYS}",
        _arguments(
            ("Q", "K", "V", "SLOPE", "CU", "DO", "LSE", "DELTA", "DK", "DV"),
            ("sq", "sk", "sv", "sd", "sok", "sov"), _WHOLE,
        ),
        lambda config, dtype, shape: constants(KEYS, config, shape), tiles(KEYS), "head_dim", matrix=True,
        inputs=4, ranges=(64, 128), thin=True,
    ),
)  # fmt: skip

DIMS = ("rows", "heads", "kv_heads", "head_dim", "window", "chunk", "softcap", "sinks", "slopes")
_PLAIN = {"rows": 8191, "heads": 32, "kv_heads": 8, "head_dim": 128, "window": 0, "chunk": 0, "softcap": 0, "sinks": 0,
          "slopes": 0}  # fmt: skip
#: Llama 3; gpt-oss; Gemma 2 and 3; Phi-3 (96); Llama 4 (chunks); Bloom (ALiBi); 80 as in Phi-2; each option by itself
CHECKS = (
    _PLAIN,
    _PLAIN | {"window": 4096},
    _PLAIN | {"softcap": 1},
    _PLAIN | {"heads": 64, "head_dim": 64, "sinks": 1},
    _PLAIN | {"heads": 64, "head_dim": 64, "window": 128, "sinks": 1},
    _PLAIN | {"heads": 32, "kv_heads": 32, "head_dim": 96},
    _PLAIN | {"heads": 40, "chunk": 8192},
    _PLAIN | {"kv_heads": 32, "slopes": 1},
    _PLAIN | {"kv_heads": 32, "head_dim": 80},
    _PLAIN | {"head_dim": 128, "window": 4096, "softcap": 1},
    _PLAIN | {"heads": 8, "kv_heads": 4, "head_dim": 256, "window": 4096, "softcap": 1},
)
_TINY = {"rows": 40, "heads": 4, "kv_heads": 2, "head_dim": 20, "window": 0, "chunk": 0, "softcap": 0, "sinks": 0,
         "slopes": 0}  # fmt: skip
SMALL = (
    _TINY,
    _TINY | {"rows": 0},
    _TINY | {"rows": 150, "head_dim": 16, "window": 9, "sinks": 1},
    _TINY | {"rows": 70, "chunk": 16, "softcap": 1, "slopes": 1},
    _TINY | {"rows": 33, "heads": 3, "kv_heads": 1, "head_dim": 48, "window": 200, "softcap": 1, "sinks": 1},
)
OPERATOR = Operator(
    "attention", DIMS, KERNELS, floor, CHECKS, inputs, pointwise=False, small=SMALL, eager=False, covers=covers,
    dry=False,  # the bounds of the documents decide what is read
    note="inside documents: windows, chunks, sinks, soft caps, ALiBi; no atomics",
)  # fmt: skip
