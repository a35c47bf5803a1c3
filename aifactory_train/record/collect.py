"""What the program knows about a run when it starts, as sections of the record. Everything else is ``MISSING
(who)``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train import __version__
from aifactory_train.config.source_spec import has_revisions
from aifactory_train.core.missing import missing
from aifactory_train.record import aiact
from aifactory_train.record.chain import canonical, now
from aifactory_train.record.people import PEOPLE
from aifactory_train.sites.schedulers import SCHEDULERS
from aifactory_train.sources import remote_code

if TYPE_CHECKING:
    from aifactory_train.config.data_blocks import DataSource
    from aifactory_train.config.schema import Recipe

RECORD_VERSION = "1.0"


def versions() -> dict[str, str]:
    """Versions of what decides a training's arithmetic, of those that are installed."""
    found = {"python": platform.python_version(), "aifactory-train": __version__}
    for name in (
        "torch",
        "triton",
        "transformers",
        "peft",
        "tokenizers",
        "safetensors",
        "numpy",
        "deepspeed",
        "bitsandbytes",
        "flash-attn",
    ):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def code() -> dict[str, Any]:
    """Version, commit and state of the program that trains."""
    root = Path(__file__).resolve().parents[2]
    found: dict[str, Any] = {"package": "aifactory-train", "version": __version__, "git": None, "dirty": None}
    if (root / ".git").exists():
        try:
            commit = subprocess.run(
                ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
            )
            state = subprocess.run(
                ["git", "-C", str(root), "status", "--porcelain", "-uno"],
                capture_output=True,
                text=True,
                timeout=10,
                check=False,
            )
            if commit.returncode == 0:
                found["git"] = commit.stdout.strip()
                found["dirty"] = bool(state.stdout.strip()) if state.returncode == 0 else None
        except (OSError, subprocess.TimeoutExpired):
            found["git"] = None  # no git here: the version stands alone
    return found


def scheduler() -> dict[str, Any]:
    """The scheduler whose job this process is part of, from the variables that it gives to jobs."""
    env = os.environ
    for name, known in SCHEDULERS.items():
        seen = known.variables
        if seen is not None and seen.job in env:
            found: dict[str, Any] = {"name": name, "job_ids": [env[seen.job]]}
            for key, variable in (("cluster", seen.cluster), ("partition", seen.partition)):
                found[key] = env.get(variable) if variable else None
            if seen.nodes:
                found["nodes"] = int(env.get(seen.nodes, "1"))
            return found
    return {"name": "none", "job_ids": []}


def container() -> dict[str, Any]:
    """The container image that the process runs in, if it says so; its digest is computed later, beside the
    training.
    """
    path = os.environ.get("APPTAINER_CONTAINER") or os.environ.get("SINGULARITY_CONTAINER")
    if path:
        return {"image": Path(path).name, "path": path, "sha256": missing("the digest was still being computed")}
    if os.environ.get("AIFACTORY_IMAGE"):
        return {"image": os.environ["AIFACTORY_IMAGE"], "sha256": missing("site: the image's digest")}
    return {"image": None, "sha256": None}


