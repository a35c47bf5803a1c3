"""Where fetched models and data lie at a site: for the jobs that read them and for ``aifactory fetch --site``, which
puts them there.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from aifactory_train.core.errors import UserError
from aifactory_train.launchers import request as rq
from aifactory_train.sites.profiles import System

#: Below the root: this program's cache, and Hugging Face's.
OURS, HUGGING_FACE = "aifactory-cache", "hf"
#: What lies in ours; each item is put there whole, by whoever needs it first.
KINDS = ("packages", "models", "hub", "manifests", "vocabulary", "prepared")


def cache_root(system: System, shared: bool = False) -> str | None:
    """The folder above both caches: the project's shared one, the one that ``user.cache`` names, else your work folder.

    shared: the project's, whatever the site file says. ``None``: nothing is named, and the home folder is used. Raises
    UserError where the shared one is wanted and not known, or lacks your project's name.
    """
    named = system.user.cache
    if shared or named == "shared":
        return _shared(system)
    return str(rq.path(named, "user.cache")) if named else system.user.work_dir


def hugging_face_folder(system: System) -> str:
    """The Hugging Face cache of a job: the one of the launching shell, else beside ours, else that of the home."""
    named = os.environ.get("HF_HOME")
    if named:
        return named
    root = cache_root(system)
    return f"{root}/{HUGGING_FACE}" if root else str(Path.home() / ".cache" / "huggingface")


def _shared(system: System) -> str:
    template = system.data.model_cache
    if template is None:
        ask = system.data.unknown.get("model_cache")
        raise UserError(
            f"where a project of {system.name} may keep one cache for all its members is not published"
            + (f"; ask: {ask}" if ask else ""),
            where="data.model_cache",
            fix="user.cache: FOLDER in your site file, which the members of your project agree on",
        )
    values = {"account": system.user.account, "project": system.user.project, "user": os.environ.get("USER")}
    lacking = [name for name in re.findall(r"\{(\w+)\}", template) if not values.get(name)]
    if lacking:
        raise UserError(
            f"the shared cache of {system.name} lies in {template}, and {lacking[0]} is not known",
            where=f"user.{lacking[0]}",
            fix=f"user.{lacking[0]} in your site file (~/.config/aifactory/sites/{system.id}.yaml)",
        )
    return str(rq.path(template.format(**values), "data.model_cache"))


def make_shared(root: str, system: System) -> None:
    """Make the folders of a shared cache for the project's group to read and write; refused where the root is not."""
    if not Path(root).is_dir():
        raise UserError(
            f"{root} is not on this machine: the shared cache is filled at {system.name}",
            where="--shared",
            fix=f"call it on a login node of {system.name}",
        )
    for name in (OURS, *(f"{OURS}/{kind}" for kind in KINDS), HUGGING_FACE, f"{HUGGING_FACE}/hub"):
        folder = Path(root) / name
        try:
            folder.mkdir(exist_ok=True)
            if folder.stat().st_uid == os.getuid():
                folder.chmod(0o2770)  # what is made inside belongs to the group of the project
        except OSError as error:
            raise UserError(f"cannot be made: {error.strerror}", where=str(folder)) from None
