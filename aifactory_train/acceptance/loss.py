"""The loss over the vocabulary at three sizes: value and both gradients against fp32, time and peak memory."""

from __future__ import annotations

import time
from typing import Any

from aifactory_train.acceptance.report import Report

#: Largest relative error of the value, and of a gradient (L2), by type.
LIMITS = {"bf16": (2e-3, 1e-2), "fp32": (1e-5, 1e-4)}


def check(report: Report) -> None:
    """On a GPU 8k rows of 32k, 128k and 256k; on a CPU the same code on small ones."""
    import torch

    from aifactory_train.core import compat

    if report.gpu:
        torch.cuda.set_device(report.device)
        sizes = (131_072,) if report.quick else (32_768, 131_072, 262_144)
        rows, width = 8192, 2048
    else:
        sizes, rows, width = (512, 2048, 4096), 96, 64
        report.said.append("small sizes on a CPU")
    kind = "bf16" if report.gpu and compat.supports_bf16(report.device) else "fp32"
    for vocabulary in sizes:
        with report.part(f"vocabulary of {vocabulary}"):
            one(report, vocabulary, rows, width, kind)


def one(report: Report, vocabulary: int, rows: int, width: int, kind: str) -> None:
    """One size, timed where there is a GPU."""
    import torch

    from aifactory_train.kernels import runtime
    from aifactory_train.model.loss import chunk_rows, linear_cross_entropy

    dtype, device = (torch.bfloat16 if kind == "bf16" else torch.float32), report.device
    torch.manual_seed(0)
    hidden = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(vocabulary, width, device=device) * width**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), device=device)

    def run() -> tuple[Any, ...]:
        value = linear_cross_entropy(hidden, weight, targets, kernels=report.gpu)
        return value.detach(), *torch.autograd.grad(value, (hidden, weight))

    found = run()
    figures: dict[str, Any] = {"rows_at_once": chunk_rows(vocabulary, device=device)}
    if report.gpu:
        arch = runtime.device_of(torch.cuda.current_device())[0]
        figures |= {"triton": runtime.use_triton("linear_cross_entropy", hidden), "arch": arch, **timed(run, device)}
    exact = in_fp32(hidden.detach(), weight.detach(), targets)
    limits = LIMITS[kind]
    names = ("value", "gradient of the hidden states", "gradient of the weight")
    for what, mine, theirs, limit in zip(names, found, exact, (limits[0], limits[1], limits[1]), strict=True):
        off = float((mine.float() - theirs).norm() / theirs.norm())
        figures[f"error of the {what}"] = off
        report.expect(off <= limit, f"vocabulary of {vocabulary}: the {what} is off by {off:.2g}, at most {limit:g}")
    report.figures[str(vocabulary)] = figures


def timed(run: Any, device: str) -> dict[str, float]:
    """Milliseconds of forward and backward, and the peak of memory above what was there."""
    import torch

    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    began = time.perf_counter()
    for _ in range(3):
        run()
    torch.cuda.synchronize(device)
    return {"ms": (time.perf_counter() - began) / 3 * 1e3, "peak_gib_above": peak / 2**30}


def in_fp32(hidden: Any, weight: Any, targets: Any, rows: int = 512) -> tuple[Any, Any, Any]:
    """Value and gradients by the formula in fp32, some rows at a time."""
    import torch

    h, w = hidden.float(), weight.float()
    value = torch.zeros((), device=h.device)
    dh, dw = torch.empty_like(h), torch.zeros_like(w)
    for at in range(0, len(h), rows):
        here = slice(at, at + rows)
        logits = h[here] @ w.T
        own = targets[here].unsqueeze(1)
        lse = logits.logsumexp(1, keepdim=True)
        value += (lse - logits.gather(1, own)).sum()
        d = (logits - lse).exp_()
        d.scatter_add_(1, own, torch.full_like(own, -1, dtype=d.dtype))
        dh[here] = d @ w
        dw += d.T @ h[here]
    return value, dh, dw
