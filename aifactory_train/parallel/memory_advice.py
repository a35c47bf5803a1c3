"""When memory ran out: which setting to change, and by how much."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import RunFailed
from aifactory_train.parallel.traits import traits_of

if TYPE_CHECKING:
    from aifactory_train.parallel.engine import Engine
    from aifactory_train.parallel.world import World

#: How libraries say it whose errors are plain RuntimeErrors: the driver, cuBLAS and cuDNN, their counterparts of ROCm,
#: NCCL and RCCL. Triton's OutOfResources is another matter: it is about a multiprocessor's shared memory, which no
#: setting of a run changes.
OUT_OF_MEMORY = re.compile(
    r"can't allocate memory|(cuda|hip|nccl|rccl|device|driver)\b.*\bout of memory|out of memory on device"
    r"|(cu|hip)(blas|sparse|solver|dnn|fft)\w*_ALLOC_FAILED|cudaErrorMemoryAllocation|CUDA_ERROR_OUT_OF_MEMORY"
    r"|hipErrorOutOfMemory|rocblas_status_memory_error|miopenStatusAllocFailed|MIOpen.{0,40}failed to allocate",
    re.I | re.S,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out, on a GPU or on the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and OUT_OF_MEMORY.search(str(error)) is not None


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on the device that ran out: ``capacity`` of the device, ``resident`` what stays between steps (parameters,
    optimizer state), ``peak`` what the step that failed would have needed at least."""

    capacity: int
    resident: int
    peak: int


def measure(device: str, resident: int) -> MemoryUse | None:
    """Figures of a GPU after the failure; None on the host, whose limit nobody tells."""
    if device == "cpu":
        return None
    _, total = torch.cuda.mem_get_info(device)
    return MemoryUse(total, resident, max(torch.cuda.max_memory_allocated(device), total))


def advise(recipe: Recipe, use: MemoryUse | None, world_size: int, trained_bytes: int) -> list[str]:
    """Changes that help, the most effective first, each as ``--set key=value`` with what it brings.

    ``trained_bytes``: parameters, gradients and optimizer state of the trained parameters on one rank. Activations grow
    with the tokens of a micro-batch; how far they must shrink follows from ``use``, or is a half where nothing is
    known.
    """
    lines = []
    tokens, longest = recipe.train.micro_batch_tokens, recipe.data.sequence_length
    share = 0.5
    if use is not None and use.peak > use.resident:
        share = min(0.9, max(0.0, (0.95 * use.capacity - use.resident) / (use.peak - use.resident) * 0.9))
    fewer = int(tokens * share) // 8 * 8
    if recipe.train.grad_accum == "auto" and tokens > longest:
        lines.append(
            f"--set train.micro_batch_tokens={max(longest, fewer)} (now {tokens}; the curve stays the same, more "
            f"micro-batches)"
        )
    if recipe.parallel.activation_checkpointing != "full":
        step = "selective" if recipe.parallel.activation_checkpointing == "none" and share > 0.4 else "full"
        lines.append(
            f"--set parallel.activation_checkpointing={step} (blocks keep less and compute it again: about 30 % slower)"
        )
    traits = traits_of(recipe.parallel.engine)
    if not traits.shards_optimizer and world_size > 1 and trained_bytes:
        saved = trained_bytes * (world_size - 1) // world_size
        lines.append(f"--set parallel.engine=fsdp2 (frees about {saved / 2**30:.1f} GiB per rank of {world_size})")
    elif not recipe.parallel.offload_optimizer and traits.offloads_optimizer:
        lines.append("--set parallel.offload_optimizer=true (optimizer state in host memory: slower steps)")
    if recipe.train.optimizer == "adamw" and "adamw8bit" in traits.optimizers and trained_bytes:
        lines.append(
            "--set train.optimizer=adamw8bit (moments in 8 bits: a quarter of their memory or less; another training)"
        )
    if tokens <= longest:
        lines.append(f"--set data.sequence_length={max(8, longest // 2)} (now {longest}; longer documents are cut)")
    return lines


def held(engine: Engine) -> tuple[int, int]:
    """Bytes on this rank: what stays between steps (parameters, optimizer state), and of the trained parameters with
    their gradients.
    """
    state = {kind: sum(entry.nbytes() for entry in entries.values()) for kind, entries in engine.state().items()}
    parameters = sum(_local_bytes(p) for p in engine.core.parameters())
    # ZeRO's masters are beside the parameters that it computes with; elsewhere they are those parameters.
    masters = state["model"] if traits_of(engine.name).fp32_masters else 0
    return parameters + masters + state["optimizer"], 2 * state["model"] + state["optimizer"]


def _local_bytes(parameter: torch.Tensor) -> int:
    """Of a parameter whose rows other ranks share (FSDP2), or that ZeRO-3 emptied while it is not in use, this rank's
    part.
    """
    if hasattr(parameter, "ds_tensor"):
        parameter = parameter.ds_tensor
    elif hasattr(parameter, "to_local"):
        parameter = parameter.to_local()
    return parameter.numel() * parameter.element_size()


def out_of_memory(error: BaseException, recipe: Recipe, use: MemoryUse | None, ranks: int, trained: int) -> RunFailed:
    """The error to raise instead: what ran out, and what to change by how much."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    figures = ""
    if use is not None:
        figures = f" ({use.capacity / 2**30:.1f} GiB in all, {use.resident / 2**30:.1f} GiB held between steps)"
    return RunFailed(f"out of memory{figures}: {text}", fix="\n    or ".join(advise(recipe, use, ranks, trained)))


@contextlib.contextmanager
def explain_memory(engine: Engine, recipe: Recipe, world: World) -> Iterator[None]:
    """Running out of memory within it becomes a :class:`RunFailed` that says which setting to change by how much."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        resident, trained = held(engine)
        use = measure(world.device, resident)
        raise out_of_memory(error, recipe, use, world.size, trained) from error
