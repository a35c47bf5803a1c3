"""Grouped linear as registered operators with autograd."""

from __future__ import annotations

import itertools

import torch

from aifactory_train.kernels import runtime
from aifactory_train.kernels.grouped_linear import space
from aifactory_train.kernels.spec import cdiv

__all__ = ["grouped_linear"]

NAME = "grouped_linear"


def grouped_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    offsets: torch.Tensor,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    scaling: float = 1.0,
    bias: torch.Tensor | None = None,
    kernels: bool = True,
) -> torch.Tensor:
    """``x W_e^T + bias_e + scaling (x A_e^T) B_e^T``, each row with the matrices of its expert e.

    ``x`` [N, K], sorted by expert; ``offsets`` int32 [E + 1] on its device: expert e has the rows offsets[e] to
    offsets[e + 1], the first is 0 and the last N. ``weight`` [E, M, K] in any strides (a view of [E, K, M] will do),
    ``lora_a`` [E, R, K] and ``lora_b`` [E, M, R] or neither, ``bias`` [E, M]; one dtype for all (autocast is followed).
    Differentiable in every one of them; the gradient of the weights is computed only if asked for. Returns [N, M].
    Nothing is read back from the device, except on the torch path (``kernels`` False, or no Triton there), which needs
    the bounds on the host.
    """
    if (lora_a is None) != (lora_b is None):
        raise ValueError(f"{NAME}: an adapter has both matrices, lora_a and lora_b, or neither")
    dtype = runtime.arithmetic(x)
    x, weight = x.to(dtype), weight.to(dtype)
    lora_a, lora_b, bias = (None if t is None else t.to(dtype) for t in (lora_a, lora_b, bias))
    return torch.ops.aifactory.grouped_linear_fwd(x, weight, offsets, lora_a, lora_b, scaling, bias, kernels)[0]


def _sizes(x: torch.Tensor, weight: torch.Tensor, lora_a: torch.Tensor | None, bias: bool = False) -> dict[str, int]:
    rank = 0 if lora_a is None else lora_a.shape[1]
    return {"rows": x.shape[0], "experts": weight.shape[0], "in": weight.shape[2], "out": weight.shape[1],
            "rank": rank, "bias": int(bias)}  # fmt: skip


def _launch(x: torch.Tensor, sizes: dict[str, int]) -> dict:
    """Launch parameters; they depend on the widths, not on the rows, so that a width has one entry."""
    return runtime.launch(NAME, x, **{**sizes, "rows": 1})


