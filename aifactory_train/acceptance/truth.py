"""Whether what is installed fits what is here: torch, driver, GPU, Triton, compiler, number formats, memory."""

from __future__ import annotations

import os
import shutil
import sysconfig
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from aifactory_train.acceptance.report import NotHere, Report


def check(report: Report) -> None:
    """Every GPU of this machine, and what compiles for it."""
    import torch

    from aifactory_train.core import compat

    with report.part("build"):
        build(report)
    with report.part("compiler"):
        compiler(report)
    if compat.device_type() != "cuda":
        report.said.append(f"torch {torch.__version__} without a GPU")
        return
    with report.part("tuned configurations"):
        configurations(report)
    for index in range(torch.cuda.device_count()):
        with report.part(f"GPU {index}"):
            numbers(report, index)
        with report.part(f"memory of GPU {index}"):
            memory(report, index)
    with report.part("a kernel is compiled"):
        compile_one(report)


def build(report: Report) -> None:
    """torch's build against driver and GPU: the GPUs that the system shows are those that torch can use."""
    import torch

    from aifactory_train.core import compat
    from aifactory_train.launchers.shaping import visible_gpus

    expected = os.environ.get("AIFACTORY_EXPECT_GPUS", "")
    asked = int(expected) if expected.isdigit() else 0
    there = visible_gpus()
    seen = torch.cuda.device_count() if compat.device_type() == "cuda" else 0
    built = torch.version.cuda or torch.version.hip
    report.figures |= {"torch": torch.__version__, "gpus_there": there, "gpus_asked": asked, "gpus_seen": seen}
    if not seen and max(asked, there):
        what = "sees none of them" if built else "is a build for CPUs"
        report.problems.append(
            f"{max(asked, there)} GPUs were asked for or are here, torch {torch.__version__} {what}: install a build of"
            " torch for this GPU and driver (aifactory env)"
        )
    elif seen < asked:
        report.problems.append(f"torch sees {seen} of {asked} GPUs: look at the node and at *_VISIBLE_DEVICES")
    elif seen < there:  # a container may be given some of those that the driver lists
        report.said.append(f"torch sees {seen} of the {there} GPUs that the driver lists")
    if not seen:
        return
    arch_list = torch.cuda.get_arch_list()
    report.figures["built_for"] = arch_list
    for index in range(seen):
        facts = torch.cuda.get_device_properties(index)
        report.expect(
            runs_on(arch_list, facts, bool(torch.version.hip)),
            f"torch {torch.__version__} is built for {', '.join(arch_list)}, GPU {index} is {facts.name}"
            f" ({_arch(facts)}): install a build that has it",
        )


def _arch(facts: Any) -> str:
    name = getattr(facts, "gcnArchName", "")
    return name.split(":")[0] if name.startswith("gfx") else f"sm_{facts.major}{facts.minor}"


def runs_on(arch_list: list[str], facts: Any, hip: bool) -> bool:
    """Whether code for ``arch_list`` runs on a GPU: its own architecture; on NVIDIA also an earlier one of the same
    generation (``sm_80`` on 8.6), or code that the driver still compiles (``compute_``). No list: nothing is known
    against it."""
    if not arch_list or _arch(facts) in arch_list:
        return True
    if hip:
        return False
    for name in arch_list:
        kind, _, digits = name.partition("_")
        number = "".join(c for c in digits if c.isdigit())
        if not number or digits.endswith(("a", "f")):  # code for one architecture alone
            continue
        major, minor = int(number[:-1]), int(number[-1])
        if kind == "sm" and major == facts.major and minor <= facts.minor:
            return True
        if kind == "compute" and (major, minor) <= (facts.major, facts.minor):
            return True
    return False


def compiler(report: Report) -> None:
    """What Triton and ``parallel.compile`` build their launchers with. Missing it is a problem where there is a GPU."""
    found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    report.figures |= {"compiler": found, "python_header": header.is_file()}
    missing = [name for name, there in (("a C compiler", found), (f"{header}", header.is_file())) if not there]
    if not missing:
        return
    text = f"{' and '.join(missing)} not here: kernels and compiled blocks cannot be built"
    if report.gpu:
        report.problems.append(f"{text}; load a compiler's module, or take an image with gcc and python3-dev")
    else:
        report.said.append(text)


