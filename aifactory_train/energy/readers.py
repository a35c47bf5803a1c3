"""Energy counters of one node. Each reader gives cumulative joules by counter; none samples power.

=============  =======  ===============================================================================================
reader         bounds   what it reads
=============  =======  ===============================================================================================
nvml           device   ``nvmlDeviceGetTotalEnergyConsumption`` (mJ since the driver was loaded; Volta and later)
amdsmi         device   ``amdsmi_get_energy_count`` (accumulator x resolution in uJ). The two GCDs of an MI250X
                        are one package
                        with one counter; the second die reads 0 or repeats the first, so the package is counted once
pm_counters    node     Cray's ``/sys/cray/pm_counters/energy`` (J, the whole node at its board)
pm_accel       device   the same tree's ``accelN_energy`` (J, one per module)
rapl           cpu      ``/sys/class/powercap`` packages and their DRAM (uJ, wraps at ``max_energy_range_uj``)
=============  =======  ===============================================================================================

The libraries are called through ``ctypes``: nothing needs to be installed, and a node without them says so by name.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

K = TypeVar("K")
T = TypeVar("T")


class Unavailable(Exception):
    """This counter cannot be read here; the text says why."""


@dataclass(frozen=True)
class MeteredDevice:
    """An accelerator that a rank of this node uses, as torch names it. Either name may be unknown."""

    uuid: str | None = None  # without the vendor's prefix
    pci: str | None = None  # "0000:c1:00"
    model: str = ""


class Reader(Protocol):
    """One kind of counter on one node."""

    name: str
    boundary: str  # device, cpu or node
    #: counters that should be there for full coverage
    expected: int

    def read(self) -> dict[str, float]:
        """Joules so far, by counter. A counter that fails is left out; raises :class:`Unavailable` if none can be
        read.
        """

    def wrap(self, counter: str) -> float | None:
        """Joules after which the counter starts again from 0, or None if it does not within any run."""


def _joules(counters: Mapping[K, T], read: Callable[[T], float]) -> dict[K, float]:
    """What ``read`` gives for each counter; one that raises :class:`Unavailable` is left out, if all do the last reason
    is raised.
    """
    found: dict[K, float] = {}
    why = "no counter"
    for name, counter in counters.items():
        try:
            found[name] = read(counter)
        except Unavailable as error:
            why = str(error)
    if not found:
        raise Unavailable(why)
    return found


class _Library:
    """A vendor's management library; a function that is missing or answers an error is :class:`Unavailable`."""

    def __init__(self, library: str, driver: str):
        self._driver = driver
        try:
            self._lib = ctypes.CDLL(library)
        except OSError:
            raise Unavailable(f"{library} is not here (no {driver})") from None

    def _call(self, function: str, *arguments: Any) -> None:
        try:
            status = getattr(self._lib, function)(*arguments)
        except AttributeError:
            raise Unavailable(f"this {self._driver} has no {function}") from None
        if status != 0:
            raise Unavailable(f"{function} answered {status}")


# ---- NVIDIA


class Nvml(_Library):
    """All GPUs that the ranks of this node use; all that NVML shows if that is not known."""

    name, boundary = "nvml", "device"

    def __init__(self, devices: Sequence[MeteredDevice] = (), library: str = "libnvidia-ml.so.1"):
        super().__init__(library, "NVIDIA driver")
        self._call("nvmlInit_v2")
        count = ctypes.c_uint()
        self._call("nvmlDeviceGetCount_v2", ctypes.byref(count))
        wanted = {d.uuid.lower().removeprefix("gpu-") for d in devices if d.uuid}
        self._handles: dict[str, ctypes.c_void_p] = {}
        for index in range(count.value):
            handle = ctypes.c_void_p()
            try:
                self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(index), ctypes.byref(handle))
                text = ctypes.create_string_buffer(96)
                self._call("nvmlDeviceGetUUID", handle, text, ctypes.c_uint(96))
            except Unavailable:
                continue  # another job's GPU: NVML lists it but the cgroup forbids it
            uuid = text.value.decode("ascii", "replace").lower().removeprefix("gpu-")
            if not wanted or uuid in wanted:
                self._handles[f"gpu-{uuid}"] = handle
        if not self._handles:
            raise Unavailable("NVML shows none of the GPUs that the ranks use")
        self.expected = len(wanted) or len(self._handles)
        self.read()  # a GPU before Volta has no counter: say so now

    def read(self) -> dict[str, float]:
        return _joules(self._handles, self._energy)

    def _energy(self, handle: ctypes.c_void_p) -> float:
        value = ctypes.c_ulonglong()
        self._call("nvmlDeviceGetTotalEnergyConsumption", handle, ctypes.byref(value))
        return value.value / 1e3

    def wrap(self, counter: str) -> float | None:
        return None  # 64 bits of millijoules


