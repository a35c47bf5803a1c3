"""One fused AdamW step on 8-bit moments: about 10 bytes a bf16 parameter (p, m, v read and written, g read, two scales a block)."""

import triton
import triton.language as tl


@triton.jit
def adamw8bit_step(
    P, G, M, V, SM, SV,
    n, lr, beta1, beta2, eps, decay, bias1, bias2, seed,
    STOCHASTIC: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """GROUPS blocks of 256 elements a program; every tensor flat and contiguous. STOCHASTIC rounds bf16 parameters at random."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * 256 + tl.arange(0, 256)[None, :]
    ok = at < n
    some = group * 256 < n
    b1 = tl.cast(beta1, tl.float32)
    b2 = tl.cast(beta2, tl.float32)
    rate = tl.cast(lr, tl.float32)
    p = tl.load(P + at, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(G + at, mask=ok, other=0.0).to(tl.float32)
    cm = tl.load(M + at, mask=ok, other=0).to(tl.float32) * (1.0 / 127.0)
    cv = tl.load(V + at, mask=ok, other=0).to(tl.float32) * (1.0 / 255.0)
    m_scale = tl.load(SM + group, mask=some, other=0.0)
    v_scale = tl.load(SV + group, mask=some, other=0.0)
    cv = cv * cv
    m = b1 * (cm * tl.abs(cm) * m_scale[:, None]) + (1.0 - b1) * g
    v = b2 * (cv * cv * v_scale[:, None]) + (1.0 - b2) * g * g
    step = (
        rate * (m / tl.cast(bias1, tl.float32)) / (tl.sqrt(v / tl.cast(bias2, tl.float32)) + tl.cast(eps, tl.float32))
    )
    p = p * (1.0 - rate * tl.cast(decay, tl.float32)) - step
    if STOCHASTIC:
        # Adding 16 random bits below the mantissa that bf16 keeps, then cutting them off, rounds up with the right probability.
        noise = (tl.randint(seed, at.to(tl.uint32)) & 0xFFFF).to(tl.int32)
        bits = ((p.to(tl.int32, bitcast=True) + noise) >> 16) << 16
        p = bits.to(tl.float32, bitcast=True)
    tl.store(P + at, p.to(P.dtype.element_ty), mask=ok)
    m_scale = tl.max(tl.abs(m), axis=1)
    v_scale = tl.max(v, axis=1)
    m_unit = tl.where(m_scale > 0, 1.0 / m_scale, 0.0)
    v_unit = tl.where(v_scale > 0, 1.0 / v_scale, 0.0)
    code = tl.floor(127.0 * tl.sqrt(tl.abs(m) * m_unit[:, None]) + 0.5)
    tl.store(M + at, tl.where(m < 0, -code, code).to(tl.int8), mask=ok)
    code = tl.floor(255.0 * tl.sqrt(tl.sqrt(v * v_unit[:, None])) + 0.5)
    code = tl.where(v > 0, tl.maximum(code, 1.0), 0.0)
    tl.store(V + at, code.to(tl.int32).to(tl.uint8), mask=ok)
    tl.store(SM + group, m_scale, mask=some)
    tl.store(SV + group, v_scale, mask=some)
