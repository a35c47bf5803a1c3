"""LayerNorm, forward and backward. Same layout as RMSNorm: ROWS rows a program, wide rows in CHUNKS pieces, fp32 arithmetic.

The variance is taken around the mean (two passes over registers or cache), not as E[x^2] - E[x]^2, which cancels.
"""

import triton
import triton.language as tl


@triton.jit
def layer_norm_fwd(
    X, W, B, Y, M, R,
    sx, sy, n_rows, n_cols, eps,
    HAS_W: tl.constexpr, HAS_B: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Y = (X - mean) * R * W + B; M = mean, R = 1/std, fp32, one a row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows_ok = row < n_rows
    col = tl.arange(0, BLOCK)
    eps32 = tl.cast(eps, tl.float32)
    inv_cols = 1.0 / n_cols
    if CHUNKS == 1:
        cols_ok = (col < n_cols)[None, :]
        ok = rows_ok[:, None] & cols_ok
        x = tl.load((X + row[:, None] * sx) + col[None, :], mask=ok, other=0.0).to(tl.float32)
        mean = tl.sum(x, axis=1) * inv_cols
        centred = tl.where(ok, x - mean[:, None], 0.0)
        r = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=1) * inv_cols + eps32)
        y = centred * r[:, None]
        if HAS_W:
            y *= tl.load(W + col[None, :], mask=cols_ok, other=0.0).to(tl.float32)
        if HAS_B:
            y += tl.load(B + col[None, :], mask=cols_ok, other=0.0).to(tl.float32)
        tl.store((Y + row[:, None] * sy) + col[None, :], y.to(Y.dtype.element_ty), mask=ok)
    else:
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        for k in range(tl.cdiv(n_cols, BLOCK)):
            c = k * BLOCK + col
            ok = rows_ok[:, None] & (c < n_cols)[None, :]
            total += tl.load((X + row[:, None] * sx) + c[None, :], mask=ok, other=0.0).to(tl.float32)
        mean = tl.sum(total, axis=1) * inv_cols
        square = tl.zeros((ROWS, BLOCK), tl.float32)
        for k in range(tl.cdiv(n_cols, BLOCK)):
            c = k * BLOCK + col
            ok = rows_ok[:, None] & (c < n_cols)[None, :]
            x = tl.load((X + row[:, None] * sx) + c[None, :], mask=ok, other=0.0).to(tl.float32)
            centred = tl.where(ok, x - mean[:, None], 0.0)
            square += centred * centred
        r = 1.0 / tl.sqrt(tl.sum(square, axis=1) * inv_cols + eps32)
        for k in range(tl.cdiv(n_cols, BLOCK)):
            c = k * BLOCK + col
            cols_ok = (c < n_cols)[None, :]
            ok = rows_ok[:, None] & cols_ok
            x = tl.load((X + row[:, None] * sx) + c[None, :], mask=ok, other=0.0).to(tl.float32)
            y = (x - mean[:, None]) * r[:, None]
            if HAS_W:
                y *= tl.load(W + c[None, :], mask=cols_ok, other=0.0).to(tl.float32)
            if HAS_B:
                y += tl.load(B + c[None, :], mask=cols_ok, other=0.0).to(tl.float32)
            tl.store((Y + row[:, None] * sy) + c[None, :], y.to(Y.dtype.element_ty), mask=ok)
    tl.store(M + row, mean, mask=rows_ok)
    tl.store(R + row, r, mask=rows_ok)


@triton.jit
def layer_norm_bwd(
    DY, X, W, M, R, DX, P,
    sdy, sx, sdx, n_rows, n_cols,
    HAS_W: tl.constexpr, SUMS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dX, and with SUMS one fp32 partial row of (dW, dB) per group in P [groups, 2, n_cols]; programs as in RMSNorm."""
    chunk = tl.program_id(0)
    group = tl.program_id(1)
    col = tl.arange(0, BLOCK)
    c = chunk * BLOCK + col
    cols_ok = (c < n_cols)[None, :]
    inv_cols = 1.0 / n_cols
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    db = tl.zeros((ROWS, BLOCK), tl.float32)
    if HAS_W:
        weight = tl.load(W + c[None, :], mask=cols_ok, other=0.0)
    for block in tl.range(group, tl.cdiv(n_rows, ROWS), tl.num_programs(1), num_stages=STAGES):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        rows_ok = row < n_rows
        mean = tl.load(M + row, mask=rows_ok, other=0.0)
        r = tl.load(R + row, mask=rows_ok, other=0.0)
        if CHUNKS > 1:
            sum_a = tl.zeros((ROWS, BLOCK), tl.float32)
            sum_b = tl.zeros((ROWS, BLOCK), tl.float32)
            for k in range(tl.cdiv(n_cols, BLOCK)):
                o = k * BLOCK + col
                ok = rows_ok[:, None] & (o < n_cols)[None, :]
                x = tl.load((X + row[:, None] * sx) + o[None, :], mask=ok, other=0.0).to(tl.float32)
                wdy = tl.load((DY + row[:, None] * sdy) + o[None, :], mask=ok, other=0.0).to(tl.float32)
                if HAS_W:
                    wdy *= tl.load(W + o[None, :], mask=(o < n_cols)[None, :], other=0.0).to(tl.float32)
                sum_a += wdy
                sum_b += wdy * (x - mean[:, None])
            a = tl.sum(sum_a, axis=1) * inv_cols
            b = tl.sum(sum_b, axis=1) * r * inv_cols
        ok = rows_ok[:, None] & cols_ok
        x = tl.load((X + row[:, None] * sx) + c[None, :], mask=ok, other=0.0)
        g = tl.load((DY + row[:, None] * sdy) + c[None, :], mask=ok, other=0.0)
        xhat = tl.where(ok, (x.to(tl.float32) - mean[:, None]) * r[:, None], 0.0)
        dy = g.to(tl.float32)
        wdy = dy
        if HAS_W:
            wdy = dy * weight.to(tl.float32)
        if CHUNKS == 1:
            a = tl.sum(wdy, axis=1) * inv_cols
            b = tl.sum(wdy * xhat, axis=1) * inv_cols
        dx = (wdy - a[:, None] - xhat * b[:, None]) * r[:, None]
        tl.store((DX + row[:, None] * sdx) + c[None, :], dx.to(DX.dtype.element_ty), mask=ok)
        if SUMS:
            dw += dy * xhat
            db += dy
    if SUMS:
        out = P + tl.cast(group, tl.int64) * 2 * n_cols + c
        tl.store(out, tl.sum(dw, axis=0), mask=c < n_cols)
        tl.store(out + n_cols, tl.sum(db, axis=0), mask=c < n_cols)
