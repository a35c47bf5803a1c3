"""Joining and leaving: GPUs that were asked for, ranks that see one GPU each, and a failed rank that waits for
nobody.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from pathlib import Path

import forked
import pytest
import torch

from aifactory_train.core import compat
from aifactory_train.core.errors import UserError
from aifactory_train.parallel import world
from aifactory_train.parallel.memory_advice import is_out_of_memory
from aifactory_train.run import outcome


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch):
    """``pretended(n)``: torch sees ``n`` GPUs; the process group and its devices are left alone."""
    for name in (
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "LOCAL_WORLD_SIZE",
        "AIFACTORY_EXPECT_GPUS",
        "AIFACTORY_ALLOW_CPU",
    ):
        monkeypatch.delenv(name, raising=False)

    def gpus(count: int) -> None:
        monkeypatch.setattr(compat, "device_type", lambda: "cuda" if count else "cpu")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        monkeypatch.setattr(world.dist, "is_initialized", lambda: False)
        monkeypatch.setattr(world.dist, "init_process_group", lambda *args, **more: None)

    return gpus


def joined(monkeypatch: pytest.MonkeyPatch, local_rank: int = 0, local_size: int = 1) -> world.World:
    size = str(max(local_size, 1))
    for name, value in {
        "RANK": str(local_rank), "WORLD_SIZE": size, "LOCAL_RANK": str(local_rank), "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return world.join_world()


@pytest.mark.parametrize(
    "expected, seen, local_size, words",
    [
        (4, 0, 4, "asked for 4 GPUs"),
        (4, 1, 1, "1 of the 4 GPUs"),
        (4, 2, 2, "2 of the 4 GPUs"),
        (4, 4, 4, None),
        (4, 1, 4, None),  # each rank was given its own
        (0, 0, 2, None),
        (None, 0, 2, None),  # nobody said anything: a laptop
    ],
)
def test_a_gpu_job_does_not_train_on_less(pretended, monkeypatch, expected, seen, local_size, words) -> None:
    pretended(seen)
    if expected is not None:
        monkeypatch.setenv("AIFACTORY_EXPECT_GPUS", str(expected))
    if words is None:
        joined(monkeypatch, local_size=local_size)
        return
    with pytest.raises(UserError, match=words) as refused:
        joined(monkeypatch, local_size=local_size)
    assert refused.value.exit_code == 2 and refused.value.fix
    monkeypatch.setenv("AIFACTORY_ALLOW_CPU", "1")
    if seen == 0:
        assert joined(monkeypatch, local_size=local_size).device == "cpu"
    else:
        with pytest.raises(UserError):
            joined(monkeypatch, local_size=local_size)


def test_a_rank_with_one_gpu_of_its_own_tells_deepspeed_its_number_there(pretended, monkeypatch) -> None:
    pretended(1)
    found = joined(monkeypatch, local_rank=3, local_size=4)
    assert found.device == "cuda:0" and found.local_rank == 3
    assert os.environ["LOCAL_RANK"] == "0", "DeepSpeed sets the device of this number"
    world._BEFORE.clear()
    pretended(4)
    assert joined(monkeypatch, local_rank=3, local_size=4).device == "cuda:3"
    assert os.environ["LOCAL_RANK"] == "3"
    world._BEFORE.clear()


# ---- a rank that fails


def fail_on_rank_1(kind: str):
    """In a child: a world that says it has GPUs, whose group cannot be taken down, and a trainer that fails on rank
    1.
    """

    def in_child(rank: int, tell) -> None:
        from dataclasses import replace

        import aifactory_train.training.start as train
        from aifactory_train.core.errors import RunFailed

        join = train.join_world
        train.join_world = lambda *args: replace(join(*args), device="cuda:0")
        world.dist.destroy_process_group = blocking(world.dist.destroy_process_group)

        def fails(*args):
            if rank == 1:
                tell({"failed": True})
                raise RunFailed("a row is bad", fix="repair it") if kind == "RunFailed" else KeyError("row")
            time.sleep(600)  # stands for a collective that waits for rank 1

        train.Trainer = fails

    return in_child


def blocking(real):
    def destroy(group=None):
        if group is None:
            time.sleep(600)  # NCCL flushes and finalises together with ranks that never come
        return real(group)

    return destroy


@pytest.mark.parametrize("kind, code", [("RunFailed", 1), ("KeyError", 1)])
def test_a_failed_rank_on_a_gpu_is_gone_without_the_others(tmp_path: Path, make_recipe, kind: str, code: int) -> None:
    forked.preload()
    recipe = make_recipe()
    run = tmp_path / "run"
    argv = ["train", str(recipe), "--run-dir", str(run), "--attempt", "1", "--quiet"]
    with forked.ranks(2, argv, tmp_path / "log", in_child=fail_on_rank_1(kind)) as ranks:
        assert ranks.until(lambda e: e.get("failed"), 120), (tmp_path / "log/rank-1.log").read_text()
        since = time.monotonic()
        while 1 not in ranks.codes and time.monotonic() - since < 15:
            ranks.poll()
        assert ranks.codes.get(1) == code and 0 not in ranks.codes
    reported = json.loads((run / "attempts/001/outcome-1.json").read_text())
    assert reported["status"] == "failed" and reported["exception"] == kind
    log = (tmp_path / "log/rank-1.log").read_text()
    assert (
        ("aifactory train: a row is bad" in log) if kind == "RunFailed" else ("Traceback" in log and "KeyError" in log)
    )


# ---- who hangs


PACKAGE = Path(outcome.__file__).parents[1]


def stack(*places: tuple[Path | str, str]) -> traceback.StackSummary:
    return traceback.StackSummary.from_list([(str(file), 1, name, "") for file, name in places])


TRAIN = (PACKAGE / "training/trainer.py", "train_step")


@pytest.mark.parametrize(
    "places, on_gpu, on_cpu",
    [
        ([TRAIN], True, False),  # loss.item(): the call into torch leaves no frame
        (
            [TRAIN, (PACKAGE / "parallel/ddp.py", "forward_backward"), ("/x/torch/autograd/graph.py", "run")],
            True,
            True,  # DDP and FSDP reduce there
        ),
        ([TRAIN, ("/x/torch/distributed/distributed_c10d.py", "all_reduce")], True, True),
        (
            [TRAIN, (PACKAGE / "parallel/batches.py", "micro_batch"), (PACKAGE / "data/batch.py", "collate")],
            False,
            False,
        ),
        ([TRAIN, (PACKAGE / "data/store.py", "tokens"), ("/x/numpy/core/memmap.py", "__getitem__")], False, False),
        ([TRAIN, (PACKAGE / "parallel/batches.py", "device_batch")], True, False),  # a copy waits for the device
        ([TRAIN, (PACKAGE / "core/files.py", "write_json")], False, False),
        (
            [TRAIN, (PACKAGE / "training/stopping.py", "agree"), ("/x/torch/distributed/c10d_logger.py", "wrapper")],
            True,
            True,
        ),
    ],
)
def test_waiting_is_told_from_hanging(places, on_gpu, on_cpu) -> None:
    assert outcome.waits_for_others(stack(*places), "cuda:0") is on_gpu
    assert outcome.waits_for_others(stack(*places), "cpu") is on_cpu
    assert not outcome.waits_for_others(stack(*places), "alone")


def asleep(folder: Path, rank: int, device: str) -> None:
    """One rank whose main thread sleeps: in our collate (rank 0), or where the device is asked for a result (rank
    1).
    """
    from aifactory_train.run.folder import RunFolder

    where = PACKAGE / ("data/batch.py" if rank == 0 else "training/trainer.py")
    code = compile("def item():\n    import time\n    time.sleep(60)\n", str(where), "exec")
    names: dict = {}
    exec(code, names)
    attempt = outcome.Attempt(RunFolder(folder), rank, rank, 1, timeout_s=2.0, device=device)
    attempt.beat(7, "reduce")
    names["item"]()


def test_only_the_rank_that_hangs_is_accused(tmp_path: Path) -> None:
    from aifactory_train.launchers.programs.attempt import diagnose

    children = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            try:
                asleep(tmp_path, rank, "cuda:0")
            finally:
                os._exit(99)
        children.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [1, 1]
    folder = tmp_path / "attempts" / "001"
    reported = [json.loads((folder / f"outcome-{rank}.json").read_text()) for rank in range(2)]
    assert [t["exception"] for t in reported] == ["Hang", "TimeoutError"]
    assert "timed out waiting for other ranks" in reported[1]["message"]
    state, cause = diagnose(str(folder), 2)
    assert state == "failed" and (cause["rank"], cause["kind"]) == (0, "hang")


# ---- out of memory


@pytest.mark.parametrize(
    "text, yes",
    [
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported", True),
        ("HIP out of memory. Tried to allocate 512 MiB", True),
        ("HIP error: out of memory", True),
        ("CUDA driver error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("HIPBLAS_STATUS_ALLOC_FAILED when calling hipblasCreate", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("miopenStatusAllocFailed", True),
        ("NCCL error: unhandled cuda error, NCCL version 2.27\nCuda failure 2 'out of memory'", True),
        ("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to allocate", True),
        ("out of resource: shared memory, Required: 262144, Hardware limit: 101376", False),
        ("CUDA error: an illegal memory access was encountered", False),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED", False),
        ("the size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_out_of_memory_is_known_whoever_says_it(text: str, yes: bool) -> None:
    assert is_out_of_memory(RuntimeError(text)) is yes
    assert is_out_of_memory(ValueError(text)) is False
