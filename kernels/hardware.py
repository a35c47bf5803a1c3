"""The chips that kernels are compiled for, and the device models (SKUs) built from them. Imports nothing but the
standard library.

An *architecture* decides what code is legal (wave width, shared memory); a *SKU* decides what is fast (units, chiplets,
bandwidth). MI300A and MI300X share gfx942, and five H100 variants share sm_90, so configurations are keyed by both.
"""

from __future__ import annotations

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Target:
    """One architecture as the Triton compiler names it.

    ``wave`` is the number of lanes of one warp; ``block_memory`` the most shared memory (LDS) in bytes that one block
    may take; ``unit_memory`` and ``unit_registers`` (32-bit registers) what one SM or compute unit has for all its
    blocks.
    """

    name: str
    backend: str
    wave: int
    block_memory: int
    unit_memory: int
    unit_registers: int
    unit_threads: int = 2048
    unit_blocks: int = 32
    reserved_memory: int = 0

    @property
    def capability(self) -> int | str:
        """What ``GPUTarget`` wants: 90 for sm_90, the name itself for AMD."""
        return int(self.name[3:]) if self.backend == "cuda" else self.name


def _nvidia(name: str, block: int, unit: int, reserved: int) -> Target:
    return Target(name, "cuda", 32, block, unit, 65536, reserved_memory=reserved)


def _cdna(name: str, memory: int) -> Target:
    return Target(name, "hip", 64, memory, memory, 4 * 512 * 64)


# CUDA programming guide, table of compute capabilities (shared memory per block and per SM); AMD accelerator
# specification tables (LDS, vector registers). gfx1250: LDS from AMD's aiter sources, 1024 registers a wave from the
# compiler; gfx1251 is taken to equal it. unit_registers of gfx125x is not published, so no occupancy is given for it.
TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        _nvidia("sm_80", 166912, 167936, 1024),
        _nvidia("sm_90", 232448, 233472, 1024),
        _nvidia("sm_100", 232448, 233472, 1024),
        _nvidia("sm_103", 232448, 233472, 1024),
        _cdna("gfx90a", 65536),
        _cdna("gfx942", 65536),
        _cdna("gfx950", 163840),
        Target("gfx1250", "hip", 32, 327680, 327680, 0),
        Target("gfx1251", "hip", 32, 327680, 327680, 0),
    )
}


@dataclasses.dataclass(frozen=True)
class Sku:
    """One device as the scheduler counts it (an MI250X shows up as two GCDs, each a device).

    ``units`` = SMs or compute units, ``xcd`` = compute chiplets, ``bandwidth`` = peak HBM bytes/s, ``peak_bf16`` =
    dense FLOP/s. ``recalled`` names the fields whose value no vendor page confirms: they steer rankings, never a claim.
    ``memory_gb`` (10^9 bytes) is given by devices that were added (:func:`add`); the shipped ones carry it in their
    names.
    """

    name: str
    arch: str
    units: int
    bandwidth: float
    peak_bf16: float
    xcd: int = 1
    recalled: tuple[str, ...] = ()
    memory_gb: float | None = None

    @property
    def balance(self) -> float:
        """FLOP that the device can do while it moves one byte."""
        return self.peak_bf16 / self.bandwidth


SKUS: dict[str, Sku] = {
    s.name: s
    for s in (
        Sku("A100-40", "sm_80", 108, 1.555e12, 312e12),
        Sku("A100-64", "sm_80", 108, 1.64e12, 312e12, recalled=("bandwidth", "units")),
        Sku("A100-80", "sm_80", 108, 2.039e12, 312e12),
        Sku("H100-64", "sm_90", 132, 2.0e12, 989e12, recalled=("bandwidth",)),
        Sku("H100-80", "sm_90", 132, 3.35e12, 989e12),
        Sku("H100-94", "sm_90", 132, 3.9e12, 989e12, recalled=("bandwidth",)),
        Sku("H200", "sm_90", 132, 4.8e12, 989e12),
        Sku("GH200", "sm_90", 132, 4.0e12, 989e12),
        Sku("B200", "sm_100", 148, 8.0e12, 2250e12, recalled=("units",)),
        Sku("B300", "sm_103", 148, 8.0e12, 2250e12, recalled=("units", "peak_bf16")),
        Sku("MI250X-GCD", "gfx90a", 110, 1.6384e12, 191.5e12),
        Sku("MI300A", "gfx942", 228, 5.3e12, 980.6e12, xcd=6),
        Sku("MI300X", "gfx942", 304, 5.3e12, 1307e12, xcd=8),
        Sku("MI355X", "gfx950", 256, 8.0e12, 2500e12, xcd=8),
    )
}

#: seconds for which bytes must be in flight to hide memory latency (Little's law); an assumption until measured on a
#: device
LATENCY = 1e-6

_ALIASES = {"mi250x": "MI250X-GCD", "mi250": "MI250X-GCD", "gb200": "B200", "gb300": "B300"}


