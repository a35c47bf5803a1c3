"""What an engine can hold and which ZeRO stage runs; without torch, for the planner too."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def zero_stage(asked: int, *, bf16: bool, offload_optimizer: bool) -> int:
    """The ZeRO stage that runs where stage ``asked`` is wanted; the engine and the planner both ask here.

    In bf16, DeepSpeed hands its stage 1 to another optimizer, which keeps no partitions that norms and checkpoints could be
    read from: stage 2 runs instead. With the optimizer state in host memory stage 1 is DeepSpeed's own.
    """
    return 2 if asked == 1 and bf16 and not offload_optimizer else asked


def holds_quantised(name: str) -> bool:
    """Whether an engine can hold a 4-bit base: its weights are opaque bytes, which cannot be split or cast."""
    return name == "ddp"