# ---- AMD


class AmdSmi(_Library):
    """All packages whose dies the ranks of this node use; all that AMD SMI shows if that is not known."""

    name, boundary = "amdsmi", "device"

    def __init__(self, devices: Sequence[MeteredDevice] = (), library: str = "libamd_smi.so"):
        super().__init__(library, "ROCm")
        self._call("amdsmi_init", ctypes.c_uint64(2))  # AMDSMI_INIT_AMD_GPUS
        dies = list(self._dies())
        if not dies:
            raise Unavailable("AMD SMI shows no GPU")
        per_package = 2 if any("MI250" in d.model for d in devices) else 1
        # Dies of a package follow one another in the order of their PCI addresses.
        dies.sort(key=lambda die: die[0])
        wanted = {d.pci for d in devices if d.pci}
        self._packages: dict[str, list[ctypes.c_void_p]] = {}
        for start in range(0, len(dies), per_package):
            group = dies[start : start + per_package]
            if wanted and not any(address in wanted for address, _ in group):
                continue
            self._packages[f"package-{group[0][0]}"] = [handle for _, handle in group]
        if not self._packages:
            raise Unavailable("AMD SMI shows none of the GPUs that the ranks use")
        self.expected = len(self._packages)
        self.read()

    def _handles(self, function: str, *before: Any) -> list[ctypes.c_void_p]:
        count = ctypes.c_uint32()
        self._call(function, *before, ctypes.byref(count), None)
        array = (ctypes.c_void_p * count.value)()
        self._call(function, *before, ctypes.byref(count), array)
        return [ctypes.c_void_p(array[i]) for i in range(count.value)]

    def _dies(self) -> Iterable[tuple[str, ctypes.c_void_p]]:
        for socket in self._handles("amdsmi_get_socket_handles"):
            for die in self._handles("amdsmi_get_processor_handles", socket):
                bdf = ctypes.c_uint64()
                self._call("amdsmi_get_gpu_device_bdf", die, ctypes.byref(bdf))
                domain, bus, device = bdf.value >> 16, bdf.value >> 8 & 0xFF, bdf.value >> 3 & 0x1F
                yield f"{domain:04x}:{bus:02x}:{device:02x}", die

    def read(self) -> dict[str, float]:
        return _joules(self._packages, self._package_energy)

    def _package_energy(self, dies: list[ctypes.c_void_p]) -> float:
        readings = _joules(dict(enumerate(dies)), self._die_energy)
        most = max(readings.values())  # the package's counter; its second die reads 0 or the same
        if most <= 0:
            raise Unavailable("the counter reads 0")
        return most

    def _die_energy(self, die: ctypes.c_void_p) -> float:
        energy, resolution, stamp = ctypes.c_uint64(), ctypes.c_float(), ctypes.c_uint64()
        values = [ctypes.byref(value) for value in (energy, resolution, stamp)]
        self._call("amdsmi_get_energy_count", die, *values)
        return energy.value * resolution.value / 1e6

    def wrap(self, counter: str) -> float | None:
        return None  # 64 bits of about 15 uJ


# ---- Cray


