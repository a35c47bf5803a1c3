"""Attention inside documents, one program a block of one document and head; nothing but a number a query is kept.

A document is cu[z] .. cu[z + 1]; its places count from 0. Scores are kept in powers of two (times log2 e), so that
exp2 is all that the units for exponentials do. A block of queries walks the blocks of keys that any of its queries may
see; the gradient of keys and values walks the queries that may see any of its keys, over all heads that share them: no
atomics. Backward makes the probabilities again from the logarithm of their sum.
"""

import triton
import triton.language as tl

from aifactory_train.kernels.cross_entropy.triton_kernels import _tanh

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _seen(m, n, length, window, chunk, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """Which keys ``n`` (a row) the queries ``m`` (a column) see."""
    ok = (n <= m) & (m < length)
    if WINDOW:
        ok = ok & (n > m - window)
    if CHUNK:
        ok = ok & (n // chunk == m // chunk)
    return ok


@triton.jit
def _scores(dots, m, n, scale, softcap, slope, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr):
    """(scores times log2 e, the capped scores / cap) of products of queries and keys."""
    s = dots * scale
    capped = s
    if SOFTCAP:
        capped = _tanh(s / softcap)
        s = capped * softcap
    if SLOPES:
        s += slope * (n - m).to(tl.float32)
    return s * LOG2E, capped


@triton.jit
def attention_fwd(
    Q, K, V, SINKS, SLOPE, CU, OUT, LSE,
    sq_n, sq_h, sk_n, sk_h, sv_n, sv_h, so_n, so_h, rows, groups, dim, vdim, scale, softcap, window, chunk,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, SINK: tl.constexpr, SLOPES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    h, z = tl.program_id(1), tl.program_id(2)
    start = tl.load(CU + z).to(tl.int64)
    length = (tl.load(CU + z + 1).to(tl.int64) - start).to(tl.int32)
    m0 = tl.program_id(0) * BM
    if m0 >= length:
        return
    m, d, e = m0 + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    h64 = h.to(tl.int64)
    kv = (h // groups).to(tl.int64)
    scale32, cap32 = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    slope = 0.0
    if SLOPES:
        slope = tl.load(SLOPE + h).to(tl.float32)
    at = (start + m).to(tl.int64)[:, None]
    q = tl.load(Q + at * sq_n + h64 * sq_h + d[None, :], mask=(m < length)[:, None] & (d < dim)[None, :], other=0.0)
    top = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    if SINK:
        top = tl.zeros((BM,), tl.float32) + tl.load(SINKS + h).to(tl.float32) * LOG2E
        total += 1.0
    acc = tl.zeros((BM, BV), tl.float32)
    low = 0
    if WINDOW:
        low = tl.maximum(low, m0 - window + 1)
    if CHUNK:
        low = tl.maximum(low, m0 // chunk * chunk)
    for n0 in range(low // BN * BN, tl.minimum(length, m0 + BM), BN):
        n = n0 + tl.arange(0, BN)
        there = (start + n).to(tl.int64)
        k = tl.load(
            K + there[None, :] * sk_n + kv * sk_h + d[:, None],
            mask=(n < length)[None, :] & (d < dim)[:, None],
            other=0.0,
        )
        s, _ = _scores(
            tl.dot(q, k, input_precision=PRECISION), m[:, None], n[None, :], scale32, cap32, slope, SOFTCAP, SLOPES
        )
        s = tl.where(_seen(m[:, None], n[None, :], length, window, chunk, WINDOW, CHUNK), s, float("-inf"))
        above = tl.maximum(top, tl.max(s, 1))
        used = tl.where(above == float("-inf"), 0.0, above)  # a query that sees nothing yet
        p = tl.exp2(s - used[:, None])
        keep = tl.exp2(top - used)
        total = total * keep + tl.sum(p, 1)
        v = tl.load(
            V + there[:, None] * sv_n + kv * sv_h + e[None, :],
            mask=(n < length)[:, None] & (e < vdim)[None, :],
            other=0.0,
        )
        acc = tl.dot(p.to(v.dtype), v, acc * keep[:, None], input_precision=PRECISION)
        top = above
    ok = m < length
    total = tl.where(ok, total, 1.0)
    top = tl.where(ok, top, 0.0)
    tl.store(
        OUT + at * so_n + h64 * so_h + e[None, :],
        (acc / total[:, None]).to(OUT.dtype.element_ty),
        mask=ok[:, None] & (e < vdim)[None, :],
    )
    tl.store(LSE + h64 * rows + start + m, (top + tl.log2(total)) / LOG2E, mask=ok)


@triton.jit
def attention_delta(
    OUT, DO, DELTA, so_n, so_h, sd_n, sd_h, rows, vdim, BM: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """DELTA[h, n] = sum of OUT * DO over a query's result."""
    h = tl.program_id(1).to(tl.int64)
    m, e = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.arange(0, BV)
    ok = (m < rows)[:, None] & (e < vdim)[None, :]
    o = tl.load(OUT + m[:, None] * so_n + h * so_h + e[None, :], mask=ok, other=0.0).to(tl.float32)
    g = tl.load(DO + m[:, None] * sd_n + h * sd_h + e[None, :], mask=ok, other=0.0).to(tl.float32)
    tl.store(DELTA + h * rows + m, tl.sum(o * g, 1), mask=m < rows)


@triton.jit
def attention_bwd_q(
    Q, K, V, SLOPE, CU, DO, LSE, DELTA, DQ,
    sq_n, sq_h, sk_n, sk_h, sv_n, sv_h, sd_n, sd_h, so_n, so_h, rows, groups, dim, vdim, scale, softcap, window, chunk,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    h, z = tl.program_id(1), tl.program_id(2)
    start = tl.load(CU + z).to(tl.int64)
    length = (tl.load(CU + z + 1).to(tl.int64) - start).to(tl.int32)
    m0 = tl.program_id(0) * BM
    if m0 >= length:
        return
    m, d, e = m0 + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    h64 = h.to(tl.int64)
    kv = (h // groups).to(tl.int64)
    scale32, cap32 = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    slope = 0.0
    if SLOPES:
        slope = tl.load(SLOPE + h).to(tl.float32)
    at, ok = (start + m).to(tl.int64), m < length
    q = tl.load(Q + at[:, None] * sq_n + h64 * sq_h + d[None, :], mask=ok[:, None] & (d < dim)[None, :], other=0.0)
    do = tl.load(DO + at[:, None] * sd_n + h64 * sd_h + e[None, :], mask=ok[:, None] & (e < vdim)[None, :], other=0.0)
    lse = tl.load(LSE + h64 * rows + at, mask=ok, other=0.0) * LOG2E
    delta = tl.load(DELTA + h64 * rows + at, mask=ok, other=0.0)
    dq = tl.zeros((BM, BD), tl.float32)
    low = 0
    if WINDOW:
        low = tl.maximum(low, m0 - window + 1)
    if CHUNK:
        low = tl.maximum(low, m0 // chunk * chunk)
    for n0 in range(low // BN * BN, tl.minimum(length, m0 + BM), BN):
        n = n0 + tl.arange(0, BN)
        there = (start + n).to(tl.int64)
        k = tl.load(
            K + there[:, None] * sk_n + kv * sk_h + d[None, :],
            mask=(n < length)[:, None] & (d < dim)[None, :],
            other=0.0,
        )
        v = tl.load(
            V + there[None, :] * sv_n + kv * sv_h + e[:, None],
            mask=(n < length)[None, :] & (e < vdim)[:, None],
            other=0.0,
        )
        s, capped = _scores(
            tl.dot(q, tl.trans(k), input_precision=PRECISION), m[:, None], n[None, :], scale32, cap32, slope,
            SOFTCAP, SLOPES,
        )  # fmt: skip
        seen = _seen(m[:, None], n[None, :], length, window, chunk, WINDOW, CHUNK)
        p = tl.where(seen, tl.exp2(s - lse[:, None]), 0.0)
        ds = p * (tl.dot(do, v, input_precision=PRECISION) - delta[:, None])
        if SOFTCAP:
            ds *= 1.0 - capped * capped
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    tl.store(
        DQ + at[:, None] * so_n + h64 * so_h + d[None, :],
        (dq * scale32).to(DQ.dtype.element_ty),
        mask=ok[:, None] & (d < dim)[None, :],
    )


@triton.jit
def attention_bwd_kv(
    Q, K, V, SLOPE, CU, DO, LSE, DELTA, DK, DV,
    sq_n, sq_h, sk_n, sk_h, sv_n, sv_h, sd_n, sd_h, sok_n, sok_h, sov_n, sov_h,
    rows, groups, dim, vdim, scale, softcap, window, chunk,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    WINDOW: tl.constexpr, CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, SLOPES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    kv, z = tl.program_id(1), tl.program_id(2)
    start = tl.load(CU + z).to(tl.int64)
    length = (tl.load(CU + z + 1).to(tl.int64) - start).to(tl.int32)
    n0 = tl.program_id(0) * BN
    if n0 >= length:
        return
    n, d, e = n0 + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BV)
    kv64 = kv.to(tl.int64)
    scale32, cap32 = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    there, ok = (start + n).to(tl.int64), n < length
    k = tl.load(K + there[:, None] * sk_n + kv64 * sk_h + d[None, :], mask=ok[:, None] & (d < dim)[None, :], other=0.0)
    v = tl.load(V + there[:, None] * sv_n + kv64 * sv_h + e[None, :], mask=ok[:, None] & (e < vdim)[None, :], other=0.0)
    dk = tl.zeros((BN, BD), tl.float32)
    dv = tl.zeros((BN, BV), tl.float32)
    high = length
    last = tl.minimum(length, n0 + BN) - 1
    if WINDOW:
        high = tl.minimum(high, last + window)
    if CHUNK:
        high = tl.minimum(high, (last // chunk + 1) * chunk)
    for g in range(groups):
        h64 = kv64 * groups + g
        slope = 0.0
        if SLOPES:
            slope = tl.load(SLOPE + h64).to(tl.float32)
        for m0 in range(n0 // BM * BM, high, BM):
            m = m0 + tl.arange(0, BM)
            at, here = (start + m).to(tl.int64), m < length
            q = tl.load(
                Q + at[:, None] * sq_n + h64 * sq_h + d[None, :], mask=here[:, None] & (d < dim)[None, :], other=0.0
            )
            do = tl.load(
                DO + at[:, None] * sd_n + h64 * sd_h + e[None, :], mask=here[:, None] & (e < vdim)[None, :], other=0.0
            )
            lse = tl.load(LSE + h64 * rows + at, mask=here, other=0.0) * LOG2E
            delta = tl.load(DELTA + h64 * rows + at, mask=here, other=0.0)
            # keys down, queries across: both gradients are then products without a transposed accumulator
            s, capped = _scores(
                tl.dot(k, tl.trans(q), input_precision=PRECISION), m[None, :], n[:, None], scale32, cap32, slope,
                SOFTCAP, SLOPES,
            )  # fmt: skip
            seen = _seen(m[None, :], n[:, None], length, window, chunk, WINDOW, CHUNK)
            p = tl.where(seen, tl.exp2(s - lse[None, :]), 0.0)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
            ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
            if SOFTCAP:
                ds *= 1.0 - capped * capped
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    tl.store(
        DK + there[:, None] * sok_n + kv64 * sok_h + d[None, :],
        (dk * scale32).to(DK.dtype.element_ty),
        mask=ok[:, None] & (d < dim)[None, :],
    )
    tl.store(
        DV + there[:, None] * sov_n + kv64 * sov_h + e[None, :],
        dv.to(DV.dtype.element_ty),
        mask=ok[:, None] & (e < vdim)[None, :],
    )
