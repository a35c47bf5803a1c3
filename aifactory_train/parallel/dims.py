"""How the ranks are divided among the kinds of parallelism; without torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from aifactory_train.core.errors import UserError
from aifactory_train.parallel.traits import traits_of

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of each kind of parallelism; 1 where there is none.

    dp_replicate: copies of the model; dp_shard: ranks that share one copy and each have documents of their own; cp:
    ranks that share a sequence; tp: that share a matrix; pp: that share the depth. ep, ranks that share the experts of
    a layer, takes ranks of dp_shard, cp and tp and adds none. Neighbouring ranks differ in tp first, then cp, dp_shard,
    dp_replicate, pp.

    Today's engines spread data alone: cp, tp, ep and pp are 1.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise UserError(
                    f"a degree of {getattr(self, field.name)} is less than 1", where=f"parallel.{field.name}"
                )
        if (self.dp_shard * self.cp * self.tp) % self.ep:
            raise UserError(
                f"{self.dp_shard * self.cp * self.tp} ranks cannot be split into groups of {self.ep} that share the "
                f"experts",
                where="parallel.ep",
                fix=f"choose a divisor of {self.dp_shard * self.cp * self.tp}",
            )

    @classmethod
    def of(cls, name: str, recipe: Recipe, world_size: int, local_size: int) -> ParallelDims:
        """The degrees of engine ``name`` on ``world_size`` ranks, ``local_size`` of them on a node.

        Raises :class:`UserError` where the ranks cannot be divided so.
        """
        asked = recipe.parallel.dims
        chosen = recipe.parallel.copy_ranks or (world_size // asked.replicate if asked.replicate else local_size) or 1
        shard = {"none": 1, "all": world_size, "chosen": chosen}[traits_of(name).shard_group]
        if world_size % shard:
            raise UserError(
                f"{world_size} ranks cannot be split into copies of {shard} ranks each",
                where="parallel.shard_size",
                fix=f"choose a divisor of {world_size}, or --set parallel.engine=fsdp2",
            )
        dims = cls(dp_replicate=world_size // shard, dp_shard=shard)
        dims.check_world(world_size)
        for key, wanted in (("dp_replicate", asked.replicate), ("dp_shard", asked.shard)):
            if wanted not in (None, getattr(dims, key)):
                raise UserError(
                    f"engine {name} on {world_size} ranks has {key} {getattr(dims, key)}, and {wanted} is asked for",
                    where=f"parallel.dims.{key}",
                    fix=f"--set parallel.engine=hsdp with degrees whose product is {world_size}, or leave it at auto",
                )
        return dims

    @property
    def world(self) -> int:
        """All ranks."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def data_ranks(self) -> int:
        """Shares that the documents of a step are dealt into: ranks of cp, tp and pp work on the same ones."""
        return self.dp_replicate * self.dp_shard

    def data_rank(self, rank: int) -> int:
        """Which share of the documents rank ``rank`` works on."""
        return rank // (self.cp * self.tp) % self.data_ranks

    def check_world(self, world_size: int) -> None:
        """Raise :class:`UserError` unless the degrees take all of ``world_size`` ranks."""
        if self.world != world_size:
            reported = " x ".join(f"{f.name} {getattr(self, f.name)}" for f in fields(self) if f.name != "ep")
            raise UserError(
                f"{reported} = {self.world} ranks, {world_size} were started",
                where="parallel",
                fix=f"start {self.world} ranks, or choose degrees whose product is {world_size}",
            )
