"""Writes the folder of a new operator: a small one that works, to be changed into the one that is wanted."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from aifactory_train.kernels.spec import folders

_INIT = '''"""``x * sigmoid(gate)``: an example to be changed."""
'''

_SPACE = '''"""What NAME says about itself: launch parameters, traffic and inputs. No torch at import."""

from aifactory_train.kernels.spec import ITEMSIZE, Config, Kernel, Operator, Shape, tile_space


def forward_arguments(dtype: str, shape: Shape) -> dict:
    """Every run-time argument of the kernel as a launch gives it: a Triton type, or the integer of a typical launch."""
    w, p = shape["width"], "*" + dtype
    return {"X": p, "G": p, "Y": p, "sx": w, "sg": w, "sy": w, "n_cols": w}


def backward_arguments(dtype: str, shape: Shape) -> dict:
    w, p = shape["width"], "*" + dtype
    return {
        "DY": p, "X": p, "G": p, "DX": p, "DG": p, "sdy": w, "sx": w, "sg": w, "sdx": w, "sdg": w, "n_cols": w,
    }  # fmt: skip


def constexprs(config: Config, dtype: str, shape: Shape) -> dict:
    return {"BLOCK": config["block"]}


def space(target, dtype: str, shape: Shape):
    return tile_space(target, dtype, shape["width"])


def floor(direction: str, dtype: str, shape: Shape) -> int:
    """Forward 3 passes over [N, W] (read x and gate, write y), backward 5 (read 3, write 2); bytes."""
    return (3 if direction == "forward" else 5) * ITEMSIZE[dtype] * shape["rows"] * shape["width"]


def inputs(make, shape: Shape) -> tuple:
    """The positional arguments of the operator and of its oracle; `make` is a workbench.inputs.Make."""
    n, w = shape["rows"], shape["width"]
    return make.normal(n, w), make.normal(n, w)


MODULE = "NAME.triton_kernels"
KERNELS = (
    Kernel(
        "NAME_fwd", "forward", f"{MODULE}:forward", forward_arguments, constexprs, space, "width",
        inputs=2,
    ),
    Kernel(
        "NAME_bwd", "backward", f"{MODULE}:backward", backward_arguments, constexprs, space, "width",
        inputs=3,
    ),
)  # fmt: skip
CHECKS = tuple({"rows": 8191, "width": w} for w in (2048, 4096, 14336, 28672))
OPERATOR = Operator("NAME", ("rows", "width"), KERNELS, floor, CHECKS, inputs, flops=5)
'''

_REFERENCE = '''"""NAME in plain torch: the oracle of the tests (fp64-capable) and the CPU path."""

import torch

from aifactory_train.kernels.runtime import wide


def NAME(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(gate)``."""
    return x * torch.sigmoid(gate)


def backward(dy: torch.Tensor, x: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, dgate) in closed form, computed in at least fp32."""
    g, s = wide(dy), torch.sigmoid(wide(gate))
    return (g * s).to(x.dtype), (g * wide(x) * s * (1 - s)).to(gate.dtype)
'''

_TRITON = '''"""NAME over column tiles: nothing is kept but the tile, so the width is no limit."""

import triton
import triton.language as tl


@triton.jit
def forward(X, G, Y, sx, sg, sy, n_cols, BLOCK: tl.constexpr):
    """Y = X * sigmoid(G); program (row, column tile). Arithmetic in fp32, row offsets in 64 bits."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = c < n_cols
    x = tl.load((X + row * sx) + c, mask=ok, other=0.0).to(tl.float32)
    g = tl.load((G + row * sg) + c, mask=ok, other=0.0).to(tl.float32)
    tl.store((Y + row * sy) + c, (x * tl.sigmoid(g)).to(Y.dtype.element_ty), mask=ok)


