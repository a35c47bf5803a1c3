"""The fused 8-bit AdamW step as a registered (mutating) operator, and the optimizer built on it."""

import torch

from aifactory_train.kernels import runtime
from aifactory_train.kernels.adamw8bit import reference, space
from aifactory_train.kernels.adamw8bit.reference import new_state
from aifactory_train.kernels.spec import cdiv

__all__ = ["AdamW8bit", "adamw8bit", "new_state"]

NAME = "adamw8bit"
_ARGUMENTS = "float lr, float beta1, float beta2, float eps, float weight_decay, float bias1, float bias2, int seed"


@runtime.custom_op(
    "adamw8bit_step",
    "(Tensor(a!) param, Tensor grad, Tensor(b!) m, Tensor(c!) v, Tensor(d!) m_scale, Tensor(e!) v_scale, "
    + _ARGUMENTS
    + ") -> ()",
    changes=("param", "m", "v", "m_scale", "v_scale"),
)
def adamw8bit_step(param, grad, m, v, m_scale, v_scale, lr, beta1, beta2, eps, weight_decay, bias1, bias2, seed):
    if not param.numel():
        return
    if not (param.is_contiguous() and m.is_contiguous() and v.is_contiguous()):
        raise ValueError("adamw8bit: parameter and state must be contiguous")
    if not runtime.use_triton(NAME, param):
        reference.step(param, grad, m, v, m_scale, v_scale, lr, beta1, beta2, eps, weight_decay, bias1, bias2)
        return
    from aifactory_train.kernels.adamw8bit.triton_kernels import adamw8bit_step as kernel

    n = param.numel()
    config = runtime.launch(NAME, param, numel=n)["adamw8bit_step"]
    kernel[(cdiv(n, 256 * config["groups"]),)](
        param, grad.contiguous(), m, v, m_scale, v_scale, n, lr, beta1, beta2, eps, weight_decay, bias1, bias2,
        max(seed, 0),
        **space.constexprs(config, "", {}) | {"STOCHASTIC": seed >= 0 and param.dtype == torch.bfloat16},
        **runtime.compiler_options(config),
    )  # fmt: skip


@adamw8bit_step.register_fake
def _(param, grad, m, v, m_scale, v_scale, lr, beta1, beta2, eps, weight_decay, bias1, bias2, seed):
    return None


def adamw8bit(
    param: torch.Tensor,
    grad: torch.Tensor,
    state: dict[str, torch.Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    seed: int = -1,
) -> None:
    """One AdamW step in place on ``param`` (bf16, fp16 or fp32, contiguous) and its 8-bit ``state``
    (:func:`new_state`).

    ``step`` counts from 1. ``seed`` >= 0 rounds a bf16 parameter stochastically (give another seed each step), -1 to
    nearest; the torch path on a CPU always rounds to nearest.
    """
    torch.ops.aifactory.adamw8bit_step(
        param, grad, state["m"], state["v"], state["m_scale"], state["v_scale"],
        lr, betas[0], betas[1], eps, weight_decay, 1 - betas[0] ** step, 1 - betas[1] ** step, seed,
    )  # fmt: skip


class AdamW8bit(torch.optim.Optimizer):
    """AdamW whose moments take 2.03 bytes a parameter instead of 8.

    Sharded parameters (FSDP2's DTensor) are stepped on their local shard; blocks of 256 follow the shard, so a saved
    state belongs to its number of ranks. ``stochastic_rounding`` keeps small updates of bf16 parameters alive where
    there is no fp32 master copy.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01, stochastic_rounding=False):
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= b < 1 for b in betas):
            raise ValueError(
                f"AdamW8bit: lr {lr}, betas {betas}, eps {eps}, weight_decay {weight_decay}: lr, eps and weight_decay "
                f"must be at least 0, betas in [0, 1)"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.stochastic_rounding = stochastic_rounding

    @torch.no_grad()
    def step(self, closure=None):
        """One step over all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for index, p in enumerate(group["params"]):
                if p.grad is None:
                    continue
                local, grad = (t.to_local() if hasattr(t, "to_local") else t for t in (p, p.grad))
                state = self.state[p]
                if not state:
                    state.update(new_state(local), step=0)
                state["step"] += 1
                seed = (state["step"] * 1000003 + index) % (1 << 31) if self.stochastic_rounding else -1
                adamw8bit(
                    local,
                    grad,
                    state,
                    step=state["step"],
                    lr=float(group["lr"]),
                    betas=group["betas"],
                    eps=group["eps"],
                    weight_decay=group["weight_decay"],
                    seed=seed,
                )
        return loss
