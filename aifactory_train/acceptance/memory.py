"""Out of memory on purpose: it is recognised, the advice names a setting with which it runs, and a run ends with 1."""

from __future__ import annotations

import re
import resource
from pathlib import Path
from typing import Any

from aifactory_train.acceptance import small
from aifactory_train.acceptance.report import NotHere, Report

#: What libraries say; each must be taken for a lack of memory. And what must not.
TEXTS = (
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "HIP out of memory. Tried to allocate 512.00 MiB",
    "HIPBLAS_STATUS_ALLOC_FAILED when calling hipblasCreate(&handle)",
    "NCCL error: unhandled cuda error, last error: Cuda failure 2 'out of memory'",
    "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8",
)
OTHERS = ("CUDA error: an illegal memory access was encountered", "out of resource: shared memory, Required: 300000")
#: The setting that the first line of an advice names.
SETTING = re.compile(r"--set ([a-z_.0-9]+)=(\S+)")
#: How often advice may be followed until it runs: each is computed from what is known at the failure.
MOST_TRIES = 8
LENGTH = 512
SHAPE = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 2,
         "num_hidden_layers": 8}  # fmt: skip
#: What a machine without a GPU is left with beyond what the process holds, so that its own memory runs out.
CPU_ROOM = 600 * 2**20


def check(report: Report) -> None:
    """The texts; then a batch that doubles until it does not fit, and the advice that follows."""
    from aifactory_train.parallel.memory_advice import is_out_of_memory

    for text in TEXTS:
        report.expect(is_out_of_memory(RuntimeError(text)), f"not taken for a lack of memory: {text}")
    for text in OTHERS:
        report.expect(not is_out_of_memory(RuntimeError(text)), f"wrongly taken for a lack of memory: {text}")
    with report.part("a batch that does not fit"):
        forced(report)


def forced(report: Report) -> None:
    """Doubles the batch until memory runs out, then follows the first line of each advice until it runs."""
    from aifactory_train.cli import report_fault
    from aifactory_train.core.errors import EXIT_FAILED
    from aifactory_train.parallel.world import join_world

    world = join_world(60, threads=1)
    shape = SHAPE if report.gpu else {**SHAPE, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 4}
    tokens, failure = 8192 if report.gpu else 1024, None
    settings = small.recipe(tokens=tokens, length=LENGTH)
    running = small.engine_of(settings, world, shape)
    run(running, settings, world)  # everything that is made once is there
    if not report.gpu:
        limit_host()
    while failure is None and tokens < 2**23:
        tokens *= 2
        report.begin(f"{tokens} tokens")
        settings = with_setting(settings, "train.micro_batch_tokens", str(tokens))
        failure = attempt(running, settings, world)
    report.figures["too_many_tokens"] = tokens
    if failure is None:
        raise NotHere(f"even {tokens} tokens fitted")
    report.figures["message"] = failure.what
    code = report_fault("train", failure)
    report.expect(
        code == EXIT_FAILED, f"a run that is out of memory would end with exit code {code}, not {EXIT_FAILED}"
    )
    followed: list[str] = []
    while failure is not None and len(followed) < MOST_TRIES:
        found = SETTING.search(failure.fix or "")
        if not report.expect(found, f"the advice names no setting: {failure.fix}"):
            return
        assert found is not None
        followed.append(f"{found[1]}={found[2]}")
        report.begin(f"with {followed[-1]}")
        settings = with_setting(settings, found[1], found[2])
        del running  # its memory first; one that failed in the middle of a backward pass is not used again
        running = small.engine_of(settings, world, shape)
        failure = attempt(running, settings, world)
    report.figures["followed"] = followed
    report.expect(failure is None, f"{len(followed)} pieces of advice did not help: {', '.join(followed)}")


def with_setting(settings: Any, key: str, value: str) -> Any:
    """A recipe with one setting changed, as ``--set`` does it."""
    import yaml

    from aifactory_train.config.schema import Recipe

    tree = settings.model_dump(by_alias=True, exclude_unset=True)
    *blocks, last = key.split(".")
    node = tree
    for block in blocks:
        node = node.setdefault(block, {})
    node[last] = yaml.safe_load(value)
    return Recipe.model_validate(tree)


def run(running: Any, settings: Any, world: Any) -> None:
    """Forward and backward of one micro-batch of the recipe's size."""
    batch = small.full_batch(settings.train.micro_batch_tokens, settings.data.sequence_length, world.device)
    running.forward_backward(batch, 0.0, last=True)
    running.discard()


def attempt(running: Any, settings: Any, world: Any) -> Any:
    """None where it ran, else the error that a run would end with."""
    import gc

    import torch

    from aifactory_train.core.errors import RunFailed
    from aifactory_train.parallel.memory_advice import explain_memory

    failure = None
    try:
        with explain_memory(running, settings, world):
            run(running, settings, world)
    except RunFailed as error:
        failure = RunFailed(error.what, where=error.where, fix=error.fix)  # without the frames, which hold the tensors
    if failure is not None:
        running.discard()
        gc.collect()
        if world.device != "cpu":
            torch.cuda.empty_cache()
    return failure


def limit_host() -> None:
    """From now on this process gets little more memory than it has: large allocations fail as on a full machine."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(r"VmSize:\s+(\d+) kB", status)
    if found is None:
        raise NotHere("the system does not tell a process its size")
    most = int(found[1]) * 1024 + CPU_ROOM
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
