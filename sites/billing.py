"""What a job costs in the unit that its site bills in, from the ``accounting`` facts. No rate, no bill."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.sites.system import System


@dataclass(frozen=True)
class Bill:
    """``amount`` of ``unit``; ``unit_is`` says what one is, ``how`` how it was worked out."""

    amount: float
    unit: str
    unit_is: str | None
    how: str

    def as_dict(self) -> dict[str, Any]:
        return {**vars(self), "amount": round(self.amount, 3)}

    def __str__(self) -> str:
        return f"{self.amount:,.4g} {self.unit}" + (f" ({self.unit_is})" if self.unit_is else "")


def whole_nodes(system: System, partition: str | None, exclusive: bool = False) -> bool:
    """Whether a node is billed whole, whatever part of it a job takes."""
    part = system.partitions.get(partition or "")
    return system.accounting.charged == "node" or exclusive or (part is not None and part.shared is False)


def rate(
    system: System,
    gpus_per_node: int | None = None,
    partition: str | None = None,
    qos: str | None = None,
    exclusive: bool = False,
) -> tuple[float, str] | None:
    """(units for one node of the job and hour, how that was worked out); ``None`` where it is not published.

    ``gpus_per_node``: GPUs that the job takes of each node, as the scheduler counts them (default: all).
    """
    facts, gpus = system.accounting, gpus_per_node or system.node.gpus
    if facts.unit is None or not gpus:
        return None
    factor = facts.factors.get(partition or "", 1.0) * facts.factors.get(qos or "", 1.0)
    times = f" x {factor:g} on this partition or QoS" if factor != 1.0 else ""
    if whole_nodes(system, partition, exclusive):
        node = facts.per_node_hour or (facts.per_gpu_hour or 0) * (system.node.gpus or 0)
        return (node * factor, f"{node:g} for a whole node and hour{times}") if node else None
    if facts.per_gpu_hour is None:
        return None
    return facts.per_gpu_hour * gpus * factor, f"{gpus} GPU(s) of a node x {facts.per_gpu_hour:g} an hour{times}"


def bill(system: System, nodes: int, hours: float, **job: Any) -> Bill | None:
    """The bill of ``nodes`` nodes for ``hours`` hours; ``job`` as for :func:`rate`."""
    found = rate(system, **job)
    if found is None:
        return None
    per_node, how = found
    unit = system.accounting.unit or ""
    return Bill(nodes * hours * per_node, unit, system.accounting.unit_is, f"{nodes} node(s) x {hours:g} h x {how}")


def gpu_hours_of(system: System, units: float, **job: Any) -> float:
    """GPU-hours, as the scheduler counts GPUs, that ``units`` of the site's own unit pay; ``job`` as for :func:`rate`.

    Raises :class:`UserError` where the site's rate is not published.
    """
    found = rate(system, **job)
    gpus = job.get("gpus_per_node") or system.node.gpus
    if found is None or not gpus:
        raise UserError(
            f"what {system.name} bills for an hour is not published",
            where="--site-budget",
            fix="a budget in GPU-hours: --budget; or correct accounting.unit and accounting.per_gpu_hour in your site "
            "file",
        )
    return units * gpus / found[0]
