"""What this machine is: a :class:`System` called ``local``, and which known system we stand on.

Reads ``/proc``, ``lscpu``, ``nvidia-smi`` and ``rocm-smi`` (each with a time limit, none is required); never imports
torch.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.sites.catalogue import gpu_catalogue
from aifactory_train.sites.resolving import resolve
from aifactory_train.sites.system import System

TIMEOUT_S = 20


@dataclass(frozen=True)
class Device:
    """One GPU as its driver reports it. ``memory_mib`` is the total; ``arch`` is sm_NN or gfxNNN, or None."""

    name: str
    memory_mib: int | None
    arch: str | None
    vendor: str
    driver: str | None = None
    power_limit_w: float | None = None


# -- parsers of the vendors' tools: text in, facts out
# ---------------------------------------------------------------------

NVIDIA_QUERY = "name,memory.total,compute_cap,driver_version,power.limit"


def parse_nvidia_smi(text: str) -> list[Device]:
    """Devices from ``nvidia-smi --query-gpu=... --format=csv``.

    Columns are found by the header line, in any order; without one (``noheader``) they are taken to be NVIDIA_QUERY's.
    Units are optional, ``[N/A]`` becomes None.
    """
    columns = NVIDIA_QUERY.split(",")
    devices = []
    for line in text.splitlines():
        cells = [c.strip() for c in line.split(",")]
        if "name" in (c.lower() for c in cells):
            columns = [c.lower().split(" ")[0] for c in cells]
            continue
        if len(cells) < 2:
            continue
        row = dict(zip(columns, cells, strict=False))
        mib = re.match(r"(\d+)", row.get("memory.total", ""))
        capability = re.fullmatch(r"(\d+)\.(\d+)", row.get("compute_cap", ""))
        watts = re.match(r"(\d+(?:\.\d+)?)", row.get("power.limit", ""))
        driver = row.get("driver_version", "")
        devices.append(
            Device(
                name=row["name"],
                memory_mib=int(mib.group(1)) if mib else None,
                arch=f"sm_{capability.group(1)}{capability.group(2)}" if capability else None,
                vendor="nvidia",
                driver=driver if driver and not driver.startswith("[") else None,
                power_limit_w=float(watts.group(1)) if watts else None,
            )
        )
    return devices


def parse_rocm_smi(text: str) -> list[Device]:
    """Devices from ``rocm-smi --showproductname --showmeminfo vram --showdriverversion --json``.

    Key names changed over ROCm versions ("Card series" and "Card Series", "GFX Version" since 6.x); both are read. The
    JSON may be preceded by warnings, which are skipped.
    """
    start = text.find("{")
    if start < 0:
        raise ValueError("no JSON in the output of rocm-smi")
    data = json.JSONDecoder().raw_decode(text[start:])[0]
    driver = None
    for key, value in (data.get("system") or {}).items():
        if "driver version" in key.lower():
            driver = str(value)
    devices = []
    cards = sorted((k for k in data if re.fullmatch(r"card\d+", k)), key=lambda k: int(k[4:]))
    for card in cards:
        fields = {k.lower(): str(v) for k, v in data[card].items()}
        candidates = [
            fields.get(k, "") for k in ("card series", "card model", "card sku", "device name", "market name")
        ]
        name = next((c for c in candidates if re.search(r"mi\d{3}|instinct|radeon", c, re.I)), candidates[0] or card)
        memory = next((v for k, v in fields.items() if "vram total memory" in k), None)
        gfx = fields.get("gfx version", "")
        devices.append(
            Device(
                name=name,
                memory_mib=int(memory) // 2**20 if memory and memory.isdigit() else None,
                arch=gfx if re.fullmatch(r"gfx[0-9a-f]{3,4}", gfx) else None,
                vendor="amd",
                driver=driver,
            )
        )
    return devices


def parse_lscpu(text: str) -> dict[str, Any]:
    """``cpu, isa, sockets, cores, threads_per_core, numa_domains`` from ``lscpu`` (its keys in English)."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, sep, value = line.partition(":")
        if sep:
            fields.setdefault(key.strip(), value.strip())

    def number(key: str) -> int | None:
        text = fields.get(key, "")
        return int(text) if text.isdigit() else None

    sockets, per_socket, threads = number("Socket(s)"), number("Core(s) per socket"), number("Thread(s) per core")
    per_cluster = number("Core(s) per cluster")
    cores = None
    if sockets and per_socket:
        cores = sockets * per_socket
    elif per_cluster and number("Cluster(s)"):
        cores = per_cluster * (number("Cluster(s)") or 1)
    elif number("CPU(s)"):
        cores = (number("CPU(s)") or 1) // (threads or 1)
    isa = fields.get("Architecture")
    with_cores = sum(bool(v) for k, v in fields.items() if re.fullmatch(r"NUMA node\d+ CPU\(s\)", k))
    return {
        "cpu": fields.get("Model name"),
        "isa": isa if isa in ("x86_64", "aarch64") else None,
        "sockets": sockets,
        "cores": cores,
        "threads_per_core": threads,
        # A GPU's memory may show as domains without a core (GH200: 36 numbers, four with cores); they are not counted.
        "numa_domains": with_cores or number("NUMA node(s)"),
    }


