"""The hardware sections of a profile: a node as its scheduler counts it, the network, and one GPU."""

from __future__ import annotations

from typing import Literal

from aifactory_train.sites.fields import Arch, Positive, PositiveFloat, SiteModel, Text


class Node(SiteModel):
    """One GPU node **as the scheduler counts it**."""

    count: Positive | None = None
    gpus: Positive | None = None
    cpu: str | None = None
    isa: Literal["x86_64", "aarch64"] | None = None
    login_isa: Literal["x86_64", "aarch64"] | None = None
    sockets: Positive | None = None
    cores: Positive | None = None
    cores_usable: Positive | None = None
    threads_per_core: Positive | None = None
    cores_reserved: list[int] = []  # core numbers that the system keeps (low-noise mode), where published
    memory_gib: PositiveFloat | None = None
    memory_usable_gib: PositiveFloat | None = None  # what a job can ask for
    numa_domains: Positive | None = None  # those with cores: GPU memory that shows as NUMA domains is not counted
    gpu_numa: list[int] = []  # NUMA domain of GPU 0, 1, …
    local_disk_gb: PositiveFloat | None = None
    tmp_in_memory: bool | None = None  # /tmp is RAM-backed
    power_cap_w: PositiveFloat | None = None  # per GPU or per superchip module, where the site caps it
    features: list[str] = []  # node features that -C can name


class InNode(SiteModel):
    """GPU-to-GPU links inside a node, where the node differs from the GPU's data sheet."""

    kind: str | None = None  # nvlink3, nvlink4, infinity-fabric, pcie4 …
    pair_gb_s: PositiveFloat | None = None  # between two neighbours, one direction
    slowest_pair_gb_s: PositiveFloat | None = None
    all_to_all: bool | None = None  # a switch, or every pair directly linked


class Interconnect(SiteModel):
    fabric: Literal["slingshot-11", "infiniband", "omni-path", "ethernet"] | None = None
    generation: str | None = None  # hdr, ndr, …
    nics_per_node: Positive | None = None
    nic_gbit_s: PositiveFloat | None = None  # per NIC, one direction
    node_gbit_s: PositiveFloat | None = None  # injection bandwidth of a node, one direction
    topology: str | None = None
    hcas: list[str] = []
    socket_interfaces: list[str] = []
    in_node: InNode = InNode()
    transport: str | None = None  # regular expression that NCCL's or RCCL's INFO log must match
    plugin: str | None = None  # aws-ofi-nccl, aws-ofi-rccl: what carries NCCL over the fabric


class Gpu(SiteModel):
    """Constants of one GPU as counted; from ``gpus.yaml``, with what a site documents otherwise laid over.

    An unknown device has no peaks: print no utilisation rather than a guess.
    """

    sku: str | None = None
    model: str | None = None
    vendor: Literal["nvidia", "amd"] | None = None
    arch: Arch | None = None
    counted_as: str | None = None  # where the count differs from the product, e.g. one GCD of an MI250X
    memory_gib: PositiveFloat | None = None  # nominal
    memory_visible_mib: Positive | None = None  # what the driver reports, where known
    memory_bandwidth_gb_s: PositiveFloat | None = None
    peak_tflops: dict[Literal["fp64", "fp32", "tf32", "fp16", "bf16", "fp8", "fp4"], PositiveFloat] = {}  # dense
    fp8_format: Literal["ocp", "fnuz"] | None = None
    compute_units: Positive | None = None  # SMs or CUs
    warp_size: Literal[32, 64] | None = None
    shared_memory_kib: Positive | None = None  # per block (NVIDIA) or workgroup (AMD LDS)
    l2_mib: PositiveFloat | None = None
    link_gb_s: PositiveFloat | None = None  # all in-node links together, one direction
    tdp_w: PositiveFloat | None = None
    unified_memory: bool | None = None  # host and device share one memory
    device_names: list[str] = []  # regular expressions for the driver's device string
    min_cuda: Text | None = None

    @property
    def has_bf16(self) -> bool:
        """Whether matrix units take bf16."""
        return "bf16" in self.peak_tflops

    @property
    def has_fp8(self) -> bool:
        return "fp8" in self.peak_tflops

    @property
    def usable_gib(self) -> float | None:
        """What the driver shows where that is known, else the nominal size; the framework's own share still goes off
        it.
        """
        return self.memory_visible_mib / 1024 if self.memory_visible_mib else self.memory_gib