def _pm_value(path: Path) -> float:
    """``12345 J 1700000000 us`` -> 12345.0; anything else is :class:`Unavailable`."""
    try:
        value, unit = path.read_text(encoding="ascii").split()[:2]
        if unit != "J":
            raise ValueError(f"{path.name} is in {unit}, not J")
        return float(value)
    except (OSError, ValueError) as error:
        raise Unavailable(str(error)) from None


class PmCounters:
    """The node as Cray's board measures it: processors, memory, accelerators, network cards."""

    name, boundary, expected = "pm_counters", "node", 1

    def __init__(self, root: Path = Path("/sys/cray/pm_counters")):
        self._file = root / "energy"
        if not self._file.is_file():
            raise Unavailable(f"{root} is not here (not a Cray EX node)")
        self.read()

    def read(self) -> dict[str, float]:
        return {"node": _pm_value(self._file)}

    def wrap(self, counter: str) -> float | None:
        return None


class PmAccelerators:
    """``accelN_energy`` of the same tree: one counter per module (on LUMI an MI250X with its two GCDs)."""

    name, boundary = "pm_accel", "device"

    def __init__(self, root: Path = Path("/sys/cray/pm_counters")):
        self._files = {p.name.removesuffix("_energy"): p for p in sorted(root.glob("accel[0-9]*_energy"))}
        if not self._files:
            raise Unavailable(f"{root} has no accelerator counters")
        self.expected = len(self._files)
        self.read()

    def read(self) -> dict[str, float]:
        return _joules(self._files, _pm_value)

    def wrap(self, counter: str) -> float | None:
        return None


# ---- RAPL


class Rapl:
    """Processor packages and their DRAM. Cores and uncore are parts of the package and are not added."""

    name, boundary = "rapl", "cpu"

    def __init__(self, root: Path = Path("/sys/class/powercap")):
        self._zones: dict[str, Path] = {}
        for zone in sorted(root.glob("intel-rapl:*")):
            try:
                kind = (zone / "name").read_text(encoding="ascii").strip()
            except OSError:
                continue
            if kind.startswith("package") or kind == "dram":
                self._zones[zone.name.removeprefix("intel-rapl:")] = zone
        if not self._zones:
            raise Unavailable(f"{root} has no RAPL packages")
        self.expected = len(self._zones)
        self.read()

    def read(self) -> dict[str, float]:
        return _joules({name: zone / "energy_uj" for name, zone in self._zones.items()}, self._energy)

    def _energy(self, file: Path) -> float:
        try:
            return int(file.read_text(encoding="ascii")) / 1e6
        except PermissionError:
            raise Unavailable(f"{file} may be read by root only (the site decides)") from None
        except (OSError, ValueError) as error:
            raise Unavailable(str(error)) from None

    def wrap(self, counter: str) -> float | None:
        try:
            return int((self._zones[counter] / "max_energy_range_uj").read_text(encoding="ascii")) / 1e6
        except (OSError, ValueError):
            return None


def find_readers(
    devices: Sequence[MeteredDevice], *, root: Path = Path("/"), nvml: str | None = None, amdsmi: str | None = None
) -> tuple[list[Reader], dict[str, str]]:
    """``(readers that work here, why each of the others does not)``. ``root`` and the library names are for tests."""
    makers: dict[str, Any] = {
        "nvml": lambda: Nvml(devices, nvml or "libnvidia-ml.so.1"),
        "amdsmi": lambda: AmdSmi(devices, amdsmi or "libamd_smi.so"),
        "pm_counters": lambda: PmCounters(root / "sys/cray/pm_counters"),
        "pm_accel": lambda: PmAccelerators(root / "sys/cray/pm_counters"),
        "rapl": lambda: Rapl(root / "sys/class/powercap"),
    }
    found: list[Reader] = []
    reasons: dict[str, str] = {}
    for name, make in makers.items():
        try:
            found.append(make())
        except Unavailable as error:
            reasons[name] = str(error)
    return found, reasons
