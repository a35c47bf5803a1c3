"""The second stage of every gradient that is summed over rows: partial rows become one row. No floating-point atomics anywhere.

Two stages are deterministic, and on gfx90a an fp32 ``atomic_add`` compiles to a compare-and-swap loop.
"""

import triton
import triton.language as tl


@triton.jit
def column_sum(P, OUT, n_rows, n_cols, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """OUT[n_cols] = sum over n_rows of the contiguous fp32 P[n_rows, n_cols]; one program takes BLOCK columns."""
    cols = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = cols < n_cols
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for first in range(0, n_rows, ROWS):
        rows = first + tl.arange(0, ROWS)
        at = rows.to(tl.int64)[:, None] * n_cols + cols[None, :]
        total += tl.load(P + at, mask=(rows < n_rows)[:, None] & ok[None, :], other=0.0)
    tl.store(OUT + cols, tl.sum(total, axis=0).to(OUT.dtype.element_ty), mask=ok)
