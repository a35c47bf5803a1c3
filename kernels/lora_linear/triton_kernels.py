"""The epilogue: Y += scale * T @ B for a thin T [M, R], in place on the GEMM's output; one read and one write of Y.

Forward: T = x A^T, B = lora_B^T. Backward: T = dy lora_B, B = lora_A. B is given by its two strides.
"""

import triton
import triton.language as tl


@triton.jit
def lora_epilogue(
    Y, T, B, scale, M, N, R, sy, st, sb_r, sb_n,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, R, BR):
        k = first + tl.arange(0, BR)
        t = tl.load(T + m[:, None] * st + k[None, :], mask=(m < M)[:, None] & (k < R)[None, :], other=0.0)
        b = tl.load(
            B + k.to(tl.int64)[:, None] * sb_r + n.to(tl.int64)[None, :] * sb_n,
            mask=(k < R)[:, None] & (n < N)[None, :],
            other=0.0,
        )
        acc = tl.dot(t, b, acc, input_precision=PRECISION)
    at = (Y + m[:, None] * sy) + n[None, :]
    ok = (m < M)[:, None] & (n < N)[None, :]
    y = tl.load(at, mask=ok, other=0.0).to(tl.float32)
    tl.store(at, (y + acc * tl.cast(scale, tl.float32)).to(Y.dtype.element_ty), mask=ok)
