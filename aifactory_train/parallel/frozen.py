"""The frozen 4-bit base, watched: nothing writes to it, so a byte that changes is a fault of memory (or of a program),
and without a check it would train on unseen, and every later checkpoint with it.

Of each frozen tensor a sum is kept in which every byte has an odd weight of its own: modulo 2^64 any two flipped bits,
and any byte that becomes another, change it. Sums of shards add up to the sum of the whole tensor, so that the digest
of a base depends neither on the engine nor on the ranks. It finds accidents, not somebody who means to deceive.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from aifactory_train.core.errors import RunFailed
from aifactory_train.core.output import note
from aifactory_train.model.packed import pieces_of
from aifactory_train.parallel.torch_engine import TorchEngine

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.model.report import ModelReport
    from aifactory_train.parallel.engine import Engine
    from aifactory_train.parallel.world import World

#: Bytes that are looked at together: each becomes a 64-bit number meanwhile.
CHUNK = 2**22
#: Under this name a checkpoint keeps the digest.
KEY = "frozen_base"


def weighted_sum(tensor: torch.Tensor, first: int = 0) -> torch.Tensor:
    """int64 scalar on the tensor's device: the sum over its bytes of ``byte * (2 * position + 1)``, modulo 2^64.

    ``first``: the position of its first byte in the whole tensor.
    """
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    total = torch.zeros((), dtype=torch.int64, device=content.device)
    odd = torch.arange(min(CHUNK, len(content)), device=content.device) * 2 + 1  # none where this rank has no rows
    for start in range(0, len(content), CHUNK):
        part = content[start : start + CHUNK].long()
        total += part.sum() * (2 * (first + start)) + (part * odd[: len(part)]).sum()
    return total


class FrozenBase:
    """The frozen parameters of an engine with a 4-bit base, as they were at the start; of another engine none."""

    def __init__(self, engine: Engine, recipe: Recipe, world: World):
        """Collective. Raises :class:`RunFailed` where copies of the base differ between ranks."""
        self.engine, self.world = engine, world
        self.tensors: list[tuple[str, torch.Tensor]] = []
        self.digest = ""
        if recipe.adapter.quantise_base == "none" or not isinstance(engine, TorchEngine):
            return
        self.tensors = [(name, p) for name, p in engine.core.named_parameters() if not p.requires_grad]
        self.start = self._sums(engine)
        whole, group = self.start.clone(), engine._norm_group()
        if group is not None:
            dist.all_reduce(whole, group=group)
        least, most = whole.clone(), whole.clone()
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
        other = self._names(least != most)
        if other:
            raise RunFailed(
                f"the copies of the frozen base differ between ranks at the start: {other}",
                where="adapter.quantise_base",
                fix="start again; if it happens again, look for the node whose files or memory are faulty",
            )
        shown = [f"{name} {number % 2**64}" for (name, _), number in zip(self.tensors, whole.tolist(), strict=True)]
        self.digest = hashlib.sha256("\n".join(sorted(shown)).encode()).hexdigest()

    @classmethod
    def of(cls, engine: Engine, recipe: Recipe, world: World, report: ModelReport) -> FrozenBase:
        """The base of ``engine``, which is said in the report of the start."""
        found = cls(engine, recipe, world)
        if found.tensors:
            shown = f"{len(found.tensors)} tensors, digest {found.digest[:16]}"
            report.add("frozen base", shown, "compared at every checkpoint")
        return found

    def _sums(self, engine: TorchEngine) -> torch.Tensor:
        """int64 ``[tensors]`` of what lies on this rank, on the device of its collectives."""
        found = []
        for _, parameter in self.tensors:
            first = engine._first_byte(parameter)
            pieces = pieces_of(engine._local(parameter))
            found.append(
                sum((weighted_sum(t, first + at).cpu() for t, at in pieces), torch.zeros((), dtype=torch.int64))
            )
        return torch.stack(found).to(self.world.device)

    def _names(self, which: torch.Tensor) -> str:
        names = [name for (name, _), hit in zip(self.tensors, which.tolist(), strict=True) if hit]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"{', '.join(names[:3])}{more}" if names else ""

    def check(self, step: int) -> dict[str, str]:
        """What a checkpoint of ``step`` keeps of the base (empty without one). Collective.

        Raises :class:`RunFailed` on every rank where a tensor is not as it was at the start.
        """
        if not self.tensors or not isinstance(self.engine, TorchEngine):
            return {}
        size = self.world.size
        ranks = torch.where(self._sums(self.engine) != self.start, self.world.rank, size)
        dist.all_reduce(ranks, op=dist.ReduceOp.MIN)
        first = int(ranks.min())
        if first == size:
            return {KEY: self.digest}
        raise RunFailed(
            f"the frozen base changed in memory: {self._names(ranks < size)} (rank {first}) is not what was read at "
            f"the start; step {step} is not saved",
            where="adapter.quantise_base",
            fix="go on from the last checkpoint with --resume auto; if it happens again, have its memory tested",
        ).of(first)

    def compare(self, saved: dict[str, Any]) -> None:
        """Say where the base is another one than that of the checkpoint with the values ``saved``."""
        before = saved.get(KEY)
        if self.digest and before and before != self.digest and self.world.is_main:
            note(
                "the 4-bit base is not the one that the checkpoint was trained on, bit by bit: another device, type or "
                "version of bitsandbytes rounds it otherwise; the curve may go on a little differently"
            )
