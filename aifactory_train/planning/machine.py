"""A site's profile as the planner's :class:`GpuRates` and :class:`Links`: nothing is invented, what is assumed is
said.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aifactory_train.core.errors import UserError
from aifactory_train.planning.job import GpuRates, Links

if TYPE_CHECKING:
    from aifactory_train.sites import System

#: GiB of a unified memory (MI300A) that the host side of a rank needs: system, process, page cache, loader workers.
UNIFIED_HOST_GIB = 24.0
#: Injection bandwidth of a node where none is published: one 100 Gb/s port, the least that any GPU system here has.
ASSUMED_NODE_GB_S = 12.5


def gpu_of(system: System) -> GpuRates:
    """The site's GPU. Raises :class:`UserError` where the profile lacks what every plan needs."""
    g = system.gpu
    for value, what in (
        (g.arch, "GPU architecture"),
        (g.usable_gib, "GPU memory"),
        (g.memory_bandwidth_gb_s, "memory bandwidth"),
    ):
        if value is None:
            raise UserError(
                f"the {what} of {system.name} is not published, so nothing can be planned for it",
                where="--site",
                fix=f"'aifactory sites {system.id}' tells what is known; give the value in an overlay (--site-file)",
            )
    if "bf16" not in g.peak_tflops:
        raise UserError(
            f"the {g.model or g.arch} of {system.name} has no bf16 arithmetic; the planner covers bf16 only",
            where="--site",
            fix="choose a site with sm_80, gfx90a or newer ('aifactory sites')",
        )
    memory = float(g.usable_gib or 0)
    if g.unified_memory:
        memory -= UNIFIED_HOST_GIB
    return GpuRates(
        sku=g.sku or g.model or str(g.arch),
        arch=g.arch,
        vendor=g.vendor,
        memory_gib=memory,
        bandwidth_gb_s=g.memory_bandwidth_gb_s,
        bf16_tflops=g.peak_tflops["bf16"],
        link_gb_s=g.link_gb_s,
        tdp_w=g.tdp_w,
        unified_memory=bool(g.unified_memory),
        power_cap_w=system.node.power_cap_w,
    )


def links_of(system: System) -> Links:
    """The site's links. In the node the slowest pair counts where the GPUs are not all connected alike."""
    count = system.node.gpus
    if not count:
        raise UserError(
            f"the number of GPUs of a node of {system.name} is not published",
            where="--site",
            fix="give node.gpus in an overlay (--site-file)",
        )
    inside = system.interconnect.in_node
    assumed: list[str] = []
    in_node = system.gpu.link_gb_s
    if inside.all_to_all is False and inside.slowest_pair_gb_s:
        in_node = inside.slowest_pair_gb_s
    elif in_node is None:
        in_node = inside.pair_gb_s
    if in_node is None and count > 1:
        in_node = 25.0
        assumed.append("in-node links: 25 GB/s, a PCIe 4 slot, because nothing is published")
    node = system.node_gb_s
    if node is None:
        node = ASSUMED_NODE_GB_S
        assumed.append("network: 12.5 GB/s a node, one 100 Gb/s port, because nothing is published")
    return Links(gpus_per_node=count, in_node_gb_s=in_node, node_gb_s=node, assumed=tuple(assumed))


def host_memory_gib(system: System) -> float | None:
    """Host memory that a job may use on a node, GiB."""
    return system.node.memory_usable_gib or system.node.memory_gib
