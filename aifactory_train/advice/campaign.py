"""A scaling campaign: which jobs measure strong and weak scaling under a cap of GPU-hours, and what they measured."""

from __future__ import annotations

import datetime
import json
import math
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.advice.scaling import Campaign
from aifactory_train.core.errors import UserError
from aifactory_train.core.files import read_json, write_json

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe
    from aifactory_train.sites.system import System

CAMPAIGN, MEASURED = "campaign.json", "scaling.json"
#: First steps that are not counted: kernels are compiled and caches filled in them.
WARM_UP = 5
#: Seconds of a job beside its steps: start, pre-flight, loading. A limit, not a measurement.
AROUND_S = 900
#: What a limit allows for each modelled step: the model's own interval reaches as far.
SLACK = 3.0
#: Nothing but steps: no evaluation, export, checkpoint or pack, and epochs enough for them.
ONLY_STEPS = (
    "train.epochs=1000", "eval.every_steps=null", "eval.before=false", "eval.after=false", "eval.generate_rows=0",
    "eval.forgetting=false", "export.automatic=false", "record.pack=false", "checkpoint.every_steps=null",
    "checkpoint.at_end=false",
)  # fmt: skip


@dataclass(frozen=True)
class MeasuredJob:
    """One array: ``repeats`` runs on ``nodes`` nodes. ``kinds``: strong (the recipe's step), weak (one that grows with
    the nodes), or both for the fewest nodes, where they are the same."""

    kinds: tuple[str, ...]
    nodes: int
    gpus_per_node: int
    repeats: int
    limit_s: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.kinds[0]}-{self.nodes:04d}"

    @property
    def gpu_hours_most(self) -> float:
        """What it can take at most: its time limit ends it, and nothing is submitted again."""
        return self.repeats * self.nodes * self.gpus_per_node * self.limit_s / 3600

    def words(self, recipe: str, site: str, folder: Path, more: list[str]) -> list[str]:
        """The words of its ``aifactory launch``."""
        seeds = ",".join(str(n) for n in range(1, self.repeats + 1))
        words = ["launch", recipe, "--site", site, "--nodes", str(self.nodes), "--time", f"{self.limit_s // 60}m"]
        words += ["--run-dir", str(folder / self.name), "--array", f"train.seed={seeds}", "--resubmit", "none"]
        for text in self.overrides:
            words += ["--set", text]
        return [*words, *more]