@triton.jit
def backward(DY, X, G, DX, DG, sdy, sx, sg, sdx, sdg, n_cols, BLOCK: tl.constexpr):
    """DX = DY * sigmoid(G), DG = DY * X * sigmoid'(G)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = c < n_cols
    dy = tl.load((DY + row * sdy) + c, mask=ok, other=0.0).to(tl.float32)
    x = tl.load((X + row * sx) + c, mask=ok, other=0.0).to(tl.float32)
    s = tl.sigmoid(tl.load((G + row * sg) + c, mask=ok, other=0.0).to(tl.float32))
    tl.store((DX + row * sdx) + c, (dy * s).to(DX.dtype.element_ty), mask=ok)
    tl.store((DG + row * sdg) + c, (dy * x * s * (1.0 - s)).to(DG.dtype.element_ty), mask=ok)
'''

_OP = '''"""NAME as registered operators with autograd."""

import torch

from aifactory_train.kernels import runtime
from aifactory_train.kernels.NAME import reference
from aifactory_train.kernels.spec import cdiv

__all__ = ["NAME"]


def NAME(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """``x * sigmoid(gate)``. Both [..., W] of one shape and dtype; differentiable in both; fp32 inside."""
    if not runtime.use_triton("NAME", x):
        return reference.NAME(x, gate)
    return torch.ops.aifactory.NAME_fwd(x, gate)


@runtime.custom_op("NAME_fwd", "(Tensor x, Tensor gate) -> Tensor")
def NAME_fwd(x, gate):
    if x.shape != gate.shape or x.dtype != gate.dtype:
        raise ValueError(f"x {tuple(x.shape)} {x.dtype} and gate {tuple(gate.shape)} {gate.dtype} must agree")
    if not runtime.use_triton("NAME", x):
        return reference.NAME(x, gate).contiguous()
    from aifactory_train.kernels.NAME.triton_kernels import forward as kernel

    a, b = runtime.rows2d(x), runtime.rows2d(gate)
    n, width = a.shape
    y = x.new_empty(x.shape)
    if n:
        config = runtime.launch("NAME", x, rows=n, width=width)["NAME_fwd"]
        kernel[(n, cdiv(width, config["block"]))](
            a, b, y, a.stride(0), b.stride(0), width, width, BLOCK=config["block"], **runtime.compiler_options(config)
        )
    return y


@NAME_fwd.register_fake
def _(x, gate):
    return x.new_empty(x.shape)


@runtime.custom_op("NAME_bwd", "(Tensor dy, Tensor x, Tensor gate) -> (Tensor, Tensor)")
def NAME_bwd(dy, x, gate):
    if not runtime.use_triton("NAME", x):
        dx, dgate = reference.backward(dy, x, gate)
        return dx.contiguous(), dgate.contiguous()
    from aifactory_train.kernels.NAME.triton_kernels import backward as kernel

    g, a, b = runtime.rows2d(dy), runtime.rows2d(x), runtime.rows2d(gate)
    n, width = a.shape
    dx, dgate = x.new_empty(x.shape), gate.new_empty(gate.shape)
    if n:
        config = runtime.launch("NAME", x, rows=n, width=width)["NAME_bwd"]
        kernel[(n, cdiv(width, config["block"]))](
            g, a, b, dx, dgate, g.stride(0), a.stride(0), b.stride(0), width, width, width, BLOCK=config["block"],
            **runtime.compiler_options(config),
        )  # fmt: skip
    return dx, dgate


@NAME_bwd.register_fake
def _(dy, x, gate):
    return x.new_empty(x.shape), gate.new_empty(gate.shape)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return torch.ops.aifactory.NAME_bwd(dy, *ctx.saved_tensors)


NAME_fwd.register_autograd(_backward, setup_context=_setup)
'''

_DTENSOR = '''"""Sharding rules of NAME: elementwise, so every dimension may be sharded."""

from aifactory_train.kernels.sharding import Shard, rule, whole


@rule("NAME_fwd")
def NAME_fwd(x, gate):
    return [([p], [p, p]) for p in [whole, *(Shard(d) for d in range(len(x.shape)))]]


@rule("NAME_bwd")
def NAME_bwd(dy, x, gate):
    return [([p, p], [p, p, p]) for p in [whole, *(Shard(d) for d in range(len(x.shape)))]]
'''

FILES = {
    "__init__.py": _INIT,
    "space.py": _SPACE,
    "reference.py": _REFERENCE,
    "triton_kernels.py": _TRITON,
    "op.py": _OP,
    "dtensor.py": _DTENSOR,
}


def refusal(name: str, into: Path) -> str:
    """Why no operator of that name can be written there, or nothing."""
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        return f"'{name}' is no name for an operator: small letters, digits and underscores, and no word of Python"
    if not into.is_dir():
        return f"{into} is no folder"
    for folder in (*folders(), into):
        if (folder / name).exists() or (folder / f"{name}.py").exists():
            return f"there is already a {name} in {folder}"
    return ""


def write(name: str, into: Path) -> list[Path]:
    """Write ``into/name``. Raises ``ValueError`` where the name or the folder will not do."""
    if why := refusal(name, into):
        raise ValueError(why)
    (into / name).mkdir()
    written = []
    for file, text in FILES.items():
        path = into / name / file
        path.write_text(text.replace("NAME", name), encoding="utf-8")
        written.append(path)
    return written
