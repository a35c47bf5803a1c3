"""The kernels are those of cross-entropy: log-probabilities forward, and backward a gradient that overwrites recomputed logits."""

from aifactory_train.kernels.cross_entropy.triton_kernels import ce_bwd, ce_fwd

__all__ = ["ce_bwd", "ce_fwd"]
