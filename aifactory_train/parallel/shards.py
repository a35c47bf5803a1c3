"""Parameters whose rows are dealt to the ranks of a group, for optimizers that need more than their own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's rows (the tensor itself where it is no DTensor)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def is_cut(tensor: torch.Tensor) -> bool:
    """Whether a rank has only some of its rows."""
    return hasattr(tensor, "to_local")


@dataclass(frozen=True)
class Shards:
    """The ranks of ``group`` share one copy: each has the rows that ``torch.chunk`` gives it.

    device: where collectives run (the rows may lie in host memory).
    """

    group: dist.ProcessGroup
    device: str

    @property
    def size(self) -> int:
        return dist.get_world_size(self.group)

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of ``tensor`` over the ranks, on its own device."""
        here = tensor.to(self.device, copy=True)
        dist.all_reduce(here, group=self.group)
        return here.to(tensor.device)

    def to_owner(self, local: torch.Tensor, shape: torch.Size, owner: int) -> torch.Tensor | None:
        """The whole tensor of ``shape`` on rank ``owner`` of the group; None on the others."""
        each = -(-shape[0] // self.size)
        part = torch.zeros((each, *shape[1:]), dtype=local.dtype, device=self.device)
        part[: len(local)] = local
        whole = part.new_empty((each * self.size, *shape[1:])) if owner == self.rank else None
        parts = list(whole.split(each)) if whole is not None else None
        dist.gather(part, parts, group=self.group, group_dst=owner)
        return None if whole is None else whole[: shape[0]]

    def from_owner(self, whole: torch.Tensor | None, like: torch.Tensor, shape: torch.Size, owner: int) -> torch.Tensor:
        """This rank's rows (as many as ``like`` has, in its type) of what rank ``owner`` has as ``whole``."""
        each = -(-shape[0] // self.size)
        part = torch.empty((each, *shape[1:]), dtype=like.dtype, device=self.device)
        parts = None
        if whole is not None:
            padded = whole.new_zeros((each * self.size, *shape[1:]))
            padded[: shape[0]] = whole
            parts = list(padded.split(each))
        dist.scatter(part, parts, group=self.group, group_src=owner)
        return part[: len(like)].to(like.device)
