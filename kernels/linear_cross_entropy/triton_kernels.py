"""The kernels are those of cross-entropy; the fused one overwrites a chunk of logits with its gradient. The GEMMs are the vendor's."""

from aifactory_train.kernels.cross_entropy.triton_kernels import ce_bwd, ce_fwd, ce_fwd_bwd

__all__ = ["ce_bwd", "ce_fwd", "ce_fwd_bwd"]
