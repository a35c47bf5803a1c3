"""Torque (with Moab): directives from the shape; one node, where torchrun starts the ranks.

No Torque server has seen these scripts: their directives are checked by :mod:`aifactory_train.launchers.directives` only.
"""

from __future__ import annotations

from aifactory_train.launchers.backends.pbspro import (
    PROGRAMS,
    accounting,
    cancel,
    failed_nodes,
    pbs_time,
    query,
    submit,
    warn,
)
from aifactory_train.launchers.submission import Line, Submission

__all__ = ["PROGRAMS", "UNSEEN", "accounting", "cancel", "directives", "failed_nodes", "query", "submit", "warn"]
UNSEEN = "no Torque server has seen this script: its directives were checked against Torque's grammar only"


def directives(sub: Submission) -> list[Line]:
    shape, system, request = sub.shape, sub.system, sub.request
    out: list[Line] = []

    def put(text: str, why: str, fact: str | None = None) -> None:
        out.append(sub.line(f"#PBS {text}", why, fact))

    put(f"-N {sub.name[:15]}", "the run's name; Torque allows 15 characters")
    if shape.account:
        put(f"-A {shape.account}", shape.reason("account").why)
    if shape.partition:
        put(f"-q {shape.partition}", shape.reason("partition").why, shape.reason("partition").fact)
    chunk = [f"nodes={shape.nodes}"]
    if shape.cpus_per_rank:
        chunk.append(f"ppn={shape.cpus_per_rank * shape.ranks_per_node}")
    if shape.gpus_per_node:
        chunk.append(f"gpus={shape.gpus_per_node}")
    if system.request.pbs_select:
        chunk.append(system.request.pbs_select)
    put(f"-l {':'.join(chunk)}", "nodes, cores and GPUs", "request.gpus")
    if shape.memory:
        put(f"-l mem={shape.memory[1]}gb", shape.reason("memory").why, "request.memory_gib")
    put(f"-l walltime={pbs_time(shape.time_s)}", shape.reason("time_s").why, shape.reason("time_s").fact)
    put("-j oe", "one log for both streams")
    put(f"-o {sub.run_dir}/logs/", "log of the batch shell; the folder is made before submission")
    put(
        f"-r {'n' if system.policy.requeue == 'forbidden' else 'y'}",
        "whether the scheduler may run the job again after a lost node",
        "policy.requeue" if system.policy.requeue else None,
    )
    if request.array:
        count = 1
        for _, values in request.array:
            count *= len(values)
        put(f"-t 0-{count - 1}", "one task for each combination of --array")
    for flag in system.request.flags:
        put(flag, "every GPU job here needs it", "request.flags")
    return out
