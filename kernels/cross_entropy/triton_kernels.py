"""Cross-entropy over rows of logits, one program a row, online log-sum-exp in fp32, row offsets in 64 bits.

A label of -100 is skipped (loss 0, gradient 0); a label outside the vocabulary poisons the loss with NaN: the device cannot
raise, and a silent wrong loss would be worse.
"""

import triton
import triton.language as tl


@triton.jit
def _tanh(u):
    """tanh by exp, and by its series below 0.3, where 1 - exp would cancel; Triton's own tanh is a vendor library call."""
    e = tl.exp(-2.0 * tl.abs(u))
    far = (1.0 - e) / (1.0 + e)
    q = u * u
    near = 1.0 + q * (-1.0 / 3 + q * (2.0 / 15 + q * (-17.0 / 315 + q * (62.0 / 2835 - q * (1382.0 / 155925)))))
    return tl.where(q < 0.09, u * near, tl.where(u < 0, -far, far))


@triton.jit
def _shape(x, scale, softcap, CAP: tl.constexpr):
    """The logit after scale and soft cap."""
    x = x * scale
    if CAP:
        x = softcap * _tanh(x / softcap)
    return x


@triton.jit
def _top_and_total(X, n_cols, scale, softcap, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """Maximum of a row and sum of exp(logit - maximum), both running over its tiles."""
    col = tl.arange(0, BLOCK)
    top = -float("inf")
    total = 0.0
    for first in range(0, n_cols, BLOCK):
        ok = first + col < n_cols
        x = _shape(tl.load(X + first + col, mask=ok, other=0.0).to(tl.float32), scale, softcap, CAP)
        x = tl.where(ok, x, -float("inf"))
        new = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - new) + tl.sum(tl.exp(x - new), axis=0)
        top = new
    return top, total


@triton.jit
def _slope(p, shaped, hit, g, scale, softcap, CAP: tl.constexpr):
    """d loss / d logit, times g, from the probability p."""
    grad = (p - hit) * (g * scale)
    if CAP:
        t = shaped / softcap
        grad = grad * (1.0 - t * t)
    return grad


@triton.jit
def ce_fwd(X, L, LOSS, LSE, sx, n_cols, scale, softcap, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """LOSS[row] = LSE[row] - logit of the label; both fp32."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(L + row)
    scale32 = tl.cast(scale, tl.float32)
    cap32 = tl.cast(softcap, tl.float32)
    if label == -100:
        tl.store(LOSS + row, 0.0)
        tl.store(LSE + row, 0.0)
    else:
        top, total = _top_and_total(X + row * sx, n_cols, scale32, cap32, CAP, BLOCK)
        lse = top + tl.log(total)
        inside = (label >= 0) & (label < n_cols)
        chosen = _shape(tl.load(X + row * sx + tl.where(inside, label, 0)).to(tl.float32), scale32, cap32, CAP)
        tl.store(LOSS + row, tl.where(inside, lse - chosen, float("nan")))
        tl.store(LSE + row, lse)


@triton.jit
def ce_bwd(G, X, L, LSE, DX, sg, sx, sdx, n_cols, scale, softcap, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """DX = G[row] * d LOSS[row] / d X; program (row, column tile); DX may be X."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = c < n_cols
    label = tl.load(L + row)
    if label == -100:
        tl.store((DX + row * sdx) + c, tl.zeros((BLOCK,), DX.dtype.element_ty), mask=ok)
    else:
        g = tl.load(G + row * sg).to(tl.float32)
        lse = tl.load(LSE + row)
        scale32 = tl.cast(scale, tl.float32)
        cap32 = tl.cast(softcap, tl.float32)
        x = tl.load((X + row * sx) + c, mask=ok, other=0.0).to(tl.float32)
        shaped = _shape(x, scale32, cap32, CAP)
        grad = _slope(tl.exp(shaped - lse), shaped, tl.where(c == label, 1.0, 0.0), g, scale32, cap32, CAP)
        tl.store((DX + row * sdx) + c, grad.to(DX.dtype.element_ty), mask=ok)


@triton.jit
def ce_fwd_bwd(X, L, LOSS, sx, n_cols, scale, softcap, CAP: tl.constexpr, BLOCK: tl.constexpr):
    """LOSS[row], and the logits overwritten with d LOSS / d logits: for logits that nobody needs afterwards."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(L + row)
    col = tl.arange(0, BLOCK)
    base = X + row * sx
    scale32 = tl.cast(scale, tl.float32)
    cap32 = tl.cast(softcap, tl.float32)
    if label == -100:
        tl.store(LOSS + row, 0.0)
        for first in range(0, n_cols, BLOCK):
            tl.store(base + first + col, tl.zeros((BLOCK,), X.dtype.element_ty), mask=first + col < n_cols)
    else:
        inside = (label >= 0) & (label < n_cols)
        chosen = _shape(tl.load(base + tl.where(inside, label, 0)).to(tl.float32), scale32, cap32, CAP)
        top, total = _top_and_total(base, n_cols, scale32, cap32, CAP, BLOCK)
        tl.store(LOSS + row, tl.where(inside, tl.log(total) + (top - chosen), float("nan")))
        share = 1.0 / total  # exp(x - top) / total keeps a digit that exp(x - lse) loses in the rounding of lse
        for first in range(0, n_cols, BLOCK):
            c = first + col
            x = tl.load(base + c, mask=c < n_cols, other=0.0).to(tl.float32)
            shaped = _shape(x, scale32, cap32, CAP)
            p = tl.exp(shaped - top) * share
            grad = _slope(p, shaped, tl.where(c == label, 1.0, 0.0), 1.0, scale32, cap32, CAP)
            tl.store(base + c, grad.to(X.dtype.element_ty), mask=c < n_cols)
