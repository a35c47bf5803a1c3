"""What each engine holds on one of two ranks, measured on a tiny model. Run by ``test_traits.py``, one process per
rank.

python sharding.py CASES.json OUT.json        with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set
"""

from __future__ import annotations

import gc
from math import prod
from typing import Any

import curves


def local(tensor: Any) -> int:
    """Elements of a tensor that this rank holds."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel()


def run_case(case: dict[str, Any], world) -> dict[str, Any]:
    """Shares of the whole that this rank holds, after one step."""
    engine = curves.build(case, world)
    shapes = {name: prod(entry.shape) for name, entry in engine.state()["model"].items()}
    total = sum(shapes.values())
    documents = curves.step_documents(0)[world.rank :: world.size]
    engine.forward_backward(curves.make_batch(documents, world.device), 0.01, last=True)
    if hasattr(engine, "zero"):
        gradients = getattr(engine.zero, "partition_gradients", True)  # stage 3 has no such switch
    else:
        gradients = sum(local(p.grad) for p in engine.core.parameters()) < total
    engine.clip(1.0)
    engine.step(1e-3)
    moments = [piece for entry in engine.state()["optimizer"].values() for piece in entry.pieces]
    found = {
        "name": engine.name,
        "shards_parameters": sum(local(p) for p in engine.core.parameters()) < total,
        "shards_gradients": gradients,
        "shards_optimizer": sum(piece.tensor.numel() for piece in moments) < 2 * total,
        "dims": [engine.dims.dp_replicate, engine.dims.dp_shard, engine.dims.data_ranks],
    }
    del engine
    gc.collect()
    return found


if __name__ == "__main__":
    import ranks

    ranks.main(run_case, 120)
