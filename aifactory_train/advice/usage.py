"""What a project used: by run, by how its jobs ended, against its award; and the same without names."""

from __future__ import annotations

import datetime
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.advice.sacct import JobUse
from aifactory_train.core.files import object_or_nothing
from aifactory_train.sites import billing

if TYPE_CHECKING:
    from aifactory_train.sites.system import System


@dataclass(frozen=True)
class GrantedHours:
    """An award: ``amount`` of ``unit`` (GPU-hours, node-hours, or the site's own), until ``end``."""

    amount: float
    unit: str
    end: datetime.date | None = None


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says of itself. ``jobs``: ids that it was submitted as or ran in."""

    name: str
    jobs: frozenset[str]
    record: dict[str, Any]

    @property
    def attempts(self) -> list[dict[str, Any]]:
        found = self.record.get("compute", {}).get("attempts", {})
        return [found[number] for number in sorted(found)]


def runs_below(folder: Path) -> list[RunRecord]:
    """The runs of a folder that kept a record, in the order of their names."""
    found = []
    for config in sorted(folder.glob("*/run.yaml")):
        run = config.parent
        record = object_or_nothing(run / "record.json")
        submitted = run / "submission" / "jobs"
        jobs = submitted.read_text(encoding="utf-8").split() if submitted.is_file() else []
        one = RunRecord(run.name, frozenset(), record)
        jobs += [str(a["job"]) for a in one.attempts if a.get("job")]
        found.append(RunRecord(run.name, frozenset(jobs), record))
    return found


def from_records(runs: list[RunRecord], since: datetime.date, until: datetime.date | None) -> list[JobUse]:
    """Attempts as uses, where nothing else counts them: the time of the training processes, which is a little less than
    the scheduler's."""
    uses = []
    for run in runs:
        for i, attempt in enumerate(run.attempts, start=1):
            day = datetime.date.fromisoformat(str(attempt.get("started", "1970-01-01"))[:10])
            if day < since or (until is not None and day > until):
                continue
            job = str(attempt.get("job") or f"{run.name}/{i}")
            state = {"finished": "COMPLETED", "running": "RUNNING"}.get(str(attempt.get("state")), "")
            uses.append(
                JobUse(
                    job=job,
                    array=f"{run.name}/{i}" if not attempt.get("job") else job,
                    account="",
                    state=state or str(attempt.get("cause") or attempt.get("state")),
                    start=str(attempt.get("started")),
                    seconds=float(attempt.get("wall_s") or 0.0),
                    nodes=int(attempt.get("nodes") or 1),
                    gpus=int(attempt.get("ranks") or 0),
                    partition="",
                    qos="",
                )
            )
    return uses


def summarise_use(
    uses: list[JobUse],
    runs: list[RunRecord],
    source: str,
    since: datetime.date,
    today: datetime.date,
    system: System | None = None,
    award: GrantedHours | None = None,
) -> dict[str, Any]:
    """The keys of ``aifactory usage --json``."""
    owner = {job: run.name for run in runs for job in run.jobs}
    owner |= {f"{run.name}/{i}": run.name for run in runs for i in range(1, len(run.attempts) + 1)}
    by_run: dict[str, list[JobUse]] = defaultdict(list)
    by_end: dict[str, list[JobUse]] = defaultdict(list)
    for use in uses:
        by_run[owner.get(use.job) or owner.get(use.array) or "(no run folder here)"].append(use)
        by_end[use.state].append(use)
    bill = _billed(uses, system)
    total = _sums(uses)
    return {
        "source": source,
        "site": system.id if system else None,
        "from": since.isoformat(),
        "to": today.isoformat(),
        **total,
        "billed": bill,
        "kwh": _kwh(runs, by_run),
        "by_run": [{"run": name, **_sums(found), **_of_run(runs, name)} for name, found in sorted(by_run.items())],
        "by_end": [{"state": state, **_sums(found)} for state, found in sorted(by_end.items())],
        "by_day": _by_day(uses),
        "award": _against(award, total, bill, today) if award else None,
        "anonymous": _anonymous(uses, runs, by_run, since, today),
    }


def _sums(uses: list[JobUse]) -> dict[str, Any]:
    return {
        "jobs": len({use.job for use in uses}),
        "starts": len(uses),
        "gpu_hours": sum(use.gpu_hours for use in uses),
        "node_hours": sum(use.node_hours for use in uses),
    }


