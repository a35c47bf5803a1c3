"""A frozen linear layer with a low-rank adapter: the big GEMM stays the vendor's, the adapter is added in one pass over
its output.
"""