def match_sku(device: Device) -> str | None:
    """The catalogue's SKU for a device: name pattern, architecture and memory (within 7 %) must agree; None where none
    does.
    """
    found = []
    for sku, entry in gpu_catalogue().items():
        names = entry.get("device_names") or []
        if not any(re.search(p, device.name) for p in names):
            continue
        if device.arch and entry.get("arch") != device.arch:
            continue
        nominal = entry.get("memory_gib")
        if device.memory_mib and nominal and abs(device.memory_mib / 1024 - nominal) > 0.07 * nominal:
            continue
        found.append(sku)
    return found[0] if len(found) == 1 else None


# -- reading this machine
# ----------------------------------------------------------------------------------------------------


def run_tool(command: list[str]) -> str | None:
    """Standard output of a tool that is on PATH and answers; None otherwise."""
    if shutil.which(command[0]) is None:
        return None
    env = {**os.environ, "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, env=env, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def devices() -> tuple[list[Device], list[str]]:
    """(the GPUs here, NVIDIA's first; what a driver tool said that could not be read). Both empty where no tool
    answers.
    """
    found: list[Device] = []
    problems: list[str] = []
    text = run_tool(["nvidia-smi", f"--query-gpu={NVIDIA_QUERY}", "--format=csv"])
    if text:
        found += parse_nvidia_smi(text)
    text = run_tool(["rocm-smi", "--showproductname", "--showmeminfo", "vram", "--showdriverversion", "--json"])
    if text:
        try:
            found += parse_rocm_smi(text)
        except ValueError as error:
            problems.append(f"rocm-smi answered, but not in JSON ({error}): its GPUs are not counted")
    return found, problems


def _memory_gib() -> float | None:
    """Physical memory, or this container's limit where that is lower."""
    total = None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                total = int(line.split()[1]) / 2**20
    except OSError:
        return None
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limit = Path(path).read_text().strip()
        except OSError:
            continue
        if limit.isdigit() and total is not None:
            total = min(total, int(limit) / 2**30)
    return round(total, 2) if total else None


def _usable_cores() -> int:
    """Cores this process may use: affinity, then the container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            cores = min(cores, max(1, int(quota) // int(period)))
    except (OSError, ValueError):
        return cores
    return cores


def local_profile() -> dict[str, Any]:
    """The raw profile of this machine (see :func:`detect`)."""
    cpu = parse_lscpu(run_tool(["lscpu"]) or "")
    gpus, problems = devices()
    kinds = {(d.name, d.memory_mib, d.arch) for d in gpus}
    node: dict[str, Any] = {k: v for k, v in cpu.items() if v is not None}
    node.setdefault("isa", platform.machine() if platform.machine() in ("x86_64", "aarch64") else None)
    node["count"] = 1
    node["cores_usable"] = _usable_cores()
    node["cores"] = max(int(node.get("cores") or 0), node["cores_usable"])
    memory = _memory_gib()
    if memory:
        node["memory_gib"] = node["memory_usable_gib"] = memory
    gpu: dict[str, Any] = {}
    notes = [{"text": p, "source": "now", "confidence": "documented"} for p in problems]
    if gpus:
        first = gpus[0]
        node["gpus"] = len(gpus)
        sku = match_sku(first)
        gpu = {"sku": sku} if sku else {"model": first.name, "vendor": first.vendor}
        if first.arch:
            gpu["arch"] = first.arch
        if first.memory_mib:
            gpu["memory_visible_mib"] = first.memory_mib
            if not sku:
                gpu["memory_gib"] = round(first.memory_mib / 1024, 2)
        if len(kinds) > 1:
            notes.append(
                {
                    "text": "different GPUs are mixed here; the first one's constants are used: "
                    + ", ".join(sorted({d.name for d in gpus})),
                    "source": "now",
                    "confidence": "documented",
                }
            )
        if not sku:
            notes.append(
                {
                    "text": f"'{first.name}' is not in the catalogue: no peak is known, so no utilisation is printed",
                    "source": "now",
                    "confidence": "documented",
                }
            )
    raw: dict[str, Any] = {
        "schema": 1,
        "id": "local",
        "name": "this machine",
        "status": "usable",
        "operator": socket.gethostname(),
        "maintainer": "detected on each start",
        "expires": "2100-01-01",
        "missing": [],
        "scheduler": {"kind": "none"},
        "access": {"account": "none", "qos": "none", "example": {}},
        "request": {"gpus": "none", "exclusive": False, "memory": "none"},
        "node": node,
        "gpu": gpu,
        "launch": {"style": "torchrun", "head_address": {"strategy": "hostname"}},
        "policy": {"export": "ALL", "requeue": "forbidden", "resubmit": "resubmit"},
        "software": {"modules_system": "none"},
        "internet": {"compute": "full"},
        "notes": notes,
        "sources": {"now": {"title": f"read from {socket.gethostname()}", "date": datetime.date.today().isoformat()}},
        "facts": [
            {
                "at": ["scheduler", "access", "request", "launch", "policy", "software"],
                "source": "project",
                "confidence": "project",
            },
            {"at": ["node", "gpu"], "source": "now", "confidence": "detected"},
            {
                "at": ["internet"],
                "source": "project",
                "confidence": "project",
                "note": "not tried: a workstation is taken to be online; set HF_HUB_OFFLINE=1 where it is not",
            },
        ],
    }
    raw["gpu"] = {k: v for k, v in gpu.items() if v is not None}
    raw["node"] = {k: v for k, v in node.items() if v is not None}
    return raw


def detect() -> System:
    """This machine as a System called ``local``: cores and memory that may be used, GPUs as their driver reports
    them.
    """
    return resolve(local_profile())


def host_names() -> list[str]:
    """This host's names, the longest first (asks no name server)."""
    return sorted({socket.gethostname(), platform.node()}, key=len, reverse=True)


def identify(
    names: list[str] | None = None, env: dict[str, str] | None = None, cluster: str | None = None
) -> str | None:
    """The id of the known system we are on, or None.

    names:    host names to test (default: this host's); env: environment (default: the process's);
    cluster:  Slurm's ClusterName (default: ``SLURM_CLUSTER_NAME``, else asked of ``scontrol`` where it exists).

    Refuses where two systems of different names match equally well.
    """
    from aifactory_train.sites.index import load_index

    names = host_names() if names is None else names
    env = dict(os.environ) if env is None else env
    if cluster is None:
        cluster = env.get("SLURM_CLUSTER_NAME") or _cluster_name()
    scored: dict[str, int] = {}
    for system in load_index()["systems"]:
        if system["status"] != "usable":
            continue
        rules = system["detect"]
        score = 0
        if cluster and cluster in rules["cluster_names"]:
            score += 2
        if any(re.fullmatch(p, n) for p in rules["hostnames"] for n in names):
            score += 2
        score += sum(1 for k, v in rules["env"].items() if env.get(k) is not None and re.fullmatch(v, env[k]))
        if score:
            scored[system["id"]] = score
    if not scored:
        return None
    best = max(scored.values())
    winners = sorted(s for s, v in scored.items() if v == best)
    if len(winners) > 1:
        raise UserError(
            f"this machine looks like {' and '.join(winners)}",
            where="--site",
            fix=f"name one of them: {', '.join('--site ' + w for w in winners)}",
        )
    return winners[0]


def _cluster_name() -> str | None:
    text = run_tool(["scontrol", "show", "config"])
    found = re.search(r"^ClusterName\s*=\s*(\S+)", text or "", re.M)
    return found.group(1) if found else None
