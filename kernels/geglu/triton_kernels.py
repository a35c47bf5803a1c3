"""The kernels are those of SwiGLU with another activation."""

from aifactory_train.kernels.swiglu.triton_kernels import glu_bwd, glu_fwd

__all__ = ["glu_bwd", "glu_fwd"]
