"""World, pre-flight, memory advice, precision, doctor, record and kernels on the GPUs of European systems, as their
drivers describe them (``tests/skus.py``)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from skus import GIB, SKUS, Sku, pretend

from aifactory_train.commands import doctor
from aifactory_train.config.schema import Recipe
from aifactory_train.core import compat
from aifactory_train.core.errors import UserError
from aifactory_train.kernels import runtime
from aifactory_train.launchers.programs import preflight
from aifactory_train.model.precision import choose_precision
from aifactory_train.parallel import memory_advice, world
from aifactory_train.record.devices import gather_devices, peak_memory


def recipe(**more) -> Recipe:
    return Recipe.model_validate({"model": {"base": "m"}, "data": {"train": ["r.jsonl"]}, **more})


@pytest.fixture(params=SKUS)
def sku(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Sku:
    found = SKUS[request.param]
    pretend(monkeypatch, found)
    runtime.device_of.cache_clear()
    yield found
    runtime.device_of.cache_clear()


@pytest.mark.parametrize("seen", [4, 1])
def test_a_rank_takes_its_device(sku: Sku, seen: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four devices for four ranks, or each rank its own."""
    chosen, given = pretend(monkeypatch, sku, seen), []
    for name, value in {
        "RANK": "6", "WORLD_SIZE": "8", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1", "AIFACTORY_EXPECT_GPUS": "4",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AIFACTORY_ALLOW_CPU", raising=False)
    monkeypatch.setattr(world.dist, "is_initialized", lambda: False)
    monkeypatch.setattr(world.dist, "init_process_group", lambda backend, **more: given.append(backend))
    monkeypatch.setattr(world, "_BEFORE", {})
    found = world.join_world()
    assert found.device == ("cuda:2" if seen == 4 else "cuda:0") and chosen == [found.device]
    assert (found.rank, found.local_rank, found.local_size) == (6, 2, 4) and given == ["cpu:gloo,cuda:nccl"]


def test_precision_follows_the_hardware(sku: Sku) -> None:
    precision, why = choose_precision(recipe(), "cuda:0")
    assert (precision.compute == torch.bfloat16) is sku.bf16 and precision.parameters == torch.float32
    assert why == ("GPU with bf16" if sku.bf16 else "this GPU has no bf16")
    wanted = recipe(precision={"compute": "bf16"})
    if sku.bf16:
        assert choose_precision(wanted, "cuda:0")[0].compute == torch.bfloat16
        return
    with pytest.raises(UserError, match="no bf16") as refused:
        choose_precision(wanted, "cuda:0")
    assert refused.value.where == "precision.compute"


@pytest.mark.parametrize("occupied", [False, True])
def test_the_preflight_passes_an_idle_node_and_no_other(sku: Sku, occupied: bool, monkeypatch) -> None:
    total = int(sku.gib * GIB)
    free = 0.4 if occupied else sku.free
    cached = 0 if occupied else int((0.985 - sku.free) * total)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (int(free * total), total))
    monkeypatch.setattr(preflight, "reclaimable", lambda node: cached)

    def empty(size, dtype, device):
        if size > free * total + cached:
            raise RuntimeError("out of memory")

    seen_by = SimpleNamespace(cuda=torch.cuda, uint8=torch.uint8, empty=empty)
    report = {
        "torch": torch.__version__, "cuda": torch.version.cuda, "rocm": torch.version.hip, "isa": "x86_64", "gpus": 4,
        "gpu": torch.cuda.get_device_name(), "problems": [],
    }  # fmt: skip
    args = SimpleNamespace(gpus=4, unified=False)
    preflight.gpus_seen(args, 4, report)
    preflight.memory(args, seen_by, report)
    assert bool(report["problems"]) is occupied, report
    assert report["gpu_total_gib"] == pytest.approx(sku.gib, abs=0.1)
    assert preflight.place(torch, {**report, "host": "h", "node": "n"})[2] == ["3f6b", "0", "68", "0"]


