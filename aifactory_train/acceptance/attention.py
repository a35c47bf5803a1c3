"""Attention within documents, forward and backward, against fp64: every implementation that runs here."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

from aifactory_train.acceptance.report import NotHere, Report

#: Largest relative L2 error of an output or a gradient, by the type of arithmetic.
LIMITS = {"bf16": 2e-2, "fp16": 5e-3, "fp32": 1e-4}


@dataclasses.dataclass(frozen=True)
class AttentionCase:
    """Query heads, key heads, numbers in each, and the documents' lengths."""

    heads: int
    kv: int
    dim: int
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return f"D={self.dim} heads={self.heads}/{self.kv} T={sum(self.lengths)}"


#: Documents of one token among others; none is a multiple of a block.
ODD = (1, 7, 1, 130, 1, 65, 33)


def cases(gpu: bool, quick: bool) -> list[AttentionCase]:
    """Head sizes 64 to 256, 1, 4 and 8 query heads for a key head; on a GPU also 8k tokens."""
    dims = (64, 128) if quick or not gpu else (64, 96, 128, 256)
    groups = (1, 8) if quick else (1, 4, 8)
    found = [AttentionCase(8, 8 // group, dim, ODD) for dim, group in itertools.product(dims, groups)]
    return found + ([AttentionCase(8, 2, 128, (1, 4096, 1, 3000, 1094))] if gpu else [])


def check(report: Report) -> None:
    """Each implementation on each case; which backend SDPA took is a figure."""
    import torch

    from aifactory_train.core import compat
    from aifactory_train.model import attention_choice

    if report.gpu:
        torch.cuda.set_device(report.device)
    bf16 = compat.supports_bf16(report.device)
    kinds = {"bf16": torch.bfloat16} if report.gpu and bf16 else {"fp32": torch.float32}
    if report.gpu and not report.quick:
        kinds["fp32"] = torch.float32
    report.figures["worst_error"] = {}
    for name, run in implementations(report.device).items():
        for kind, dtype in kinds.items():
            with report.part(f"{name} {kind}"):
                one(report, f"{name} {kind}", run, kind, dtype)
    with report.part("backend of SDPA"):
        report.figures["sdpa_backend"] = {k: backend(report.device, dtype) for k, dtype in kinds.items()}
    chosen, why = attention_choice.choose("auto", report.device, next(iter(kinds.values())), heads=(8, 2, 128))
    report.figures["chosen"] = f"{chosen.removeprefix('aifactory_')}: {why}"
    report.said.append(f"auto is {report.figures['chosen']}")


def implementations(device: str) -> dict[str, Callable[..., Any] | None]:
    """Name -> function of q ``[T, H, D]``, k, v ``[T, H_kv, D]`` and documents; None where it does not run here."""
    import importlib.util

    import torch

    from aifactory_train.core import compat
    from aifactory_train.model import attention

    def per_document(q: Any, k: Any, v: Any, bounds: Any) -> Any:
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        return attention.per_document_attention(torch.nn.Module(), q, k, v, None, documents=bounds)[0][0]

    def whole(kernel: Any) -> Callable[..., Any]:
        return lambda q, k, v, bounds: kernel.__wrapped__(q, k, v, bounds, 0.0, None)

    gpu = device != "cpu"
    found: dict[str, Callable[..., Any] | None] = {"per_document": per_document}
    found["varlen"] = whole(attention.varlen_attention) if gpu and compat.varlen_attention() else None
    found["flash"] = whole(attention.flash_attention) if gpu and importlib.util.find_spec("flash_attn") else None
    return found


def one(report: Report, name: str, run: Callable[..., Any] | None, kind: str, dtype: Any) -> None:
    """One implementation in one type over all cases."""
    if run is None:
        raise NotHere("needs a GPU, and a torch or a package that has it")
    if kind == "fp32" and not name.startswith("per_document"):
        raise NotHere("variable-length kernels have no fp32")
    worst = 0.0
    for case in cases(report.gpu, report.quick):
        if kind == "fp32" and report.gpu and max(case.lengths) > 1000:
            continue
        report.begin(f"{name} {case}")
        for what, off in errors(run, case, dtype, report.device).items():
            worst = max(worst, off)
            report.expect(off <= LIMITS[kind], f"{name} {case}: {what} is off by {off:.2g}, at most {LIMITS[kind]:g}")
    report.figures["worst_error"][name] = worst


def errors(run: Callable[..., Any], case: AttentionCase, dtype: Any, device: str) -> dict[str, float]:
    """Relative L2 error of the output and of the three gradients, against fp64 on each document."""
    import torch

    from aifactory_train.model.attention import Documents

    torch.manual_seed(0)
    total = sum(case.lengths)
    edges = torch.tensor([0, *itertools.accumulate(case.lengths)], dtype=torch.int32)
    bounds = Documents.of(edges, device)
    drawn = [torch.randn(total, n, case.dim) for n in (case.heads, case.kv, case.kv, case.heads)]
    inputs = [part.to(device, dtype) for part in drawn]
    leaves = [part.clone().requires_grad_() for part in inputs[:3]]
    out = run(*leaves, bounds)
    gradients = torch.autograd.grad(out, leaves, inputs[3].reshape(out.shape))
    exact, exactly = in_fp64([part.double() for part in inputs], case)
    pairs = {"output": (out, exact)}
    pairs |= {f"d{n}": pair for n, pair in zip("qkv", zip(gradients, exactly, strict=True), strict=True)}
    found = {}
    for what, (mine, theirs) in pairs.items():
        off = float((mine.detach().double().reshape(theirs.shape) - theirs).norm() / theirs.norm())
        found[what] = off if math.isfinite(off) else math.inf
    return found


def in_fp64(inputs: list[Any], case: AttentionCase) -> tuple[Any, tuple[Any, ...]]:
    """Output and gradients of causal attention, document by document, by its formula."""
    import torch

    q, k, v = (part.clone().requires_grad_() for part in inputs[:3])
    outs = []
    for own_q, own_k, own_v in zip(*(part.split(list(case.lengths)) for part in (q, k, v)), strict=True):
        groups = case.heads // case.kv
        heads_k, heads_v = (part.repeat_interleave(groups, 1).transpose(0, 1) for part in (own_k, own_v))
        scores = own_q.transpose(0, 1) @ heads_k.mT * case.dim**-0.5
        later = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
        outs.append((scores.masked_fill(later, float("-inf")).softmax(-1) @ heads_v).transpose(0, 1))
    out = torch.cat(outs)
    return out.detach(), torch.autograd.grad(out, (q, k, v), inputs[3])


def backend(device: str, dtype: Any) -> str:
    """Which implementation SDPA takes for a causal document of shared heads."""
    import torch
    import torch.nn.functional as F
    from torch.utils._python_dispatch import TorchDispatchMode

    from aifactory_train.model.attention import shares_heads

    seen: list[str] = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = function._schema.name.split("::")[1]
            if name.startswith(("_scaled_dot_product", "_flash_attention", "_efficient_attention", "_cudnn_attention")):
                seen.append(name.removeprefix("_scaled_dot_product_").removesuffix("_attention").strip("_"))
            return function(*args, **(kwargs or {}))

    q, k = (torch.randn(1, heads, 256, 64, device=device, dtype=dtype) for heads in (8, 2))
    shared = shares_heads(q)
    if not shared:
        k = k.repeat_interleave(4, 1)
    with Names():
        F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=shared)
    return seen[0] if seen else "math"
