"""From the files of the nodes to the record's ``energy`` section. What was not measured stays out and is named; nothing
is scaled up to what a full measurement might have shown."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.core.figures import significant
from aifactory_train.core.files import read_json
from aifactory_train.core.missing import is_missing, missing
from aifactory_train.core.output import note

KWH = 3.6e6  # joules
#: Which reader speaks for a boundary where several do.
_FIRST = {"device": ("nvml", "amdsmi", "pm_accel"), "cpu": ("rapl",), "node": ("pm_counters",)}
#: A node that draws more than this on average has a broken counter (Slurm's RAPL plugin on some processors does).
_MOST_W_PER_NODE = 20_000.0


def read_nodes(attempts: Iterable[Path]) -> list[dict[str, Any]]:
    """All ``energy-HOST.json`` of all attempts; a damaged file is given as an entry with an error."""
    found = []
    for folder in attempts:
        for path in sorted(folder.glob("energy-*.json")):
            try:
                node = read_json(path, dict)
                node["attempt"] = folder.name
            except UserError as error:
                node = {"attempt": folder.name, "host": path.stem, "error": f"{path.name}: {error.what}", "readers": {}}
            found.append(node)
    return found


def summarise(
    nodes: Sequence[dict[str, Any]],
    *,
    node_seconds: float,
    sacct: dict[str, Any] | None = None,
    pue: tuple[float, str] | None = None,
    grid: tuple[float, str] | None = None,
    tdp_w: tuple[float, str] | None = None,
    device_seconds: float = 0.0,
    site: str | None = None,
) -> dict[str, Any]:
    """The ``energy`` section.

    ``node_seconds``: wall time x nodes over all attempts, what full coverage would be. ``pue`` and ``grid`` (g
    CO2e/kWh) come with their source or are None; ``tdp_w`` with ``device_seconds`` gives the estimate where no counter
    was read.
    """
    joules: dict[str, float] = {}
    covered: dict[str, float] = {}
    sources: dict[str, set[str]] = {}
    notes: list[str] = []
    missing_readers: dict[str, str] = {}
    for node in nodes:
        label = f"{node.get('host', '?')} (attempt {node.get('attempt', '?')})"
        if node.get("error"):
            notes.append(f"{label}: {node['error']}")
        for boundary, order in _FIRST.items():
            name = next((n for n in order if node.get("readers", {}).get(n, {}).get("joules")), None)
            if name is None:
                continue
            reading = node["readers"][name]
            joules[boundary] = joules.get(boundary, 0.0) + sum(reading["joules"].values())
            covered[boundary] = covered.get(boundary, 0.0) + float(reading["covered_s"])
            sources.setdefault(boundary, set()).add(name)
            notes += [f"{label}, {name}: {note}" for note in reading.get("notes", [])]
        for name, why in node.get("unavailable", {}).items():
            missing_readers.setdefault(name, why)

    if sacct and sacct.get("joules"):
        watts = sacct["joules"] / max(1.0, sacct["node_seconds"])
        if watts > _MOST_W_PER_NODE:
            notes.append(f"sacct's {sacct['joules']:.3g} J would be {watts:,.0f} W per node: not believed, left out")
        elif "node" not in joules:
            joules["node"], covered["node"] = float(sacct["joules"]), float(sacct["node_seconds"])
            sources["node"] = {"slurm_acct"}
            notes.append("node energy by Slurm's accounting covers the whole job, set-up and queue epilogue included")

    def kwh(boundary: str) -> float | None:
        return joules[boundary] / KWH if boundary in joules else None

    def coverage(boundary: str) -> float:
        return round(100 * min(1.0, covered.get(boundary, 0.0) / node_seconds), 1) if node_seconds > 0 else 0.0

    result: dict[str, Any] = {
        "device_kwh": kwh("device"),
        "cpu_kwh": kwh("cpu"),
        "node_kwh": kwh("node"),
        "source": {boundary: "+".join(sorted(names)) for boundary, names in sources.items()},
        "coverage_pct": {boundary: coverage(boundary) for boundary in sources},
        "idle_included": True,
        "estimate": None,
        "missing_readers": missing_readers
        if not sources
        else {k: v for k, v in missing_readers.items() if not any(k in names for names in sources.values())},
        "notes": notes,
    }
    if "node" in joules:
        total, parts, boundary = joules["node"] / KWH, ["node"], "node"
    elif "device" in joules and "cpu" in joules:
        total, parts = (joules["device"] + joules["cpu"]) / KWH, ["device", "cpu"]
        boundary = "devices and processor packages (no network cards, fans, power supplies)"
    elif "device" in joules:
        total, parts, boundary = joules["device"] / KWH, ["device"], "devices only"
    elif "cpu" in joules:
        total, parts, boundary = joules["cpu"] / KWH, ["cpu"], "processor packages and their memory only"
    elif tdp_w is not None and device_seconds > 0:
        total, parts, boundary = tdp_w[0] * device_seconds / KWH, [], "devices only"
        result["estimate"] = f"TDP {tdp_w[0]:g} W x device seconds ({tdp_w[1]}): an estimate, nothing was measured"
    else:
        result.update(
            measured_kwh=missing("site: no energy counter could be read"),
            boundary="none",
            facility_kwh=missing("site"),
            mwh_2sf=missing("site: no energy counter could be read"),
            pue=_factor(pue, site),
            carbon=_factor(grid, site, "g_per_kwh"),
            carbon_kg=missing("site"),
            method="no counter could be read: " + "; ".join(f"{k}: {v}" for k, v in missing_readers.items()),
        )
        return result
    least = min((coverage(p) for p in parts), default=0.0)
    result["measured_kwh" if parts else "estimated_kwh"] = total
    if not parts:
        result["measured_kwh"] = missing("site: no energy counter could be read")
    result["boundary"] = boundary
    whole = "node" in joules
    result["facility_kwh"] = (
        total * pue[0] if pue else missing(f"site {site or ''}: PUE not published".replace("  ", " "))
    )
    if pue and not whole:
        result["notes"].append(f"facility energy is PUE x {boundary}: a lower bound")
    result["pue"] = _factor(pue, site)
    result["carbon"] = _factor(grid, site, "g_per_kwh")
    result["carbon_kg"] = (
        result["facility_kwh"] * grid[0] / 1000
        if grid and not is_missing(result["facility_kwh"])
        else missing(f"site {site or ''}: PUE or grid intensity not published".replace("  ", " "))
    )
    result["mwh_2sf"] = significant(total / 1000) if total > 0 else "0"
    how = (
        f"sum of hardware energy counters ({', '.join(f'{b}: {s}' for b, s in result['source'].items())}), one reader "
        f"per node"
        if parts
        else result["estimate"]
    )
    result["method"] = (
        f"{how}; boundary: {boundary}; idle power included; coverage {least:g} % of node time, not scaled up"
    )
    return result


def _factor(value: tuple[float, str] | None, site: str | None, key: str = "value") -> dict[str, Any]:
    if value is None:
        return {
            key: missing(f"site {site}" if site else "site"),
            "source": "not published" if site else "no site named",
        }
    return {key: value[0], "source": value[1]}


def site_factors(name: str | None) -> dict[str, Any]:
    """``pue``, ``grid`` and ``tdp_w`` of a site profile with their sources (None where the site publishes nothing).

    A name that is no profile is said; nothing is known of it then.
    """
    if not name:
        return {"site": None}
    from aifactory_train import sites

    try:
        system = sites.load(name)
    except UserError as error:
        note(f"site '{name}': {error.what}; PUE and grid intensity stay MISSING in the record")
        return {"site": name, "pue": None, "grid": None, "tdp_w": None}

    def stated(path: str, value: float | None) -> tuple[float, str] | None:
        if value is None:
            return None
        fact = system.provenance(path)
        return float(value), f"{fact.source} ({fact.date}, {fact.confidence})" if fact else "site profile"

    return {
        "site": name,
        "pue": stated("energy.pue", system.energy.pue),
        "grid": stated("energy.grid_g_co2_per_kwh", system.energy.grid_g_co2_per_kwh),
        "tdp_w": stated("gpu.tdp_w", system.gpu.tdp_w),
    }


def from_sacct(job: str) -> dict[str, Any]:
    """Energy of a finished Slurm job, ``{"joules", "node_seconds", "job"}``. Raises :class:`UserError` if there is
    none.
    """
    if not job.replace("_", "").replace("+", "").isdigit():
        raise UserError(f"'{job}' is not a Slurm job id", where="--sacct")
    program = shutil.which("sacct")
    if program is None:
        raise UserError("sacct is not installed here", where="--sacct", fix="run this on a login node of the cluster")
    done = subprocess.run(
        [program, "-j", job, "-X", "-n", "-P", "--format=JobIDRaw,State,ConsumedEnergyRaw,ElapsedRaw,NNodes"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode != 0:
        raise UserError(
            f"sacct failed: {done.stderr.strip().splitlines()[0][:200] if done.stderr.strip() else done.returncode}",
            where="--sacct",
        )
    return parse_sacct(done.stdout, job)


def parse_sacct(text: str, job: str) -> dict[str, Any]:
    """Lines of ``JobIDRaw|State|ConsumedEnergyRaw|ElapsedRaw|NNodes`` (requeued attempts are added up)."""
    joules = seconds = 0.0
    rows = 0
    for line in text.splitlines():
        cells = line.strip().split("|")
        if len(cells) != 5:
            continue
        rows += 1
        energy = cells[2].strip()
        if energy.isdigit():
            joules += float(energy)
        if cells[3].isdigit() and cells[4].isdigit():
            seconds += float(cells[3]) * float(cells[4])
    if rows == 0:
        raise UserError(f"sacct knows no job {job}", where="--sacct")
    if joules <= 0:
        raise UserError(
            f"sacct has no energy for job {job} (ConsumedEnergyRaw is empty or 0)",
            where="--sacct",
            fix="this cluster does not gather energy (acct_gather_energy), or the job has not ended",
        )
    return {"joules": joules, "node_seconds": seconds, "job": job}
