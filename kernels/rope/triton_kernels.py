"""RoPE for queries and keys in one launch: one program rotates all heads of one token, HEADS at a time, so cos and sin are
read once a token.

Only the first half of cos and sin is read: both halves of a rotary table are equal. The backward pass is the forward pass with
the sine negated; with QK-norm it also goes through the normalisation and sums the two weight gradients.
"""

import triton
import triton.language as tl


@triton.jit
def _normalise(a, b, W, d, ok, half, eps, offset):
    """(a, b) / rms * (W + offset) of [heads, half] pairs; also returns xhat of both halves, 1/rms and the two weight rows."""
    r = 1.0 / tl.sqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / (2 * half) + eps)
    wa = tl.load(W + d, mask=ok, other=0.0).to(tl.float32) + offset
    wb = tl.load(W + half + d, mask=ok, other=0.0).to(tl.float32) + offset
    return a * r[:, None], b * r[:, None], r, wa, wb


@triton.jit
def _rotate_heads(
    T, OUT, W, base, out_base, st_h, so_h, first, heads, half, d, cos, sin, eps, offset,
    HEADS: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    h = first + tl.arange(0, HEADS)
    ok = (h < heads)[:, None] & (d < half)[None, :]
    at = (T + base) + h.to(tl.int64)[:, None] * st_h + d[None, :]
    a = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(at + half, mask=ok, other=0.0).to(tl.float32)
    if HAS_NORM:
        a, b, _, wa, wb = _normalise(a, b, W, d, d < half, half, eps, offset)
        a = a * wa[None, :]
        b = b * wb[None, :]
    to = (OUT + out_base) + h.to(tl.int64)[:, None] * so_h + d[None, :]
    tl.store(to, (a * cos[None, :] - b * sin[None, :]).to(OUT.dtype.element_ty), mask=ok)
    tl.store(to + half, (b * cos[None, :] + a * sin[None, :]).to(OUT.dtype.element_ty), mask=ok)


@triton.jit
def rope_fwd(
    Q, K, COS, SIN, QW, KW, QO, KO,
    sq_b, sq_h, sq_s, sk_b, sk_h, sk_s, sqo_b, sqo_h, sqo_s, sko_b, sko_h, sko_s, sc_b, sc_s,
    seq, q_heads, k_heads, half, eps, offset,
    SIGN: tl.constexpr, HAS_NORM: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """QO, KO = rotated Q, K; program = one token. SIGN -1 turns backwards."""
    token = tl.program_id(0).to(tl.int64)
    b = token // seq
    s = token % seq
    d = tl.arange(0, HALF)
    at = b * sc_b + s * sc_s + d
    cos = tl.load(COS + at, mask=d < half, other=0.0).to(tl.float32)
    sin = tl.load(SIN + at, mask=d < half, other=0.0).to(tl.float32) * SIGN
    eps32 = tl.cast(eps, tl.float32)
    offset32 = tl.cast(offset, tl.float32)
    for first in range(0, q_heads, HEADS):
        _rotate_heads(Q, QO, QW, b * sq_b + s * sq_s, b * sqo_b + s * sqo_s, sq_h, sqo_h, first, q_heads, half, d, cos, sin,
                      eps32, offset32, HEADS, HAS_NORM)  # fmt: skip
    for first in range(0, k_heads, HEADS):
        _rotate_heads(K, KO, KW, b * sk_b + s * sk_s, b * sko_b + s * sko_s, sk_h, sko_h, first, k_heads, half, d, cos, sin,
                      eps32, offset32, HEADS, HAS_NORM)  # fmt: skip


@triton.jit
def _norm_heads_bwd(
    DO, T, W, DT, base_do, base, base_dt, sd_h, st_h, so_h, first, heads, half, d, cos, sin, eps, offset, HEADS: tl.constexpr,
):  # fmt: skip
    """Stores the gradient of the un-normalised heads; returns this token's two halves of the weight gradient."""
    h = first + tl.arange(0, HEADS)
    ok = (h < heads)[:, None] & (d < half)[None, :]
    heads64 = h.to(tl.int64)[:, None]
    at = (DO + base_do) + heads64 * sd_h + d[None, :]
    ga = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    gb = tl.load(at + half, mask=ok, other=0.0).to(tl.float32)
    na = ga * cos[None, :] + gb * sin[None, :]
    nb = gb * cos[None, :] - ga * sin[None, :]
    at = (T + base) + heads64 * st_h + d[None, :]
    a = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(at + half, mask=ok, other=0.0).to(tl.float32)
    xa, xb, r, wa, wb = _normalise(a, b, W, d, d < half, half, eps, offset)
    mean = (tl.sum(na * wa[None, :] * xa, axis=1) + tl.sum(nb * wb[None, :] * xb, axis=1)) / (2 * half)
    to = (DT + base_dt) + heads64 * so_h + d[None, :]
    tl.store(to, ((na * wa[None, :] - xa * mean[:, None]) * r[:, None]).to(DT.dtype.element_ty), mask=ok)
    tl.store(to + half, ((nb * wb[None, :] - xb * mean[:, None]) * r[:, None]).to(DT.dtype.element_ty), mask=ok)
    return tl.sum(na * xa, axis=0), tl.sum(nb * xb, axis=0)


@triton.jit
def rope_norm_bwd(
    DQO, DKO, Q, K, COS, SIN, QW, KW, DQ, DK, P,
    sdq_b, sdq_h, sdq_s, sdk_b, sdk_h, sdk_s, sq_b, sq_h, sq_s, sk_b, sk_h, sk_s,
    sqo_b, sqo_h, sqo_s, sko_b, sko_h, sko_s, sc_b, sc_s,
    tokens, seq, q_heads, k_heads, half, eps, offset,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Gradient through rotation and QK-norm; P [programs, 4 * half] takes the fp32 weight gradients (q then k)."""
    pid = tl.program_id(0)
    d = tl.arange(0, HALF)
    ok = d < half
    eps32 = tl.cast(eps, tl.float32)
    offset32 = tl.cast(offset, tl.float32)
    qa = tl.zeros((HALF,), tl.float32)
    qb = tl.zeros((HALF,), tl.float32)
    ka = tl.zeros((HALF,), tl.float32)
    kb = tl.zeros((HALF,), tl.float32)
    for token in range(pid, tokens, tl.num_programs(0)):
        b = tl.cast(token, tl.int64) // seq
        s = tl.cast(token, tl.int64) % seq
        at = b * sc_b + s * sc_s + d
        cos = tl.load(COS + at, mask=ok, other=0.0).to(tl.float32)
        sin = tl.load(SIN + at, mask=ok, other=0.0).to(tl.float32)
        for first in range(0, q_heads, HEADS):
            da, db = _norm_heads_bwd(
                DQO, Q, QW, DQ, b * sdq_b + s * sdq_s, b * sq_b + s * sq_s, b * sqo_b + s * sqo_s,
                sdq_h, sq_h, sqo_h, first, q_heads, half, d, cos, sin, eps32, offset32, HEADS,
            )  # fmt: skip
            qa += da
            qb += db
        for first in range(0, k_heads, HEADS):
            da, db = _norm_heads_bwd(
                DKO, K, KW, DK, b * sdk_b + s * sdk_s, b * sk_b + s * sk_s, b * sko_b + s * sko_s,
                sdk_h, sk_h, sko_h, first, k_heads, half, d, cos, sin, eps32, offset32, HEADS,
            )  # fmt: skip
            ka += da
            kb += db
    out = P + pid.to(tl.int64) * 4 * half + d
    tl.store(out, qa, mask=ok)
    tl.store(out + half, qb, mask=ok)
    tl.store(out + 2 * half, ka, mask=ok)
    tl.store(out + 3 * half, kb, mask=ok)