def _inner(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


class _Launcher:
    """The products of one pass over rows [N, ...]: by Triton, or one matrix product an expert in torch."""

    def __init__(self, x: torch.Tensor, offsets: torch.Tensor, sizes: dict[str, int], kernels: bool):
        self.offsets, self.sizes, self.rows = offsets, sizes, x.shape[0]
        self.triton = kernels and space.covers("", sizes) and runtime.use_triton(NAME, x)
        self.config = _launch(x, sizes) if self.triton and self.rows else {}
        if not self.triton:
            bounds = offsets.tolist()
            self.bounds = [(e, a, b) for e, (a, b) in enumerate(itertools.pairwise(bounds)) if b > a]

    def product(
        self,
        name: str,
        x: torch.Tensor,
        w: torch.Tensor,
        scale: float = 1.0,
        t: torch.Tensor | None = None,
        b: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """``scale * x w_e + bias_e + t b_e``: w [E, K, N], b [E, R, N] in any strides."""
        experts, _, columns = w.shape
        y = x.new_empty(self.rows, columns)
        if not self.rows:
            return y
        if not self.triton:
            for e, start, end in self.bounds:
                out = y[start:end]
                torch.mm(x[start:end], w[e], out=out)
                if scale != 1.0:
                    out.mul_(scale)
                if t is not None and b is not None:
                    out.addmm_(t[start:end], b[e])
                if bias is not None:
                    out.add_(bias[e])
            return y
        from aifactory_train.kernels.grouped_linear.triton_kernels import grouped_mm as kernel

        config = self.config[name]
        rank = 0 if t is None else t.shape[1]
        thin, second = (x, w) if t is None or b is None else (t, b)
        tiles = self.rows // config["block_m"] + min(self.rows, experts)
        kernel[(tiles, cdiv(columns, config["block_n"]))](
            x, w, self.offsets, x if bias is None else bias, thin, second, y, scale,
            columns, x.shape[1], rank, experts, x.stride(0), *w.stride(), thin.stride(0), *second.stride(),
            y.stride(0), 0 if bias is None else bias.stride(0),
            **space.constants(name, config, self.sizes), **runtime.compiler_options(config),
        )  # fmt: skip
        return y

    def outer(self, name: str, a: torch.Tensor, c: torch.Tensor, out: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """``out_e = scale * a^T c`` over the rows of each expert; out [E, M, N] in any strides."""
        if not self.rows or not self.triton:
            out.zero_()
            for e, start, end in [] if not self.rows else self.bounds:
                torch.mm(a[start:end].t(), c[start:end], out=out[e])
            return out.mul_(scale) if scale != 1.0 else out
        from aifactory_train.kernels.grouped_linear.triton_kernels import grouped_outer as kernel

        config = self.config[name]
        (experts, m, n), constants = out.shape, space.constants(name, config, self.sizes)
        kernel[(cdiv(m, config["block_m"]), cdiv(n, config["block_n"]), experts)](
            a, c, self.offsets, out, scale, m, n, a.stride(0), c.stride(0), *out.stride(),
            **constants, **runtime.compiler_options(config),
        )  # fmt: skip
        return out


@runtime.custom_op(
    "grouped_linear_fwd",
    "(Tensor x, Tensor weight, Tensor offsets, Tensor? lora_a, Tensor? lora_b, float scaling, Tensor? bias, "
    "bool kernels) -> (Tensor, Tensor)",
)
def grouped_linear_fwd(x, weight, offsets, lora_a, lora_b, scaling, bias, kernels):
    x = _inner(x)
    run = _Launcher(x, offsets, _sizes(x, weight, lora_a, bias is not None), kernels)
    if lora_a is None:
        return run.product(space.FORWARD, x, weight.transpose(1, 2), bias=bias), x.new_empty(0)
    t = run.product(space.DOWN, x, lora_a.transpose(1, 2), scaling)
    return run.product(space.FORWARD, x, weight.transpose(1, 2), 1.0, t, lora_b.transpose(1, 2), bias), t


@grouped_linear_fwd.register_fake
def _(x, weight, offsets, lora_a, lora_b, scaling, bias, kernels):
    thin = x.new_empty(0) if lora_a is None else x.new_empty(x.shape[0], lora_a.shape[1])
    return x.new_empty(x.shape[0], weight.shape[1]), thin


@runtime.custom_op(
    "grouped_linear_bwd",
    "(Tensor dy, Tensor x, Tensor weight, Tensor offsets, Tensor? lora_a, Tensor? lora_b, Tensor t, float scaling, "
    "bool need_x, bool need_weight, bool need_bias, bool kernels) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def grouped_linear_bwd(dy, x, weight, offsets, lora_a, lora_b, t, scaling, need_x, need_weight, need_bias, kernels):
    x, dy = _inner(x), _inner(dy)
    run = _Launcher(x, offsets, _sizes(x, weight, lora_a), kernels)
    dx, dw, da, db, dbias = (x.new_empty(0) for _ in range(5))
    u = None
    if lora_a is not None:
        u = run.product(space.BACK, dy, lora_b, scaling)
        da = run.outer(space.LORA_A, u, x, torch.empty_like(lora_a, memory_format=torch.contiguous_format))
        db = run.outer(space.LORA_B, dy, t, torch.empty_like(lora_b, memory_format=torch.contiguous_format))
    if need_x:
        dx = run.product(space.BACKWARD, dy, weight, 1.0, u, lora_a)
    if need_weight:
        dw = run.outer(space.WEIGHT, dy, x, torch.empty_like(weight))
    if need_bias:
        ones = dy.new_ones(dy.shape[0], 1)
        dbias = run.outer(space.WEIGHT, dy, ones, dy.new_empty(weight.shape[0], weight.shape[1], 1)).squeeze(2)
    return dx, dw, da, db, dbias


@grouped_linear_bwd.register_fake
def _(dy, x, weight, offsets, lora_a, lora_b, t, scaling, need_x, need_weight, need_bias, kernels):
    none = x.new_empty(0)
    contiguous = torch.contiguous_format
    return (
        x.new_empty(x.shape) if need_x else none,
        torch.empty_like(weight) if need_weight else x.new_empty(0),
        x.new_empty(0) if lora_a is None else torch.empty_like(lora_a, memory_format=contiguous),
        x.new_empty(0) if lora_b is None else torch.empty_like(lora_b, memory_format=contiguous),
        x.new_empty(weight.shape[:2]) if need_bias else x.new_empty(0),
    )


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)  # the thin product has no gradient: no zeros are made for it
    x, weight, offsets, lora_a, lora_b, ctx.scaling, _, ctx.kernels = inputs
    ctx.save_for_backward(x, weight, offsets, lora_a, lora_b, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, dy, _):
    if dy is None:  # nobody reads the product
        return (None,) * 8
    x, weight, offsets, lora_a, lora_b, t = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dx, dw, da, db, dbias = torch.ops.aifactory.grouped_linear_bwd(
        dy, x, weight, offsets, lora_a, lora_b, t, ctx.scaling, needs[0], needs[1], needs[6], ctx.kernels
    )
    return (
        dx if needs[0] else None, dw if needs[1] else None, None, None if lora_a is None else da,
        None if lora_b is None else db, None, dbias if needs[6] else None, None,
    )  # fmt: skip


grouped_linear_fwd.register_autograd(_backward, setup_context=_setup)
