"""Kernels that are wrong on purpose, and a cast: what the tools must notice."""

import triton
import triton.language as tl


@triton.jit
def copy_int32(Y, X, s, n_cols, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    c = tl.arange(0, BLOCK)
    tl.store(Y + row * s + c, tl.load(X + row * s + c, mask=c < n_cols), mask=c < n_cols)


@triton.jit
def copy_int32_loop(Y, X, s, n_rows, n_cols, BLOCK: tl.constexpr):
    c = tl.arange(0, BLOCK)
    for row in range(n_rows):
        tl.store(Y + row * s + c, tl.load(X + row * s + c, mask=c < n_cols), mask=c < n_cols)


@triton.jit
def add_atomic(Y, X, n_cols, BLOCK: tl.constexpr):
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(Y + c % n_cols, tl.load(X + c))


@triton.jit
def cast(X, Y, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(Y + i, tl.load(X + i).to(tl.bfloat16))


@triton.jit
def sum_of_bf16(X, Y, N: tl.constexpr):
    tl.store(Y, tl.sum(tl.load(X + tl.arange(0, N)), 0).to(tl.float32))