def test_advice_knows_the_capacity(sku: Sku) -> None:
    total = int(sku.gib * GIB)
    use = memory_advice.measure("cuda:1", total // 4)
    assert use is not None and (use.capacity, use.resident, use.peak) == (total, total // 4, total)
    asked = recipe(train={"micro_batch_tokens": 8192})
    # What is left of the capacity for activations (0.95 - 0.25 of 1 - 0.25), a tenth of it as margin.
    assert f"micro_batch_tokens={int(8192 * 0.84) // 8 * 8} " in memory_advice.advise(asked, use, 4, total // 8)[0]
    said = str(memory_advice.out_of_memory(torch.OutOfMemoryError("CUDA out of memory."), asked, use, 4, 1))
    assert f"{sku.gib:.1f} GiB in all" in said and "--set " in said


def test_doctor_describes_the_node(sku: Sku, capsys: pytest.CaptureFixture[str]) -> None:
    found = doctor.examine()
    assert [d["name"] for d in found["devices"]] == [sku.name] * 4
    assert found["devices"][0]["memory_gib"] == round(sku.gib, 1) and found["devices"][0]["bf16"] is sku.bf16
    assert found["devices"][0]["backend"] == ("ROCm 6.4.43484" if sku.hip else "CUDA 12.8")
    assert ("compute bf16" in found["choices"]["precision"]["choice"]) is sku.bf16
    has_kernel = compat.varlen_attention() is not None and sku.bf16  # FlashAttention has no fp32
    assert found["choices"]["attention"]["choice"] == ("varlen" if has_kernel else "per_document")


def test_the_record_names_the_device(sku: Sku) -> None:
    everyone = world.World(0, 1, 0, 1, "cuda:0", "a test", "n1")
    [(host, device)] = gather_devices(everyone)
    assert host == "n1" and device["model"] == sku.name and device["kind"] == "gpu"
    assert device["vendor"] == ("amd" if sku.hip else "nvidia") and device["runtime"] in ("6.4.43484", "12.8")
    assert (device["uuid"], device["pci"]) == ("3f6b", "0000:44:00")
    assert device["memory_bytes"] == int(sku.gib * GIB)
    assert peak_memory("cuda:0")["bytes"] == int(0.7 * device["memory_bytes"])


def test_the_kernels_know_the_device(sku: Sku) -> None:
    arch, name, units = runtime.device_of(0)
    assert arch == (sku.gcn.split(":")[0] if sku.gcn else f"sm_{sku.capability[0]}{sku.capability[1]}")
    assert (name or "") == sku.known_as and units == sku.units


def test_memory_that_is_the_host_s_is_known(sku: Sku) -> None:
    """Pages of weight files are let go where they push the model's own memory away."""
    assert compat.shares_memory("cuda:0") is ("MI300A" in sku.name)


# ---- Triton that cannot run


def test_without_a_compiler_the_model_keeps_its_own_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton needs one at its first launch: that is tried before anything is replaced, and told."""
    import helpers

    from aifactory_train.kernels import trial
    from aifactory_train.model.causal_lm import CausalLM
    from aifactory_train.model.operators import apply_operators
    from aifactory_train.model.report import ModelReport

    def no_compiler(device) -> None:
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.\nand more")

    pretend(monkeypatch, SKUS["A100"])
    runtime.device_of.cache_clear()
    for works in (False, True):
        monkeypatch.setattr(trial, "run", (lambda device: None) if works else no_compiler)
        monkeypatch.setattr(runtime, "_trouble", None)
        core, report = CausalLM(helpers.tiny_model("llama"), loss_rows=16), ModelReport()
        apply_operators(core, recipe(), device="cuda:0", engine="ddp", weights="always", report=report)
        said = " ".join(str(line) for line in report.lines if line[0] == "kernels")
        assert core.kernels is works, said
        assert ("Failed to find C compiler" in said) is not works and "and more" not in said
        on_gpu = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16)
        assert runtime.use_triton("adamw8bit", on_gpu) is works  # type: ignore[arg-type]
    runtime.device_of.cache_clear()
