"""Facts about machines: the 19 AI Factories and 13 Antennas, their systems, and this machine. Data, no policy.

The interface that other rooms rely on (all cheap, none imports torch; all raises :class:`UserError` on bad input)::

    from aifactory_train import sites

    sites.names(usable=True)              # ids of the systems that can be used today
    sites.members()                       # the 32: dicts with id, name, kind, country, sectors, links, systems, ...
    system = sites.load("lumi-g")         # a resolved System; also a path, "local", "generic-slurm";
                                          # overlay=FILE|dict|False
    sites.detect()                        # this machine as a System called "local"
    sites.identify()                      # id of the known system we are on, or None
    sites.broken_limit(system, partition, qos, nodes, seconds, gpus_per_node)  # the first, as a sentence, or None

A :class:`System` holds plain Python values; ``None`` means *not published*, never a default:

    system.id .name .status ("usable"|"announced"|"unsuitable") .usable .country .operator .readiness .missing .complete
    system.gpu       .sku .model .vendor .arch ("sm_90"|"gfx90a") .memory_gib .memory_visible_mib .usable_gib
                     .memory_bandwidth_gb_s .peak_tflops["bf16"] (dense) .has_bf16 .has_fp8 .fp8_format ("ocp"|"fnuz")
                     .compute_units .warp_size .shared_memory_kib .l2_mib .link_gb_s .tdp_w .unified_memory .counted_as
    system.node      .count .gpus (as the scheduler counts) .cores .cores_usable .threads_per_core .memory_gib
                     .memory_usable_gib .numa_domains .gpu_numa .isa .login_isa .local_disk_gb .tmp_in_memory
                     .power_cap_w
    system.interconnect  .fabric .nics_per_node .nic_gbit_s .node_gbit_s .hcas .socket_interfaces .transport .plugin
                     .in_node.kind .pair_gb_s .slowest_pair_gb_s .all_to_all
    system.node_gb_s, system.gpu_network_gb_s    injection bandwidth of a node / one GPU's share, GB/s, one direction
    system.scheduler .kind ("slurm"|"pbspro"|"torque"|"kubernetes"|"none") .flavour ("slurmd"|"psslurm") .version
                     .launchers (process starters known there) .accounting
    system.access    .account ("required"|"optional"|"none") .account_pattern .account_form .account_suffix
                     .qos ("required"|"optional"|"none"|"project") .example {account, qos, ...} .login_hosts .login_port
    system.partitions[name]  .implicit (never named) .constraint .qos [names, default first] .qos_equals_partition
                     .max_time (s) .default_time .min_nodes .max_nodes .max_gpus .max_running_jobs .nodes .shared
                     .purpose .flags .state ("up"|"down"|None)
    system.default_partition
    system.qos[name] .max_time (s) .min_nodes .max_nodes .max_gpus .max_running_jobs .purpose .flags
    system.limits(partition, qos=None)   the tighter of both, as a dict;  system.qos_of(partition, qos) -> (name, Qos)
    system.partition(name)               refuses an unknown one with did-you-mean
    system.max_nodes                     over all partitions
    system.request   .gpus ("gpus-per-node"|"gres"|"gpus"|"none"|"pbs-select"|"torque-nodes"|"kubernetes") .gres_type
                     .gres_name .node_selector .pbs_select .exclusive .cpus_per_gpu
                     .cpus_per_gpu_rule ("exact"|"at-most"|"usual")
                     .cpus_are ("cores"|"threads": what cpus_per_gpu counts)
                     .memory ("none"|"mem"|"mem-per-gpu") .memory_gib .partial_multi_node .flags .never
    system.launch    .style ("torchrun"|"srun"|"mpi") .srun_flags .cpu_bind .cpu_bind_node .gpu_bind
                     .torchrun_numa_binding .mpi_type .mpiexec .repeat_cpus_per_task .login_shell
                     .output_must_be_under .output_must_not_be_under
                     .head_address.strategy ("hostname"|"fqdn"|"nodeaddr"|"suffix"|"interface"|"command") .suffix
                     .strip_domain .interface .family .resolve
    system.policy    .export ("NONE"|"ALL") .requeue ("allowed"|"forbidden"|None)
                     .resubmit ("requeue"|"chain"|"resubmit")
                     .signal .preemption .unattended_submission ("allowed"|"human-needed"|None)
    system.environment  .set {NCCL_…} .avoid {variable: why} .workarounds
    system.software  .modules_system .purge .use .modules .provides_torch
                     .containers[i].{runtime, gpu_flag, image, module, binds, exec_flags, image_dirs, notes}
                     .os .cuda .rocm .driver .wheels_isa
    system.filesystems[i]  .role ("home"|"project"|"scratch"|"fast"|"node-local"|"data"|"archive") .path (template)
                     .variable .quota_gib .inodes .purge_days .kind .on_compute
    system.filesystem(role)              the first of a role, or None
    system.internet  .login .compute ("full"|"nat"|"proxy"|"none"|None);  system.offline  jobs must run offline
    system.energy    .counter .pue .grid_g_co2_per_kwh .grid_region
    system.accounting  .unit .unit_is .charged ("node"|"gpu") .per_gpu_hour .per_node_hour .factors .minimum
                     .balance_command;  sites.billing.bill(system, nodes, hours, partition=…) -> Bill | None
    system.login     .method .second_factor .certificate_hours .certificate_command .jump_host .notes
    system.queue     .default_time .max_submitted .max_running .reservation .typical_wait
    system.data      .transfer .quota_command .object_store .model_cache;  system.help  .support .documentation .status
                     (each of these five has .unknown {key: where one would ask})
    system.user      the overlay's own values: account, partition, qos, reservation, constraint, project, work_dir,
                     scratch_dir, container_image, container_binds, venv, modules, env, exclude_nodes, budget_gpu_hours,
                     site_budget, cache, price_per_gpu_hour, currency, mail
    system.provenance("gpu.memory_gib") -> Fact(path, value, source_id, source, url, date, retrieved,
                                           confidence, note) | None
    system.stated_facts()                every stated leaf as a Fact
    system.as_dict()                     plain JSON data with ``provenance``: ``aifactory sites SYSTEM --json``

    sites.slurm_time(seconds) -> "2-00:00:00";  sites.parse_duration("48h") -> 172800
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_WHERE = {
    "load": "profiles",
    "resolve": "profiles",
    "System": "system",
    "find_member": "finding",
    "config_dir": "finding",
    "read_overlay": "profiles",
    "Fact": "schema",
    "Profile": "schema",
    "Overlay": "schema",
    "slurm_time": "fields",
    "parse_duration": "fields",
    "broken_limit": "limits",
    "require_usable": "limits",
    "detect": "detection",
    "identify": "detection",
}

__all__ = [
    "Fact",
    "Overlay",
    "Profile",
    "System",
    "broken_limit",
    "config_dir",
    "detect",
    "find_member",
    "identify",
    "load",
    "members",
    "names",
    "parse_duration",
    "read_overlay",
    "require_usable",
    "resolve",
    "slurm_time",
]

if TYPE_CHECKING:
    from aifactory_train.sites.detection import detect, identify
    from aifactory_train.sites.fields import parse_duration, slurm_time
    from aifactory_train.sites.finding import config_dir, find_member
    from aifactory_train.sites.limits import broken_limit, require_usable
    from aifactory_train.sites.profiles import load, read_overlay
    from aifactory_train.sites.resolving import resolve
    from aifactory_train.sites.schema import Fact, Overlay, Profile
    from aifactory_train.sites.system import System


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `import aifactory_train.sites` and the list command cost no pydantic.
    if name in _WHERE:
        return getattr(importlib.import_module(f"aifactory_train.sites.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def names(usable: bool | None = None) -> list[str]:
    """Ids of the shipped systems; only the usable or only the other ones where ``usable`` is given."""
    from aifactory_train.sites.index import load_index

    return [s["id"] for s in load_index()["systems"] if usable is None or (s["status"] == "usable") is usable]


def members() -> list[dict[str, Any]]:
    """The 19 factories and 13 antennas as dicts: id, name, kind, country, sectors, links, systems (usable today),
    announced, linked_systems, reason (why there is no system, or None)."""
    from aifactory_train.sites.index import load_index

    return [dict(m) for m in load_index()["members"]]
