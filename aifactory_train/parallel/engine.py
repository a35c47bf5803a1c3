"""The protocol of an engine, and the batch that it is given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from aifactory_train.model.objective import SUMMED_NLL, Objective

if TYPE_CHECKING:
    import torch
    from torch import nn

    from aifactory_train.model.attention import Documents
    from aifactory_train.model.causal_lm import CausalLM
    from aifactory_train.model.embedding_noise import Noise
    from aifactory_train.model.head import HeadObjective
    from aifactory_train.parallel.dims import ParallelDims
    from aifactory_train.parallel.state import Sharded


@dataclass
class DeviceBatch:
    """One micro-batch on the device: arguments of :meth:`aifactory_train.model.causal_lm.CausalLM.loss`.

    input_ids and position_ids int64 ``[B, T]``; positions int64 ``[N]`` into the flattened batch; targets int64
    ``[N]``. ``N`` may be 0: a rank with nothing to do still takes part in the collectives.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    documents: Documents
    positions: torch.Tensor
    targets: torch.Tensor
    #: on the embeddings (NEFTune)
    noise: Noise | None = None
    #: what the forward pass computes from the targets' likelihoods, or from a head; a method gives its own
    objective: Objective | HeadObjective = SUMMED_NLL
    #: bool ``[B, T]``: tokens that are no padding; None: all
    real: torch.Tensor | None = None

    def kwargs(self) -> dict[str, Any]:
        """Arguments by name of :meth:`aifactory_train.model.causal_lm.CausalLM.loss`."""
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "documents": self.documents,
            "positions": self.positions,
            "targets": self.targets,
            "noise": self.noise,
            "objective": self.objective,
            "real": self.real,
        }


class Engine(Protocol):
    """What the loop, the checkpoints and the export need of an engine, built as ``class(name, core, recipe, precision,
    world)``.
    """

    name: str
    #: how the ranks are divided; ``dims.data_ranks`` share the documents of a step
    dims: ParallelDims
    #: callable like CausalLM.forward; all ranks must call it together
    module: nn.Module
    #: the CausalLM inside, whose parameters the engine may have sharded in place
    core: CausalLM

    def forward_backward(self, batch: DeviceBatch, scale: float, last: bool) -> torch.Tensor:
        """Add the gradient of ``scale * sum of losses`` of this micro-batch; reduce over ranks only when ``last``.

        Returns the detached, unscaled loss sum of this rank (fp32 scalar on the device, no synchronisation).
        """

    def clip(self, max_norm: float | None, rest: float = 1.0) -> torch.Tensor:
        """Multiply the summed gradients by ``rest``; then scale them if their norm exceeds ``max_norm``.

        Returns their global L2 norm before clipping, ``rest`` included (fp32 scalar).
        """

    def step(self, learning_rate: float) -> None:
        """One optimizer step at this learning rate; gradients are cleared."""

    def discard(self) -> None:
        """Clear the gradients without a step."""

    #: files to store with the run, by name (DeepSpeed's JSON); values are JSON
    files: dict[str, Any]
    #: optimizer steps done; stored beside the tensors, so that no engine keeps a count per parameter
    updates: int

    def state(self) -> dict[str, dict[str, Sharded]]:
        """``{"model": {NAME: ...}, "optimizer": {MOMENT/NAME: ...}}``: live views of what this rank holds.

        Trained parameters alone (frozen weights come from the base model). Names, global shapes and types are the same
        for every engine and every world size, so that any engine reads any other's state. Moments are there once a step
        was made or :meth:`prepare_state` was called. No communication.
        """

    def prepare_state(self, updates: int) -> None:
        """Make room for the moments of a run that made ``updates`` steps, so that :meth:`state` shows where to read
        them.
        """

    def finish_load(self, updates: int) -> None:
        """After the views of :meth:`state` were overwritten: refresh whatever is derived from them. Collective."""

    def full_parameters(self, trained_only: bool = True) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Iterate ``(name, full tensor on the CPU)`` in a fixed order, one at a time; collective on all ranks.

        Tensors are given on rank 0 only (None elsewhere); no rank holds more than one parameter more than its shard.
        """

    def averaged(self) -> AbstractContextManager[None]:
        """Within it, trained parameters hold the mean that is evaluated and exported (``train.average``, schedule-free
        AdamW); the same to the bit afterwards. Collective; without such a mean nothing happens."""

    def gathered(self) -> AbstractContextManager[None]:
        """Within it, parameters outside the blocks are whole on every rank (generation calls parts of the model)."""

    def describe(self) -> list[tuple[str, str, str]]:
        """``(what, choice, why)`` lines for the start-up report."""
