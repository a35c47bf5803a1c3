"""RMSNorm, forward and backward, with or without a residual that is added first.

One program holds ROWS rows of at most BLOCK columns; rows wider than BLOCK are walked in CHUNKS pieces and read a second time
(from cache, since they have just been touched), which keeps registers low enough that nothing spills at any width.
All arithmetic is fp32. Row offsets are 64-bit.
"""

import triton
import triton.language as tl


@triton.jit
def rms_norm_fwd(
    X, RES, W, Y, S, R,
    sx, sres, sy, ss,
    n_rows, n_cols, eps, offset,
    HAS_RES: tl.constexpr, HAS_W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    """Y = norm(X [+ RES]) * (W + offset); S = X + RES (rounded); R = 1/rms, fp32, one a row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    rows_ok = row < n_rows
    col = tl.arange(0, BLOCK)
    eps32 = tl.cast(eps, tl.float32)
    offset32 = tl.cast(offset, tl.float32)
    inv_cols = 1.0 / n_cols
    if CHUNKS == 1:
        ok = rows_ok[:, None] & (col < n_cols)[None, :]
        x = tl.load((X + row[:, None] * sx) + col[None, :], mask=ok, other=0.0).to(tl.float32)
        if HAS_RES:
            x += tl.load((RES + row[:, None] * sres) + col[None, :], mask=ok, other=0.0).to(tl.float32)
            rounded = x.to(S.dtype.element_ty)
            tl.store((S + row[:, None] * ss) + col[None, :], rounded, mask=ok)
            x = rounded.to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) * inv_cols + eps32)
        y = x * r[:, None]
        if HAS_W:
            y *= tl.load(W + col[None, :], mask=(col < n_cols)[None, :], other=0.0).to(tl.float32) + offset32
        tl.store((Y + row[:, None] * sy) + col[None, :], y.to(Y.dtype.element_ty), mask=ok)
    else:
        square = tl.zeros((ROWS, BLOCK), tl.float32)
        for k in range(tl.cdiv(n_cols, BLOCK)):
            c = k * BLOCK + col
            ok = rows_ok[:, None] & (c < n_cols)[None, :]
            x = tl.load((X + row[:, None] * sx) + c[None, :], mask=ok, other=0.0).to(tl.float32)
            if HAS_RES:
                x += tl.load((RES + row[:, None] * sres) + c[None, :], mask=ok, other=0.0).to(tl.float32)
                rounded = x.to(S.dtype.element_ty)
                tl.store((S + row[:, None] * ss) + c[None, :], rounded, mask=ok)
                x = rounded.to(tl.float32)
            square += x * x
        r = 1.0 / tl.sqrt(tl.sum(square, axis=1) * inv_cols + eps32)
        for k in range(tl.cdiv(n_cols, BLOCK)):
            c = k * BLOCK + col
            ok = rows_ok[:, None] & (c < n_cols)[None, :]
            x = tl.load((X + row[:, None] * sx) + c[None, :], mask=ok, other=0.0).to(tl.float32)
            if HAS_RES:
                # Recomputed rather than read back from S: another lane may have written it and no barrier is free.
                x += tl.load((RES + row[:, None] * sres) + c[None, :], mask=ok, other=0.0).to(tl.float32)
                x = x.to(S.dtype.element_ty).to(tl.float32)
            y = x * r[:, None]
            if HAS_W:
                y *= tl.load(W + c[None, :], mask=(c < n_cols)[None, :], other=0.0).to(tl.float32) + offset32
            tl.store((Y + row[:, None] * sy) + c[None, :], y.to(Y.dtype.element_ty), mask=ok)
    tl.store(R + row, r, mask=rows_ok)


@triton.jit
def rms_norm_bwd(
    DY, DS, X, W, R, DX, P,
    sdy, sds, sx, sdx,
    n_rows, n_cols, offset,
    HAS_DS: tl.constexpr, HAS_W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, CHUNKS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """dX [+ dS], and one fp32 partial row of dW per group in P; program (chunk, group) takes every n_groups-th row block.

    Each program keeps the dW of one column chunk in registers. Of a row wider than BLOCK it reads everything for the row's dot
    product, but its own chunk only for dX and dW; the programs of a group are neighbours, so the repeated reads hit the cache.
    """
    chunk = tl.program_id(0)
    group = tl.program_id(1)
    col = tl.arange(0, BLOCK)
    c = chunk * BLOCK + col
    cols_ok = (c < n_cols)[None, :]
    offset32 = tl.cast(offset, tl.float32)
    inv_cols = 1.0 / n_cols
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    if HAS_W:
        weight = tl.load(W + c[None, :], mask=cols_ok, other=0.0)  # stays packed, upcast at use
    for block in tl.range(group, tl.cdiv(n_rows, ROWS), tl.num_programs(1), num_stages=STAGES):
        row = tl.cast(block, tl.int64) * ROWS + tl.arange(0, ROWS)
        rows_ok = row < n_rows
        r = tl.load(R + row, mask=rows_ok, other=0.0)
        if CHUNKS > 1:
            dot = tl.zeros((ROWS, BLOCK), tl.float32)
            for k in range(tl.cdiv(n_cols, BLOCK)):
                o = k * BLOCK + col
                ok = rows_ok[:, None] & (o < n_cols)[None, :]
                x = tl.load((X + row[:, None] * sx) + o[None, :], mask=ok, other=0.0).to(tl.float32)
                wdy = tl.load((DY + row[:, None] * sdy) + o[None, :], mask=ok, other=0.0).to(tl.float32)
                if HAS_W:
                    wdy *= tl.load(W + o[None, :], mask=(o < n_cols)[None, :], other=0.0).to(tl.float32) + offset32
                dot += x * wdy
            mean = tl.sum(dot, axis=1) * r * inv_cols
        ok = rows_ok[:, None] & cols_ok
        x = tl.load((X + row[:, None] * sx) + c[None, :], mask=ok, other=0.0)
        g = tl.load((DY + row[:, None] * sdy) + c[None, :], mask=ok, other=0.0)
        if HAS_DS:
            ds = tl.load((DS + row[:, None] * sds) + c[None, :], mask=ok, other=0.0)
        xhat = x.to(tl.float32) * r[:, None]
        dy = g.to(tl.float32)
        wdy = dy
        if HAS_W:
            wdy = dy * (weight.to(tl.float32) + offset32)
        if CHUNKS == 1:
            mean = tl.sum(wdy * xhat, axis=1) * inv_cols
        dx = (wdy - xhat * mean[:, None]) * r[:, None]
        if HAS_DS:
            dx += ds.to(tl.float32)
        tl.store((DX + row[:, None] * sdx) + c[None, :], dx.to(DX.dtype.element_ty), mask=ok)
        if HAS_W:
            dw += dy * xhat
    if HAS_W:
        tl.store(P + tl.cast(group, tl.int64) * n_cols + c, tl.sum(dw, axis=0), mask=c < n_cols)
