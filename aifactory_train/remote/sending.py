"""What a command needs over there of what lies here: the recipe, its rows, the user's values for the site."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aifactory_train.core.errors import UserError
from aifactory_train.core.output import note
from aifactory_train.remote.calling import THERE
from aifactory_train.remote.connection import Connection
from aifactory_train.remote.known import Remote
from aifactory_train.remote.transfer import Parcel, push

if TYPE_CHECKING:
    import argparse

    from aifactory_train.config.schema import Recipe

#: Keys of files and folders that are not rows; a recipe that names one of these cannot be sent yet.
_ELSEWHERE = (
    "model.start_from",
    "record.organisation",
    "record.sign_with",
    "privacy.identity",
    "model.vocabulary.text",
)


def prepared(connection: Connection, args: argparse.Namespace, words: list[str]) -> list[str]:
    """``words`` with what lies here replaced by what was sent there. Raises UserError where data may not go there."""
    remote, parcels = connection.remote, list[Parcel]()
    words = list(words)
    if getattr(args, "recipe", None) and isinstance(args.recipe, str) and not getattr(args, "resume", False):
        parcels, words = _recipe(remote, args, words)
    if remote.site is not None and _takes_site(args):
        if args.site not in (None, remote.site):
            raise UserError(f"{remote.name} is a login of {remote.site}", where="--site", fix="leave --site out")
        if args.site is None:
            words = _added(words, ["--site", remote.site])
    overlay = _overlay(remote, args)
    if overlay is not None:
        path = _place(hashlib.sha256(overlay.read_bytes()).hexdigest(), "site.yaml")
        parcels.append(Parcel(path, overlay))
        words = _added(_without(words, "--site-file"), ["--site-file", f"{THERE}/{path}"])
    sent = push(connection, parcels)
    if sent:
        note(f"sent {len(parcels)} file(s), {sent / 1e6:,.2f} MB")
    return words


def _takes_site(args: argparse.Namespace) -> bool:
    # `fetch` without --site fills the cache of the one folder, which jobs read where there is no work folder
    return hasattr(args, "site") and (args.command != "fetch" or args.site is not None or args.site_file is not None)


def _place(digest: str, name: str) -> str:
    return f"sent/{digest}/{name}"


def _added(words: list[str], more: list[str]) -> list[str]:
    """Options behind the others, and before ``--``, behind which none is one."""
    at = words.index("--") if "--" in words else len(words)
    return [*words[:at], *more, *words[at:]]


def _without(words: list[str], option: str) -> list[str]:
    out, skip = [], False
    for word in words:
        if skip or word == option:
            skip = not skip
            continue
        if not word.startswith(f"{option}="):
            out.append(word)
    return out


def _overlay(remote: Remote, args: argparse.Namespace) -> Path | None:
    from aifactory_train.sites.finding import user_file

    given = getattr(args, "site_file", None)
    if given:
        if not Path(given).is_file():
            raise UserError("no such file", where=f"--site-file {given}")
        return Path(given)
    return user_file(remote.site) if remote.site and _takes_site(args) else None


def _recipe(remote: Remote, args: argparse.Namespace, words: list[str]) -> tuple[list[Parcel], list[str]]:
    """The recipe and its local rows: a file lies there under its digest, named by ``--set`` behind the user's."""
    from aifactory_train.config.loading import find_recipe, load_recipe
    from aifactory_train.sources import licences
    from aifactory_train.sources.resolving import resolve_data

    recipe = load_recipe(args.recipe, licences.overrides(args))
    allowed(remote, recipe)
    _refuse_other_files(recipe)
    parcels: list[Parcel] = []
    settings: list[str] = []
    for part in ("train", "eval"):
        for number, source in enumerate(getattr(recipe.data, part) or []):
            if not os.path.isabs(source.source):
                continue  # of a hub or a package: fetched there
            path = resolve_data(source)
            files, there = _rows(path)
            parcels += files
            settings += ["--set", f"data.{part}.{number}.source={THERE}/{there}"]
            settings += ["--set", f"data.{part}.{number}.licence={source.licence}"]  # another source has another
    if os.path.isabs(recipe.model.base):
        fix = "name a base of a hub or a package; it is fetched there: aifactory fetch RECIPE --on " + remote.name
        raise UserError("a base model of this machine is not sent", where="model.base", fix=fix)
    if args.recipe.endswith((".yaml", ".yml")):
        file = find_recipe(args.recipe)
        data = file.read_bytes()
        # Its id comes from the file's name, which may hold anything: it is said, not repeated.
        path_there = _place(hashlib.sha256(data).hexdigest(), "recipe.yaml")
        parcels.append(Parcel(path_there, data))
        settings += ["--set", f"id={recipe.id}"]
        words = _replaced(words, args.recipe, f"{THERE}/{path_there}")
    return parcels, _added(words, settings)


def _replaced(words: list[str], old: str, new: str) -> list[str]:
    """``words`` with the positional ``old`` replaced: the last word of that text that no option takes."""
    places = [i for i, word in enumerate(words) if word == old and (i == 0 or words[i - 1] not in ("--set", "--env"))]
    if not places:
        raise UserError("the recipe must stand as a word of its own", where=old)
    return [*words[: places[0]], new, *words[places[0] + 1 :]]


def _rows(path: Path) -> tuple[list[Parcel], str]:
    """Files of one source and its place there. Names of single files are not kept: they may hold anything."""
    if path.is_file():
        parcel = Parcel("", path)
        suffix = "".join(s for s in path.suffixes[-2:] if s[1:].isalnum() and len(s) <= 12)
        there = _place(parcel.digest(), f"rows{suffix}")
        return [Parcel(there, path)], there
    files = sorted(p for p in path.rglob("*") if p.is_file())
    digests = {p: Parcel("", p).digest() for p in files}
    listing = "".join(f"{p.relative_to(path)} {digests[p]}\n" for p in files)
    there = _place(hashlib.sha256(listing.encode()).hexdigest(), "rows")
    return [Parcel(f"{there}/{p.relative_to(path)}", p) for p in files], there


def _refuse_other_files(recipe: Recipe) -> None:
    for key in _ELSEWHERE:
        value: Any = recipe
        for part in key.split("."):
            value = getattr(value, part, None)
        if isinstance(value, str) and os.path.isabs(value) and os.path.exists(value):
            raise UserError("a file of this machine is not sent", where=key, fix="leave it out of what runs there")


def allowed(remote: Remote, recipe: Recipe) -> None:
    """Refuse sensitive rows for a site whose profile does not say that they may go there."""
    profile = recipe.privacy.profile
    if profile == "open":
        return
    if remote.site is None:
        fix = "aifactory remote add … --site SYSTEM, whose profile says what may go there"
        raise UserError(f"rows are {profile}, and which site {remote.name} is, is not said", where="--on", fix=fix)
    from aifactory_train import sites

    system = sites.load(remote.site)
    rule = system.data.sensitive
    if rule not in ("allowed", "agreement"):
        said = system.data.sensitive_rule or "its profile does not say whether they may go there"
        fix = "a site that allows it: aifactory where RECIPE --sensitive"
        raise UserError(
            f"rows are {profile}; {system.name}: {said}; nothing was sent", where="privacy.profile", fix=fix
        )
    if rule == "agreement":
        note(f"{system.name} takes {profile} rows under an agreement: {system.data.sensitive_rule or ''}")
