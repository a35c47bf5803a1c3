"""What the checks find: on pretended GPUs of the systems that there are, and with mistakes that were planted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pretended
import pytest
import torch
import torch.distributed as dist
from pretended import GPUS

from aifactory_train import sites
from aifactory_train.acceptance import attention, curves, facts, group, host, kernels, loss, machine, speed, truth
from aifactory_train.acceptance.report import Report
from aifactory_train.parallel.world import World

EACH = pytest.mark.parametrize("gpu", GPUS.values(), ids=GPUS)


@pytest.fixture(autouse=True)
def as_before():
    from aifactory_train.kernels import runtime

    yield
    runtime.device_of.cache_clear()


def report_of(tmp_path: Path, device: str = "cuda:0", gpus: int = 4) -> Report:
    return Report("a test", device, tmp_path / "work", gpus=gpus if device != "cpu" else 0)


# ---- the installation


@EACH
def test_a_healthy_node_passes(gpu, tmp_path: Path, monkeypatch) -> None:
    pretended.use(monkeypatch, gpu)
    monkeypatch.setenv("AIFACTORY_EXPECT_GPUS", str(gpu.count))
    report = report_of(tmp_path)
    truth.check(report)
    assert report.status == "PASS", report.why
    assert len(report.figures["memory_gib"]) == gpu.count and report.figures["device"] == gpu.device
    assert ("the kernels are not proven for sm_70" in report.why) is (gpu.arch == "sm_70")
    assert report.figures["bf16"] == [gpu.bf16] * gpu.count


@EACH
def test_what_is_wrong_with_a_node_is_said(gpu, tmp_path: Path, monkeypatch) -> None:
    """A build for other GPUs, a GPU that is missing, memory that somebody else holds."""
    pretended.use(monkeypatch, gpu, free=0.4, can_have=0.4, arch_list=["sm_120", "gfx1100"])
    monkeypatch.setenv("AIFACTORY_EXPECT_GPUS", str(gpu.count + 1))
    monkeypatch.setattr("aifactory_train.launchers.programs.preflight.reclaimable", lambda node: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    report = report_of(tmp_path)
    truth.check(report)
    assert report.status == "FAIL"
    assert f"is built for sm_120, gfx1100, GPU 0 is {gpu.name} ({gpu.arch})" in report.why
    assert f"torch sees {gpu.count} of {gpu.count + 1} GPUs" in report.why
    assert report.why.count("something else runs there") == gpu.count
    assert "a C compiler not here" in report.why


def test_page_cache_of_one_memory_is_no_occupied_gpu(tmp_path: Path, monkeypatch) -> None:
    pretended.use(monkeypatch, GPUS["MI300A"], free=0.5, can_have=0.0)
    monkeypatch.setattr("aifactory_train.launchers.programs.preflight.reclaimable", lambda node: 60 * pretended.GIB)
    report = report_of(tmp_path)
    truth.memory(report, 0)
    assert report.status == "PASS", report.why


def test_a_cpu_build_on_a_gpu_node_fails(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("AIFACTORY_EXPECT_GPUS", "4")
    report = report_of(tmp_path, "cpu")
    truth.check(report)
    assert report.status == "FAIL" and "4 GPUs were asked for or are here" in report.why


@pytest.mark.parametrize(
    ("built", "arch", "runs"),
    [
        (["sm_80", "sm_90"], "sm_86", True),  # the same generation, earlier
        (["sm_80", "sm_90"], "sm_100", False),
        (["sm_80", "compute_90"], "sm_100", True),  # the driver compiles it
        (["sm_90a"], "sm_90", False),
        (["sm_90", "sm_100f"], "sm_103", False),
        (["gfx90a"], "gfx942", False),
        ([], "gfx942", True),
    ],
)
def test_which_builds_run_on_which_gpu(built, arch, runs) -> None:
    from types import SimpleNamespace

    amd = arch.startswith("gfx")
    major, minor = (9, 0) if amd else (int(arch[3:-1]), int(arch[-1]))
    facts_of = SimpleNamespace(major=major, minor=minor, gcnArchName=arch if amd else "")
    assert truth.runs_on(built, facts_of, amd) is runs


# ---- the machine and the profile


@EACH
def test_the_machine_of_a_profile_confirms_it(gpu, monkeypatch) -> None:
    system = sites.load(gpu.site, overlay=False)
    pretended.use(monkeypatch, dataclasses.replace(gpu, count=system.node.gpus or gpu.count))
    seen = {"gpus": machine.gpus(), "host": {"isa": system.node.isa}, "runtime": {}}
    assert seen["gpus"][0]["arch"] == gpu.arch and seen["gpus"][0]["device"] == gpu.device
    assert seen["gpus"][0]["pci"] == "0000:c1:00"
    rows = {row["fact"]: row for row in facts.compare(system, seen)}
    for fact in ("gpu.arch", "gpu.vendor", "gpu.memory_gib", "gpu.sku"):
        assert rows[fact]["verdict"] in ("confirmed", "new"), rows[fact]
    assert rows["gpu.arch"]["verdict"] == "confirmed" == rows["node.gpus"]["verdict"]


def test_another_machine_contradicts_it(monkeypatch) -> None:
    system = sites.load("lumi-g", overlay=False)
    pretended.use(monkeypatch, dataclasses.replace(GPUS["A100"], count=4))
    host_of = {"isa": "aarch64", "cores": 3, "numa_domains": 1, "memory_gib": 100.0}
    seen = {"gpus": machine.gpus(), "host": host_of, "runtime": {}}
    rows = {row["fact"]: row for row in facts.compare(system, seen)}
    for fact in ("gpu.arch", "gpu.vendor", "gpu.memory_gib", "gpu.compute_units", "node.isa", "node.cores"):
        assert rows[fact]["verdict"] == "contradicted", rows[fact]
    assert rows["node.gpus"]["verdict"] == "not seen"  # a job may have been given a part of a node
    assert facts.verdict("node.gpus", 4, 8) == "contradicted"
    assert facts.verdict("node.gpu_numa", [3, 3, 1, 1], [3, 3]) == "confirmed"
    assert facts.verdict("software.driver", "550", "550.54.15") == "confirmed"


# ---- the process group


@EACH
def test_the_group_of_training_is_what_is_formed(gpu, tmp_path: Path, monkeypatch) -> None:
    asked: list[str] = []
    whole = dist.init_process_group

    def init(backend: str, **more) -> None:
        asked.append(backend)
        whole("gloo", **more)

    pretended.use(monkeypatch, gpu)
    monkeypatch.delenv("AIFACTORY_EXPECT_GPUS", raising=False)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dist, "init_process_group", init)
    monkeypatch.setattr(group, "LEAVE_S", 60.0)  # of a busy machine
    report = report_of(tmp_path)
    group.alone(report)
    assert report.status == "PASS", report.why
    assert asked == ["cpu:gloo,cuda:nccl"] and not dist.is_initialized()


# ---- mistakes are found


@pytest.mark.parametrize("broken", [False, True])
def test_attention_across_documents_is_found(broken: bool) -> None:
    run = attention.implementations("cpu")["per_document"]
    case = attention.AttentionCase(4, 2, 16, (1, 5, 12))
    if broken:
        whole = run

        def run(q, k, v, bounds):
            from aifactory_train.model.attention import Documents

            return whole(q, k, v, Documents.of(torch.tensor([0, 18], dtype=torch.int32), "cpu"))

    worst = max(attention.errors(run, case, torch.float32, "cpu").values())
    assert (worst > attention.LIMITS["bf16"]) if broken else (worst < attention.LIMITS["fp32"])


@pytest.mark.parametrize("factor", [1.0, 1.001])
def test_a_kernel_s_wrong_gradient_is_found(factor: float, tmp_path: Path) -> None:
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx, grad):
            return grad * 2 * ctx.saved_tensors[0] * factor

    report = report_of(tmp_path, "cpu")
    given = (torch.randn(7, 5, requires_grad=True),)
    kernels.compare(report, "square fp32", Scaled.apply, lambda x: x * x, given)
    assert (report.status == "FAIL") is (factor != 1.0)


def test_strided_rows_hold_the_same_numbers() -> None:
    first = torch.randn(3, 5, requires_grad=True)
    moved = kernels.strided((first, 2.0))
    assert moved is not None and torch.equal(moved[0], first) and not moved[0].is_contiguous() and moved[1] == 2.0
    assert kernels.strided((torch.randn(2, 3, 4, requires_grad=True),)) is None


def test_the_loss_by_its_formula() -> None:
    torch.manual_seed(0)
    h, w = torch.randn(9, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    targets = torch.randint(11, (9,))
    value = torch.nn.functional.cross_entropy(h @ w.T, targets, reduction="sum")
    exact = (value.detach(), *torch.autograd.grad(value, (h, w)))
    for mine, theirs in zip(loss.in_fp32(h.detach(), w.detach(), targets, rows=4), exact, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_wait_within_a_step_is_counted(monkeypatch) -> None:
    class Waits:
        def forward_backward(self, batch, scale, last):
            return torch.ones(3).sum().item() * torch.ones(())

        def clip(self, *given):
            return torch.ones(())

        def step(self, rate):
            torch.ones(2).nonzero()

        def discard(self):
            pass

    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    within, a_step = host.on_cpu(Waits(), World(0, 1, 0, 1, "cpu", "a test", "here"), "ddp")
    assert within == "_local_scalar_dense" and a_step == 3  # its own, the one of a step, and what the update asks


def test_the_share_that_a_device_works() -> None:
    assert host.busy_share([(0, 10), (5, 20), (30, 40), (35, 36)]) == (30, 40, 10)
    assert host.busy_share([]) == (0, 0, 0)


def test_another_curve_is_found(tmp_path: Path) -> None:
    report = report_of(tmp_path, "cpu")
    report.figures["deviation"] = {}
    curves.against(report, "as it is", [2.0, 1.0], [2.0, 1.00001], 1e-4)
    assert report.status == "PASS"
    curves.against(report, "other", [2.0, 1.0], [2.0, 1.01], 1e-4)
    assert report.why == "other: the curve is off by 0.0099, at most 0.0001"


def test_a_model_that_fits_every_gpu() -> None:
    assert speed.fitting(140 * pretended.GIB)["num_hidden_layers"] == 16
    for gpu in GPUS.values():
        shape = speed.fitting(int(gpu.memory_gib * pretended.GIB))
        assert 4 <= shape["num_hidden_layers"] <= 16
    assert 1.1e9 < speed.parameters(speed.SHAPE) < 1.4e9
