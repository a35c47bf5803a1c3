"""The recipe's ``parallel.dims``: how many ranks share what."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from aifactory_train.config.strict import Strict

#: What is not there, by its degree.
NOT_BUILT = {
    "tp": "tensor parallelism is not there: no engine splits a matrix over ranks",
    "cp": "context parallelism is not there: no engine splits a sequence over ranks",
    "ep": "expert parallelism is not there: no engine deals the experts of a layer to ranks",
}


class DimsConfig(Strict):
    """Degrees of each kind of parallelism; auto: what the engine and the number of ranks give."""

    dp_replicate: int | Literal["auto"] = Field("auto", description="Copies of the model.")
    dp_shard: int | Literal["auto"] = Field(
        "auto", description="Ranks that share one copy; the same setting as shard_size."
    )
    tp: int = Field(1, ge=1, description="Ranks that share a matrix; only 1 is there.")
    cp: int = Field(1, ge=1, description="Ranks that share a sequence; only 1 is there.")
    ep: int = Field(1, ge=1, description="Ranks that share the experts of a layer; only 1 is there.")

    @field_validator("dp_replicate", "dp_shard")
    @classmethod
    def _at_least_one(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError(f"must be 'auto' or at least 1, got {value}")
        return value

    @field_validator("tp", "cp", "ep")
    @classmethod
    def _is_built(cls, value: int, info: ValidationInfo) -> int:
        if value > 1:
            raise ValueError(f"{NOT_BUILT[str(info.field_name)]}; leave {info.field_name} at 1")
        return value

    @property
    def replicate(self) -> int | None:
        """``dp_replicate``, None where it is open."""
        return self.dp_replicate if isinstance(self.dp_replicate, int) else None

    @property
    def shard(self) -> int | None:
        """``dp_shard``, None where it is open."""
        return self.dp_shard if isinstance(self.dp_shard, int) else None


class SharesConfig(Strict):
    """How many ranks share what."""

    shard_size: int | None = Field(
        None, ge=1, description="hsdp: ranks that share one copy of the model; null: ranks of a node."
    )
    dims: DimsConfig = DimsConfig()

    @property
    def copy_ranks(self) -> int | None:
        """Ranks that share one copy where an engine lets that be chosen: shard_size or dims.dp_shard; None: open."""
        return self.shard_size or self.dims.shard
