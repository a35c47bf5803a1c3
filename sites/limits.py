"""What a site refuses: a machine that nobody can use today, and a request beyond a published limit."""

from __future__ import annotations

from aifactory_train.core.errors import UserError
from aifactory_train.sites.fields import slurm_time
from aifactory_train.sites.system import System


def require_usable(system: System) -> None:
    """Refuse a machine that nobody can run on today."""
    if not system.usable:
        raise UserError(
            f"{system.name} cannot be used today: {system.status_reason or system.status}",
            where="--site",
            fix=f"'aifactory sites {system.id}' tells what is known; 'aifactory sites' lists what runs today",
        )


def broken_limit(
    system: System,
    partition: str,
    qos: str | None,
    nodes: int,
    seconds: int | None = None,
    gpus_per_node: int | None = None,
) -> str | None:
    """The first published limit that a request breaks, as a sentence, or None."""
    limit = system.limits(partition, qos, gpus_per_node)
    place = partition + (f"/{qos}" if qos else "")
    gpus = nodes * (gpus_per_node or system.node.gpus or 1)
    if limit["max_nodes"] is not None and nodes > limit["max_nodes"]:
        return f"{place} allows {limit['max_nodes']} node(s), {nodes} are asked for"
    if limit["min_nodes"] is not None and nodes < limit["min_nodes"]:
        return f"{place} needs at least {limit['min_nodes']} node(s), {nodes} are asked for"
    if limit["max_gpus"] is not None and gpus > limit["max_gpus"]:
        return f"{place} allows {limit['max_gpus']} GPU(s) per job, {gpus} are asked for"
    if seconds is not None and limit["max_time"] is not None and seconds > limit["max_time"]:
        return f"{place} allows {slurm_time(limit['max_time'])}, {slurm_time(seconds)} is asked for"
    return None