def configurations(report: Report) -> None:
    """Triton's version against the tuned configurations; what is not used is said, the kernels run without."""
    from aifactory_train.kernels import hardware, registry
    from aifactory_train.kernels.runtime import device_of

    arch, device, _ = device_of(0)
    report.figures |= {"triton": registry.triton_version(), "arch": arch, "device": device}
    if arch not in hardware.TARGETS:
        report.said.append(f"the kernels are not proven for {arch}: operators take the torch path")
        return
    if registry.triton_version() is None:
        report.problems.append("Triton is not installed: every operator takes the torch path (pip install triton)")
        return
    statuses: dict[str, int] = {}
    notes: set[str] = set()
    for name in registry.OPERATORS:
        chosen = registry.select(name, arch, device, "bf16", registry.operator(name).checks[0])
        for provenance in chosen.provenance.values():
            statuses[provenance.status] = statuses.get(provenance.status, 0) + 1
            notes |= set(provenance.notes)
    report.figures |= {"configurations": statuses, "not_used": sorted(notes)}
    if notes:
        report.said.append(f"{len(notes)} tuned configurations are not used: {sorted(notes)[0]}")
    if device is None:
        report.said.append(f"no known device fits this GPU: the configurations of {arch} are used")


def numbers(report: Report, index: int) -> None:
    """The GPU computes, also in bf16 where it has it."""
    import torch

    from aifactory_train.core import compat

    device = f"cuda:{index}"
    torch.cuda.set_device(index)
    report.figures.setdefault("bf16", []).append(compat.supports_bf16(device))
    kinds = [torch.float32] + [torch.bfloat16] * compat.supports_bf16(device)
    if not compat.supports_bf16(device):
        report.said.append("no bf16: training computes in fp32")
    torch.manual_seed(0)
    a, b = torch.randn(256, 256), torch.randn(256, 256)
    for kind in kinds:
        found = (a.to(device, kind) @ b.to(device, kind)).double().cpu()
        exact = a.to(kind).double() @ b.to(kind).double()
        off = float((found - exact).norm() / exact.norm())
        report.expect(off < 1e-2, f"GPU {index}: a product in {kind} is off by {off:.2g}")
    torch.cuda.set_device(0)


def memory(report: Report, index: int) -> None:
    """80 % of a GPU's memory can be had. Where it is the host's own, it is counted: what is asked of it may cost
    another process its life."""
    import torch

    from aifactory_train.core import compat
    from aifactory_train.launchers.programs import preflight

    device = f"cuda:{index}"
    torch.cuda.set_device(index)
    free, total = torch.cuda.mem_get_info(device)
    report.figures.setdefault("memory_gib", []).append(
        {"free": round(free / 2**30, 2), "total": round(total / 2**30, 2)}
    )
    if compat.shares_memory(device):
        found: dict[str, Any] = {"gpu": torch.cuda.get_device_properties(device).name, "problems": []}
        preflight.memory(SimpleNamespace(unified=True), torch, found)
        report.problems += found["problems"]
        return
    try:
        held = torch.empty(int(0.8 * total), dtype=torch.uint8, device=device)
        held[-1:].fill_(1)
        torch.cuda.synchronize(device)
        del held
    except RuntimeError as error:
        text = " ".join(str(error).split())[:200]
        report.problems.append(
            f"80 % of GPU {index}'s {total / 2**30:.1f} GiB cannot be had, {free / 2**30:.1f} GiB are free: something"
            f" else runs there ({text})"
        )
    torch.cuda.empty_cache()
    torch.cuda.set_device(0)


def compile_one(report: Report) -> None:
    """A kernel is compiled from nothing and gives the right values."""
    import torch

    from aifactory_train.kernels import hardware, ops, runtime
    from aifactory_train.kernels.rms_norm.reference import rms_norm as exactly

    arch = runtime.device_of(0)[0]
    if arch not in hardware.TARGETS or not runtime.HAS_TRITON:
        raise NotHere(f"no Triton kernels for {arch}")
    os.environ["TRITON_CACHE_DIR"] = str(report.work / "triton")
    x = torch.randn(64, 1024, device="cuda:0")
    w = torch.randn(1024, device="cuda:0")
    found, exact = ops.rms_norm(x, w, 1e-6), exactly(x.double(), w.double(), 1e-6)
    off = float((found.double() - exact).norm() / exact.norm())
    report.expect(off < 1e-5, f"the first kernel is off by {off:.2g}")