def _billed(uses: list[JobUse], system: System | None) -> dict[str, Any] | None:
    """What the site's published rate makes of the jobs; None where it publishes none. The site's own count decides."""
    if system is None or system.accounting.unit is None:
        return None
    amount = 0.0
    for use in uses:
        if not (use.gpus and use.nodes and use.seconds):
            continue
        partition = use.partition if use.partition in system.partitions else system.default_partition
        found = billing.bill(
            system,
            use.nodes,
            use.seconds / 3600,
            gpus_per_node=-(-use.gpus // use.nodes),
            partition=partition,
            qos=use.qos,
        )
        if found is None:
            return None
        amount += found.amount
    return {
        "unit": system.accounting.unit,
        "amount": amount,
        "basis": "the published rate; the site's own count decides",
    }


def _kwh(runs: list[RunRecord], by_run: dict[str, list[JobUse]]) -> dict[str, Any] | None:
    """Energy that runs measured, and how many of them did."""
    here = [run for run in runs if run.name in by_run]
    measured = [v for run in here if isinstance(v := run.record.get("energy", {}).get("measured_kwh"), (int, float))]
    return {"measured": sum(measured), "runs_measured": len(measured), "runs": len(here)} if measured else None


def _of_run(runs: list[RunRecord], name: str) -> dict[str, Any]:
    """Model and waste of a run: GPU-hours whose steps were done again, or that made no step."""
    run = next((r for r in runs if r.name == name), None)
    if run is None:
        return {"base": None, "state": None, "repeated_gpu_hours": None, "causes": []}
    totals = run.record.get("compute", {}).get("totals", {})
    return {
        "base": run.record.get("base", {}).get("id"),
        "state": run.attempts[-1].get("state") if run.attempts else None,
        "repeated_gpu_hours": totals.get("wasted_device_hours"),
        "causes": [str(a["cause"]) for a in run.attempts if a.get("cause")],
    }


def _by_day(uses: list[JobUse]) -> list[dict[str, Any]]:
    """GPU-hours by the day on which a job began."""
    days: dict[str, float] = defaultdict(float)
    for use in uses:
        days[use.start[:10]] += use.gpu_hours
    return [{"day": day, "gpu_hours": hours} for day, hours in sorted(days.items())]


def _against(
    award: GrantedHours, total: dict[str, Any], bill: dict[str, Any] | None, today: datetime.date
) -> dict[str, Any]:
    """Used and left of an award; ``None`` where the award's unit is not one that is known here."""
    used = {"GPU-hours": total["gpu_hours"], "node-hours": total["node_hours"]}.get(award.unit)
    if bill is not None and bill["unit"] == award.unit:
        used = bill["amount"]  # the site's GPU-hour may be a module of two GPUs of the scheduler
    days = (award.end - today).days if award.end else None
    left = None if used is None else award.amount - used
    return {
        "amount": award.amount,
        "unit": award.unit,
        "end": award.end.isoformat() if award.end else None,
        "used": used,
        "share": None if used is None else used / award.amount,
        "left": left,
        "days_left": days,
        "left_a_day": left / days if left is not None and days is not None and days > 0 else None,
    }


def _anonymous(
    uses: list[JobUse],
    runs: list[RunRecord],
    by_run: dict[str, list[JobUse]],
    since: datetime.date,
    today: datetime.date,
) -> dict[str, Any]:
    """Figures that may be published: sums and counts, no name of a person, account, job, run, model or path."""
    here = [run for run in runs if run.name in by_run]
    hours = sum(use.gpu_hours for use in uses)
    ended = [use for use in uses if use.state not in ("RUNNING", "PENDING")]
    done = sum(use.gpu_hours for use in ended if use.state == "COMPLETED")
    mfus = [
        v for run in here if isinstance(v := run.record.get("compute", {}).get("totals", {}).get("mfu"), (int, float))
    ]
    return {
        "from": since.isoformat(),
        "to": today.isoformat(),
        "projects": len({use.account for use in uses if use.account}) or None,
        "jobs": len({use.job for use in uses}),
        "gpu_hours": round(hours, 1),
        "share_of_hours_in_completed_jobs": round(done / hours, 3) if hours else None,
        "models_trained": sum(bool(run.attempts) and run.attempts[-1].get("state") == "finished" for run in here),
        "base_models": len({run.record.get("base", {}).get("id") for run in here if run.record.get("base")}),
        "utilisation": {"mean_mfu": round(sum(mfus) / len(mfus), 3), "runs": len(mfus)} if mfus else None,
    }