def sku(name: str | None, arch: str | None = None) -> Sku | None:
    """The SKU of that name (case and a few spellings are forgiven), or None when it is unknown or of another
    architecture.
    """
    if not name:
        return None
    wanted = _ALIASES.get(name.lower(), name).lower()
    found = next((s for s in SKUS.values() if s.name.lower() == wanted), None)
    return found if found and arch in (None, found.arch) else None


def add(device: Sku) -> None:
    """Make a device known in this process under its own name. Raises ``ValueError`` where another one has that name."""
    known = sku(device.name)
    if known is not None and known != device:
        raise ValueError(f"{device.name} is already the name of another device ({known})")
    if device.arch not in TARGETS:
        raise ValueError(f"{device.name}: no target is named {device.arch}")
    SKUS[device.name] = device


def skus_of(arch: str) -> list[Sku]:
    """All known SKUs of one architecture (none for gfx125x, whose unit count is not public)."""
    return [s for s in SKUS.values() if s.arch == arch]


def identify(arch: str, units: int, memory_bytes: int, name: str = "") -> Sku | None:
    """The SKU of a device from what the driver says: architecture, SM/CU count, memory size, marketing name.

    Marketing names alone do not tell an H100-64 from an H100-80, so the memory size decides between the SKUs of an
    architecture. Returns None when nothing fits within 12 % of the memory or the unit count is wrong: an unknown device
    is not guessed. ``units`` 0 is unknown. Devices that were added are asked last.
    """
    gigabytes = memory_bytes / 1e9
    shipped = _identify_shipped(arch, units, gigabytes, name.upper())
    if shipped is not None:
        return shipped
    own = [s for s in skus_of(arch) if s.memory_gb and s.units == units]
    close = [s for s in own if abs(gigabytes - (s.memory_gb or 0)) <= 0.12 * (s.memory_gb or 0)]
    return min(close, key=lambda s: abs(gigabytes - (s.memory_gb or 0)), default=None)


def _identify_shipped(arch: str, units: int, gigabytes: float, text: str) -> Sku | None:
    candidates = [s for s in skus_of(arch) if s.memory_gb is None]
    if arch == "gfx942":
        candidates = [s for s in candidates if s.units == units]
    if "GH200" in text and arch == "sm_90":
        return SKUS["GH200"]
    if len(candidates) == 1:
        return candidates[0] if arch != "gfx942" or candidates[0].units == units else None
    sizes = {s.name: float(m.group(1)) for s in candidates if (m := re.search(r"-(\d+)$", s.name))}
    sizes |= {"H200": 141.0}
    # A part with fewer units is another product of that memory size (PCIe boards, parts for one market), except where
    # ours is recalled.
    candidates = [s for s in candidates if not units or units == s.units or "units" in s.recalled]
    close = [s for s in candidates if s.name in sizes and abs(gigabytes - sizes[s.name]) <= 0.12 * sizes[s.name]]
    return min(close, key=lambda s: abs(gigabytes - sizes[s.name]), default=None)


def chunk_rows(device: Sku | None) -> int:
    """Rows of one chunk of the linear cross-entropy.

    Adding a chunk's contribution to the fp32 weight gradient moves 8 bytes per weight; its GEMM does 2·rows FLOP per
    weight. The traffic hides behind the GEMM from rows = 4·balance on; twice that, rounded up to a power of two, leaves
    a margin. Without a known device 2048, which is right for A100 and MI300A and a factor of two low for H100.
    """
    if device is None:
        return 2048
    return 1 << max(8, int(8 * device.balance - 1).bit_length())


def occupancy(target: Target, registers: int, shared: int, warps: int) -> int | None:
    """Resident blocks on one SM or CU: the smallest of :func:`block_limits`; None when the limits are not public."""
    found = block_limits(target, registers, shared, warps)
    return min(found.values()) if found else None


def limiter(target: Target, registers: int, shared: int, warps: int) -> str | None:
    """What keeps more blocks from being resident: the names of the smallest limits, joined by commas."""
    found = block_limits(target, registers, shared, warps)
    return ", ".join(name for name, blocks in found.items() if blocks == min(found.values())) if found else None


def block_limits(target: Target, registers: int, shared: int, warps: int) -> dict[str, int]:
    """Blocks that each resource of one SM or CU has room for: registers, LDS or shared memory, waves or threads,
    blocks.

    AMD: waves per SIMD = min(8, 512 // registers rounded up to 8), four SIMDs a CU. NVIDIA: registers are handed out to
    a warp in granules of 256 and every block takes 1 KiB of shared memory for the system. Empty when the limits are not
    public.
    """
    if not target.unit_registers:
        return {}
    granule = max(8, -(-registers // 8) * 8)
    if target.backend == "hip":
        by_registers = min(8, 512 // granule) * 4 // warps if granule <= 512 else 0
    else:
        by_registers = target.unit_registers // (granule * warps * target.wave)
    by_threads = target.unit_threads // (warps * target.wave)
    by_memory = target.unit_memory // max(1, shared + target.reserved_memory)
    memory, waves = ("LDS", "waves") if target.backend == "hip" else ("shared memory", "threads")
    return {"registers": by_registers, waves: by_threads, memory: by_memory, "blocks": target.unit_blocks}