def site_name(recipe: Recipe, folder: Path) -> str | None:
    """The site that the recipe, the launcher or the plan of this run names."""
    named = recipe.record.site or os.environ.get("AIFACTORY_SITE")
    if named:
        return named
    try:
        plan = json.loads((folder / "plan.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    site = plan.get("site") if isinstance(plan, dict) else None
    return site if isinstance(site, str) else None


def run_section(recipe: Recipe, folder: Path, *, private: bool) -> dict[str, Any]:
    run_id = folder.resolve().name
    who = hashlib.sha256(f"{run_id}|{os.getuid()}|{platform.node()}".encode()).hexdigest()[:16]
    return {
        "id": run_id,
        "record_version": RECORD_VERSION,
        "recipe": recipe.id,
        "title": recipe.about.title,
        "created": now(),
        "host_site": site_name(recipe, folder) or missing("user: record.site"),
        "scheduler": scheduler(),
        "user_hash": who,  # not the name: records are passed on
        "code": code(),
        "versions": versions(),
        "container": container(),
        "config_sha256": config_digest(recipe),
        "seed": recipe.train.seed,
        "determinism": "same curve for any split into ranks; bitwise only on the same hardware and number of ranks",
        "privacy_profile": recipe.privacy.profile,
        "command": "withheld (privacy profile)" if private else " ".join(["aifactory", *sys.argv[1:]]),
    }


def config_digest(recipe: Recipe) -> str:
    from aifactory_train.config.loading import to_tree

    return hashlib.sha256(canonical(to_tree(recipe))).hexdigest()


def base_section(recipe: Recipe, config: dict[str, Any], parameters: int, trainable: int) -> dict[str, Any]:
    """The base model, from its own files and the shipped table of training compute."""
    adapter = recipe.adapter.kind != "none"
    pretrain = aiact.base_of(recipe.model.base, recipe.record.base_flop)
    licence = recipe.model.licence
    return {
        "id": recipe.model.base,
        "revision": (recipe.model.revision if has_revisions(recipe.model.base) else None) or "as fetched",
        "start_from": recipe.model.start_from,
        "licence": licence if licence != "unknown" else missing("base model's provider: licence"),
        "params_total": parameters - trainable if adapter and not recipe.adapter.train_embeddings else parameters,
        "architecture": (config.get("architectures") or [config.get("model_type", "unknown")])[0],
        "model_type": config.get("model_type"),
        "layers": config.get("num_hidden_layers"),
        "hidden_size": config.get("hidden_size"),
        "vocabulary": config.get("vocab_size"),
        "context": config.get("max_position_embeddings"),
        "pretrain": {"flop": pretrain.flop, "source": pretrain.source},
        "remote_code": remote_code.recorded(recipe),
        "public_summary_url": missing("base model's provider: link to its public summary of training content"),
        "files": missing("the digests were still being computed"),
    }


def method_section(recipe: Recipe, parameters: int, trainable: int) -> dict[str, Any]:
    from aifactory_train.config.objective import objective  # here: it needs torch, and a record is read without

    adapter = recipe.adapter
    lora = adapter.kind != "none"
    goldfish = recipe.methods.goldfish
    return {
        "kind": adapter.kind if lora else "full",
        "quantised_base": adapter.quantise_base,
        "trainable_params": trainable,
        "params_with_adapters": parameters,
        "rank": adapter.rank if lora else None,
        "alpha": adapter.alpha if lora else None,
        "dropout": adapter.dropout if lora else None,
        "targets": adapter.targets if lora else None,
        "objective": objective(recipe),
        "goldfish": goldfish.model_dump() if goldfish else False,
        "dp": None,
    }


def hparams_section(
    recipe: Recipe, *, world_size: int, engine: str, precision: str, total_steps: int, choices: list
) -> dict[str, Any]:
    train = recipe.train
    return {
        "learning_rate": train.learning_rate,
        "schedule": train.schedule,
        "warmup": train.warmup_steps if train.warmup_steps is not None else f"{train.warmup_ratio:g} of the steps",
        "batch": {"rows": train.batch_rows, "tokens": train.batch_tokens},
        "micro_batch_tokens": train.micro_batch_tokens,
        "grad_accum": train.grad_accum,
        "epochs": train.epochs,
        "steps": total_steps,
        "max_len": recipe.data.sequence_length,
        "packing": recipe.data.batching,
        "precision": precision,
        "optimiser": train.optimizer,
        "betas": list(train.betas),
        "weight_decay": train.weight_decay,
        "clip": train.max_grad_norm,
        "activation_checkpointing": recipe.parallel.activation_checkpointing,
        "parallelism": {"engine": engine, "ranks": world_size, "tensor": 1, "pipeline": 1},
        "choices": [{"what": w, "choice": c, "why": y} for w, c, y in choices],
    }


_OWED = {
    "origin": "data owner: origin (data.train.N.facts.origin)",
    "personal_data": "data owner: personal data? (facts.personal_data)",
    "tdm_basis": "data owner: basis for text and data mining (facts.tdm_basis)",
    "obtained": "data owner: how the rows were obtained and selected (facts.obtained)",
    "collected_from": "data owner: start of collection (facts.collected_from)",
    "collected_to": "data owner: latest collection, MM/YYYY (facts.collected_to)",
    "url": "data owner: link or 'not public' (facts.url)",
}


def data_sections(recipe: Recipe, report: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per source, in the order of the recipe, from the report of the preparation and the recipe's facts."""
    listed: list[tuple[str, DataSource]] = [("train", s) for s in recipe.data.train]
    listed += [("eval", s) for s in recipe.data.eval or []]
    found = report.get("sources", [])
    sections = []
    for number, (role, source) in enumerate(listed):
        facts = found[number] if number < len(found) else {}
        given = source.facts.model_dump()
        sections.append(
            {
                "name": facts.get("name") or source.name or source.source,
                "source": source.source,
                "revision": source.revision,
                "role": role,
                "modality": "text",
                "languages": list(recipe.about.languages) or missing("data owner: languages (about.languages)"),
                "licence": source.licence
                if source.licence != "unknown"
                else missing("data owner: licence (data.train.N.licence)"),
                **{key: given[key] if given[key] is not None else missing(who) for key, who in _OWED.items()},
                "converter": source.converter,
                "format": facts.get("format"),
                "sha256": facts.get("sha256"),
                "rows": facts.get("rows"),
                "documents": facts.get("documents"),
                "tokens": facts.get("tokens"),
                "weight": source.weight,
                "pipeline": pipeline(recipe, facts),
                "encrypted": source.source.endswith((".age", ".aft")),
            }
        )
    return sections


def pipeline(recipe: Recipe, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """What was done to the rows of one source, with counts."""
    counts = facts.get("counts", {})
    steps = [{"step": "read and validate", "params": {"format": facts.get("format")}, "out": facts.get("rows")}]
    steps.append(
        {
            "step": "render and tokenise",
            "params": {"sequence_length": recipe.data.sequence_length, "long_documents": recipe.data.long_documents},
            "in": facts.get("rows"),
            "out": facts.get("documents"),
            "counts": counts,
            **{key: facts[key] for key in ("template", "control_tokens") if facts.get(key)},
        }
    )
    return steps


def sets_section(report: dict[str, Any]) -> dict[str, Any]:
    """What became of all sources together: duplicates, split, overlap, the sets and their digests."""
    return {
        key: report[key]
        for key in (
            "rows",
            "unused",
            "split",
            "duplicates",
            "overlap",
            "languages",
            "fertility",
            "own",
            "sets",
            "digests",
        )
        if key in report
    }


def people_section() -> dict[str, Any]:
    return {key: missing(who) for key, (who, _) in PEOPLE.items()}
