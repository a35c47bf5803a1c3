"""Gated activations: ``silu(gate) * up``; the kernels also serve GeGLU."""