def jobs_of(
    recipe: Recipe,
    system: System,
    nodes: list[int],
    repeats: int,
    steps: int,
    tokens: float | None = None,
    given: tuple[str, ...] = (),
) -> list[MeasuredJob]:
    """The campaign's jobs, the smallest first. Raises :class:`UserError` where one of them cannot be planned."""
    from aifactory_train.planning import keys_set, plan_for

    key = "train.batch_tokens" if recipe.train.batch_tokens else "train.batch_rows"
    batch = recipe.train.batch_tokens or recipe.train.batch_rows or 16
    ours = {key, "train.max_steps", *keys_set(ONLY_STEPS)}
    kept = tuple(text for text in given if text.partition("=")[0].strip() not in ours)
    found = []
    for n in nodes:
        sizes = {"strong": batch, "weak": batch * n // nodes[0]}
        for kinds in [("strong", "weak")] if n == nodes[0] else [("strong",), ("weak",)]:
            size = sizes[kinds[0]]
            train = recipe.train.model_copy(update={key.split(".")[1]: size, "max_steps": steps})
            scaled = recipe.model_copy(update={"train": train})
            plan, _ = plan_for(scaled, system, n, tokens=tokens, partition=system.user.partition, given=keys_set(given))
            limit = AROUND_S + SLACK * steps * plan["step_seconds"]["total"]
            settings = (*kept, f"{key}={size}", f"train.max_steps={steps}", *ONLY_STEPS)
            gpus = plan["gpus"] // n
            found.append(MeasuredJob(tuple(kinds), n, gpus, repeats, 60 * math.ceil(limit / 60), settings))
    return found


def check_cap(jobs: list[MeasuredJob], cap: float) -> float:
    """GPU-hours that the campaign can take at most; refuses more than the cap. It is hard because the scheduler ends
    each job at its limit and none is submitted or queued again."""
    most = sum(job.gpu_hours_most for job in jobs)
    if most > cap:
        largest = max(jobs, key=lambda job: job.gpu_hours_most)
        raise UserError(
            f"the campaign may take {most:,.1f} GPU-hours, the cap is {cap:,.1f} ({largest.name} alone may take "
            f"{largest.gpu_hours_most:,.1f})",
            where="--cap",
            fix="a larger cap, fewer --repeats, fewer --steps, or fewer --nodes",
        )
    return most


def write_campaign(
    folder: Path, recipe: str, site: str, jobs: list[MeasuredJob], cap: float, steps: int
) -> dict[str, Any]:
    """Write ``campaign.json`` into a new folder; returns its content."""
    if (folder / CAMPAIGN).exists():
        raise UserError(
            "holds a campaign already", where=str(folder), fix="another --folder; or 'aifactory scale FOLDER'"
        )
    planned = {
        "format": 1,
        "recipe": recipe,
        "site": site,
        "cap_gpu_hours": cap,
        "steps": steps,
        "jobs": [
            {
                "name": job.name,
                "kinds": list(job.kinds),
                "nodes": job.nodes,
                "gpus": job.nodes * job.gpus_per_node,
                "repeats": job.repeats,
                "limit_s": job.limit_s,
            }
            for job in jobs
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CAMPAIGN, planned)
    return planned


_SHAPE = {"format": int, "recipe": str, "site": str, "steps": int, "jobs": list}


def collect(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """``(scaling.json's content, names of jobs that measured nothing yet)``; refuses where nothing was measured."""
    planned = read_json(folder / CAMPAIGN, _SHAPE)
    speeds: dict[tuple[str, int, int], list[float]] = {}
    missing = []
    for job in planned["jobs"]:
        every = [_speed(path) for path in sorted((folder / job["name"]).glob("[0-9]*/metrics.jsonl"))]
        found = [speed for speed in every if speed is not None]
        if not found:
            missing.append(str(job["name"]))
            continue
        speeds |= {(kind, job["nodes"], job["gpus"]): found for kind in job["kinds"]}
    if not speeds:
        fix = "wait for the jobs ('aifactory status')"
        raise UserError(f"no run has made more than {WARM_UP} steps yet", where=str(folder), fix=fix)
    measured = {
        "format": 1,
        "recipe": planned["recipe"],
        "site": planned["site"],
        "date": datetime.date.today().isoformat(),
        "source": f"runs of {planned['steps']} steps below {folder.name}, the first {WARM_UP} not counted",
        "points": [_point(key, speeds) for key in sorted(speeds)],
    }
    return Campaign.model_validate(measured).model_dump(), missing


def _point(key: tuple[str, int, int], speeds: dict[tuple[str, int, int], list[float]]) -> dict[str, Any]:
    (kind, nodes, gpus), found = key, speeds[key]
    mean = sum(found) / len(found)
    first = min(other for other in speeds if other[0] == kind)
    base = sum(speeds[first]) / len(speeds[first]) / first[2]
    return {
        "kind": kind,
        "nodes": nodes,
        "gpus": gpus,
        "repeats": len(found),
        "tokens_per_s": mean,
        "spread": (max(found) - min(found)) / 2 / mean,
        "efficiency": mean / gpus / base,
    }


def _speed(path: Path) -> float | None:
    """Tokens of all ranks a second over the steps after the warm-up; None where there are none yet."""
    tokens = seconds = 0.0
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the last line of a run that was cut off
        if isinstance(row, dict) and row.get("kind") == "train" and row.get("step", 0) > WARM_UP:
            tokens += row["tokens"]
            seconds += row["seconds"]
    return tokens / seconds if seconds else None


def lines_of(jobs: list[MeasuredJob], recipe: str, site: str, folder: Path, more: list[str]) -> list[str]:
    """Each job as a line that can be pasted."""
    return [shlex.join(["aifactory", *job.words(recipe, site, folder, more)]) for job in jobs]


def node_counts(text: str) -> list[int]:
    """``1,2,4,8`` as numbers, ascending; refuses others."""
    if not re.fullmatch(r"\d+(,\d+)*", text) or min(map(int, text.split(","))) < 1:
        raise UserError("numbers of nodes such as 1,2,4,8", where=f"--nodes {text}")
    found = sorted(set(map(int, text.split(","))))
    if any(n % found[0] for n in found):
        raise UserError(f"each number has to be a multiple of the fewest, {found[0]}", where=f"--nodes {text}")
    return found
