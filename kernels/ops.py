"""The operators as callables. Importing this module registers them with torch (``torch.ops.aifactory``) and their sharding rules."""

from aifactory_train.kernels import dtensor
from aifactory_train.kernels.adamw8bit.op import AdamW8bit, adamw8bit, new_state
from aifactory_train.kernels.cross_entropy.op import cross_entropy
from aifactory_train.kernels.geglu.op import geglu
from aifactory_train.kernels.layer_norm.op import layer_norm
from aifactory_train.kernels.linear_cross_entropy.op import linear_cross_entropy
from aifactory_train.kernels.linear_dpo.op import linear_dpo, linear_logps
from aifactory_train.kernels.lora_linear.op import lora_linear
from aifactory_train.kernels.rms_norm.op import rms_norm
from aifactory_train.kernels.rms_norm_residual.op import rms_norm_residual
from aifactory_train.kernels.rope.op import rope
from aifactory_train.kernels.swiglu.op import swiglu

dtensor.register()

__all__ = [
    "AdamW8bit",
    "adamw8bit",
    "cross_entropy",
    "geglu",
    "layer_norm",
    "linear_cross_entropy",
    "linear_dpo",
    "linear_logps",
    "lora_linear",
    "new_state",
    "rms_norm",
    "rms_norm_residual",
    "rope",
    "swiglu",
]
