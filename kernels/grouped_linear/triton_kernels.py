"""Products of rows that are sorted by expert: expert e has the rows OFF[e] .. OFF[e + 1].

How many rows an expert has is known on the device alone. So a launch has as many programs as there could be tiles of
rows at most, and each finds its expert from the offsets; those that are too many end at once. No atomics: a weight's
gradient is one program's sum over the rows of its expert, in their order.
"""

import triton
import triton.language as tl


@triton.jit
def grouped_mm(
    X, W, OFF, BIAS, T, B, Y, scale, N, K, R, E,
    sx, sw_e, sw_k, sw_n, st, sb_e, sb_r, sb_n, sy, sbias,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
    HAS_BIAS: tl.constexpr, LORA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = scale * X W_e + BIAS_e + T B_e for the rows of each expert; W_e [K, N] and B_e [R, N] by their strides."""
    pid = tl.program_id(0)
    experts = tl.arange(0, BE)
    there = experts < E
    first = tl.load(OFF + experts, mask=there, other=0)
    last = tl.load(OFF + experts + 1, mask=there, other=0)
    tiles = (last - first + BM - 1) // BM
    ends = tl.cumsum(tiles, 0)
    e = tl.sum((ends <= pid).to(tl.int32), 0)
    if e >= E:
        return
    mine = experts == e
    before = tl.sum(tl.where(mine, ends - tiles, 0), 0)
    end = tl.sum(tl.where(mine, last, 0), 0)
    m = tl.sum(tl.where(mine, first, 0), 0) + (pid - before) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    rows, columns, e64 = m.to(tl.int64), n.to(tl.int64), e.to(tl.int64)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(0, K, BK):
        k = start + tl.arange(0, BK)
        x = tl.load(X + rows[:, None] * sx + k[None, :], mask=(m < end)[:, None] & (k < K)[None, :], other=0.0)
        w = tl.load(
            W + e64 * sw_e + k.to(tl.int64)[:, None] * sw_k + columns[None, :] * sw_n,
            mask=(k < K)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    acc = acc * tl.cast(scale, tl.float32)
    if LORA:
        for start in range(0, R, BR):
            r = start + tl.arange(0, BR)
            t = tl.load(T + rows[:, None] * st + r[None, :], mask=(m < end)[:, None] & (r < R)[None, :], other=0.0)
            b = tl.load(
                B + e64 * sb_e + r.to(tl.int64)[:, None] * sb_r + columns[None, :] * sb_n,
                mask=(r < R)[:, None] & (n < N)[None, :],
                other=0.0,
            )
            acc = tl.dot(t, b, acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(BIAS + e64 * sbias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        Y + rows[:, None] * sy + n[None, :], acc.to(Y.dtype.element_ty), mask=(m < end)[:, None] & (n < N)[None, :]
    )


@triton.jit
def grouped_outer(
    A, C, OFF, OUT, scale, M, N, sa, sc, so_e, so_m, so_n,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """OUT_e [M, N] = scale * A^T C over the rows of expert e; A [rows, M], C [rows, N]; no rows give zeros."""
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    e = tl.program_id(2)
    end = tl.load(OFF + e + 1)
    acc = tl.zeros((BM, BN), tl.float32)
    for start in range(tl.load(OFF + e), end, BK):
        k = start + tl.arange(0, BK)
        rows = k.to(tl.int64)
        a = tl.load(A + rows[None, :] * sa + m[:, None], mask=(k < end)[None, :] & (m < M)[:, None], other=0.0)
        c = tl.load(C + rows[:, None] * sc + n[None, :], mask=(k < end)[:, None] & (n < N)[None, :], other=0.0)
        acc = tl.dot(a, c, acc, input_precision=PRECISION)
    at = OUT + e.to(tl.int64) * so_e + m.to(tl.int64)[:, None] * so_m + n.to(tl.int64)[None, :] * so_n
    tl.store(at, (acc * tl.cast(scale, tl.float32)).to(OUT.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
