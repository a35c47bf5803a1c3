"""Torque (with Moab): directives from the shape; one node, where torchrun starts the ranks.

No Torque server has seen these scripts: only tests check their directives, against the grammar of qsub.
"""

from __future__ import annotations

from aifactory_train.launchers.backends.base import register
from aifactory_train.launchers.backends.pbspro import Pbs
from aifactory_train.launchers.submission import Line, Submission


@register
class Torque(Pbs):
    """Nodes by ``nodes=``, one of them."""

    name = "torque"
    title = "Torque"
    schedulers = ("torque",)
    unseen = "no Torque server has seen this script: its directives were checked against Torque's grammar only"

    def directives(self, sub: Submission) -> list[Line]:
        """All ``#PBS`` lines."""
        shape, select = sub.shape, sub.system.request.pbs_select
        chunk = [f"nodes={shape.nodes}"]
        if shape.cpus_per_rank:
            chunk.append(f"ppn={shape.cpus_per_rank * shape.ranks_per_node}")
        if shape.gpus_per_node:
            chunk.append(f"gpus={shape.gpus_per_node}")
        if select:
            chunk.append(select)
        resources: list[tuple[str, str, str | None]] = [(":".join(chunk), "nodes, cores and GPUs", "request.gpus")]
        if shape.memory:
            resources.append((f"mem={shape.memory[1]}gb", shape.reason("memory").why, "request.memory_gib"))
        return self.pbs_lines(sub, resources, array="-t", short_name="Torque allows 15 characters")
