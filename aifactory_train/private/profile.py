"""Puts a recipe's privacy profile into force, once per process and before anything is read or written."""

from __future__ import annotations

import getpass
import os
import resource
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.config.loading import cache_dir
from aifactory_train.core.errors import UserError
from aifactory_train.private import egress, redact, vault
from aifactory_train.private.permissions import exposures, group_id

if TYPE_CHECKING:
    from aifactory_train.config.schema import Recipe

_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_MODE": "offline",
}
#: What was put into force in this process, for the record.
in_force: dict[str, Any] = {}


def enforce(recipe: Recipe, run_dir: Path | None = None) -> dict[str, Any]:
    """Enforce ``privacy.profile``; returns what was done and found, for the record. Raises :class:`UserError` naming
    what is open.

    ``open``: permissions are looked at and said, nothing is refused. ``sensitive``: umask 077, no core dumps, offline,
    egress guard with its self-test, messages without values, nothing telling on the command line or in the job's name,
    nobody else can read data, cache and outputs. ``restricted``: that, and every data source is encrypted, as are token
    cache, checkpoints and adapter.
    """
    profile = recipe.privacy.profile
    allow = _allowed_group(recipe)
    if profile == "open":
        if recipe.privacy.identity:
            _open_vault(recipe, run_dir, seal=False)
        return {
            "profile": profile,
            "warnings": [str(e) for p in _paths(recipe, run_dir) for e in exposures(p, below=False)][:5],
        }
    os.umask(0o027 if allow is not None else 0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ.update(_OFFLINE)
    redact.activate()
    _change_recipe(recipe, profile)
    _check_command_line(recipe)
    if profile == "restricted":
        _check_encrypted(recipe)
    if recipe.privacy.identity:
        _open_vault(recipe, run_dir, seal=profile == "restricted")
    _check_paths(recipe, run_dir, allow)
    if in_force.get("profile") == profile:
        return in_force  # the process is protected already; the recipe and its paths were looked at again above
    nodes = egress.job_nodes()
    egress.close(nodes)
    test = egress.self_test()
    if not test["ok"]:
        raise UserError(
            f"the egress guard's self-test failed: "
            f"{', '.join(k for k, v in test['attempts'].items() if v != 'blocked')} got through",
            where="privacy.profile",
        )
    in_force.clear()
    in_force.update(
        profile=profile,
        umask=oct(0o027 if allow is not None else 0o077),
        allow_group=recipe.privacy.allow_group,
        core_dumps="off",
        egress={**test, "allowed_nodes": nodes},
        redaction="messages, warnings and other libraries' logs without values",
        encrypted="data, token cache, checkpoints and adapter" if profile == "restricted" else "no",
        node=_exclusive(),
        checkpoints="weights and optimizer state, "
        + ("encrypted" if profile == "restricted" else "not encrypted, readable by the user alone"),
    )
    return in_force


def _allowed_group(recipe: Recipe) -> int | None:
    name = recipe.privacy.allow_group
    if name is None:
        return None
    gid = group_id(name)
    if gid is None:
        raise UserError(f"there is no group '{name}' here", where="privacy.allow_group")
    return gid


def _change_recipe(recipe: Recipe, profile: str) -> None:
    """Settings that would write texts of rows in readable form."""
    if not recipe.privacy.log_samples or profile == "restricted":
        recipe.eval.samples = 0
    if recipe.logging.row_ids and profile == "restricted":
        raise UserError(
            "row ids in metrics.jsonl tell which rows there are",
            where="logging.row_ids",
            fix="--set logging.row_ids=false",
        )
    if recipe.tracking.wandb:
        raise UserError(
            "W&B's files hold host and account names", where="tracking.wandb", fix="use TensorBoard or tracking.mlflow"
        )
    if recipe.export.merge and profile == "restricted":
        raise UserError(
            "merged weights are written unencrypted",
            where="export.merge",
            fix="--set export.merge=false; where they may be plain, aifactory export RUN --merge under the profile "
            "sensitive",
        )
    if recipe.adapter.kind == "none" and profile == "restricted":
        raise UserError(
            "all weights are trained and would be exported unencrypted",
            where="adapter.kind",
            fix="--set adapter.kind=lora: adapters and checkpoints are written encrypted",
        )
    if recipe.model.trust_remote_code:
        raise UserError(
            "code from a model's repository is not run beside sensitive data", where="model.trust_remote_code"
        )


def _check_command_line(recipe: Recipe) -> None:
    """Command lines and job names are seen by every user of a cluster (squeue, sacct, ps)."""
    names = {Path(s.source).name for s in [*recipe.data.train, *(recipe.data.eval or [])]}
    names |= {s.source for s in [*recipe.data.train, *(recipe.data.eval or [])]}
    names |= {s.name for s in [*recipe.data.train, *(recipe.data.eval or [])] if s.name}
    exposed = [n for n in names if len(n) > 2 and any(n in word for word in sys.argv[1:])]
    if exposed:
        raise UserError(
            "the name of a data source stands on the command line, where every user of the machine can read it",
            where="command line",
            fix="put data.train into the recipe file (mode 600)",
        )
    job = os.environ.get("SLURM_JOB_NAME", "") + " " + os.environ.get("PBS_JOBNAME", "")
    if any(len(n) > 2 and n in job for n in names):
        raise UserError(
            "the job's name tells the name of a data source", where="job name", fix="use the run's id as job name"
        )


def _check_encrypted(recipe: Recipe) -> None:
    if not recipe.privacy.identity:
        raise UserError("the profile restricted needs the identity that opens the data", where="privacy.identity")
    for role, listed in (("train", recipe.data.train), ("eval", recipe.data.eval or [])):
        for number, source in enumerate(listed):
            path = Path(source.source)
            plain = [p for p in path.rglob("*") if p.is_file() and not vault.is_encrypted(p)] if path.is_dir() else []
            if (not path.is_dir() and not vault.is_encrypted(path)) or plain:
                raise UserError(
                    "is not encrypted, and the profile restricted reads encrypted data only",
                    where=f"data.{role}.{number}.source",
                    fix="aifactory private encrypt FILE --to RECIPIENT, on the machine where the data is allowed to "
                    "be plain",
                )
            if source.converter:
                raise UserError(
                    "converters open files themselves and cannot read encrypted ones",
                    where=f"data.{role}.{number}.converter",
                    fix="convert first, then encrypt the rows",
                )


def _open_vault(recipe: Recipe, run_dir: Path | None, *, seal: bool) -> None:
    path = Path(str(recipe.privacy.identity)).expanduser()
    if run_dir is not None and path.resolve().is_relative_to(run_dir.resolve()):
        raise UserError(
            "the identity lies in the run folder, beside what it opens",
            where="privacy.identity",
            fix="keep it elsewhere",
        )
    vault.activate(vault.Vault.from_identity(path), seal=seal)


def _paths(recipe: Recipe, run_dir: Path | None) -> list[Path]:
    """Local data, the token cache and the run folder, as far as they exist."""
    found = [Path(s.source) for s in [*recipe.data.train, *(recipe.data.eval or [])]]
    found.append(cache_dir() / "prepared")
    if run_dir is not None:
        found.append(run_dir)
    if recipe.privacy.identity:
        found.append(Path(recipe.privacy.identity).expanduser())
    return [p for p in found if p.exists()]


def _check_paths(recipe: Recipe, run_dir: Path | None, allow: int | None) -> None:
    for path in _paths(recipe, run_dir):
        open_to = exposures(path, allow_gid=allow)
        if open_to:
            more = f" (and {len(open_to) - 1} more)" if len(open_to) > 1 else ""
            raise UserError(
                f"can be read by {open_to[0].who} ({open_to[0].how}){more}; the profile {recipe.privacy.profile} "
                f"refuses that",
                where=open_to[0].path,
                fix=open_to[0].fix,
            )


def _exclusive() -> str:
    """Whether other users' processes can be on this node: memory and command lines are only as private as the node."""
    import shutil
    import subprocess

    job = os.environ.get("SLURM_JOB_ID", "")
    program = shutil.which("scontrol")
    if not job.isdigit() or program is None:
        return f"no batch job: other users of this machine may see this process (user {getpass.getuser()})"
    done = subprocess.run([program, "show", "job", job], capture_output=True, text=True, timeout=30, check=False)
    if "OverSubscribe=NO" in done.stdout:
        return "exclusive: the job has its nodes to itself"
    return "shared: other jobs may run on the node; ask for whole nodes (--exclusive)"
