"""From a name to the file of its profile. A factory, antenna, host or country is no system: the refusal names its
systems.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.sites.catalogue import SYSTEMS
from aifactory_train.sites.index import load_index
from aifactory_train.sites.reading import read_yaml


def config_dir() -> Path:
    """Where users keep overlays and private profiles: ``$AIFACTORY_CONFIG`` or ``$XDG_CONFIG_HOME/aifactory``."""
    own = os.environ.get("AIFACTORY_CONFIG")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    return Path(base) / "aifactory"


def user_file(name: str) -> Path | None:
    path = config_dir() / "sites" / f"{name}.yaml"
    return path if path.is_file() else None


@functools.lru_cache(maxsize=1)
def shipped() -> tuple[str, ...]:
    """Ids of the profiles in ``systems/``, usable or not."""
    return tuple(sorted(p.stem for p in SYSTEMS.glob("*.yaml")))


def find_file(name: str) -> Path:
    """The file of a system id or alias; refuses others with what is near."""
    if name in shipped():
        return SYSTEMS / f"{name}.yaml"
    private = user_file(name)
    if private is not None:
        raw = read_yaml(private)
        if isinstance(raw, dict) and "schema" in raw:
            return private
    index = load_index()
    for system in index["systems"]:
        if name.lower() in (system["id"], system["name"].lower(), *[a.lower() for a in system["aliases"]]):
            return SYSTEMS / f"{system['id']}.yaml"
    member = find_member(name, index)
    if member is not None:
        raise no_system(member, name)
    here = members_at(name, index)
    operated = [s["id"] for s in index["systems"] if s["operator"].lower() == name.lower() and s["status"] == "usable"]
    if here or operated:
        systems = list(dict.fromkeys([s for m in here for s in m["systems"]] + operated))
        if not systems:
            raise no_system(here[0], name)
        kind = (
            "a country"
            if any(name.lower() in (m["country"].lower(), m["country_name"].lower()) for m in here)
            else "a host"
        )
        raise UserError(
            f"'{name}' is {kind}, not a system", where="--site", fix=f"one of its systems: {', '.join(systems)}"
        )
    raise UserError(
        f"unknown site '{name}'{_nearest(name, index)}",
        where="--site",
        fix="'aifactory sites' lists all 32 with their systems",
    )


def _nearest(name: str, index: dict[str, Any]) -> str:
    """Did-you-mean over systems, factories, hosts and countries, saying which kind was meant."""
    words: dict[str, str] = {}
    for s in index["systems"]:
        for word in (s["id"], s["name"], *s["aliases"]):
            words.setdefault(word.lower(), s["id"])
        words.setdefault(s["operator"].lower(), f"{s['operator']}' (host of {s['id']})")
    for m in index["members"]:
        for word in (m["id"], m["name"]):
            words.setdefault(word.lower(), m["id"])
        words.setdefault(m["host"].lower(), f"{m['host']}' (host of {m['id']})")
        words.setdefault(m["country_name"].lower(), f"{m['country_name']}' (country of {m['id']})")
    close = difflib.get_close_matches(name.lower(), words, n=1, cutoff=0.6)
    if not close:
        return ""
    target = words[close[0]]
    return f" (did you mean '{target})" if "' (" in target else f" (did you mean '{target}'?)"


def find_member(name: str, index: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """The factory or antenna of that id or name, or None."""
    index = index or load_index()
    key = re.sub(r"[^a-z0-9]+", "", name.lower())
    for member in index["members"]:
        if key in (re.sub(r"[^a-z0-9]+", "", member["id"]), re.sub(r"[^a-z0-9]+", "", member["name"].lower())):
            return member
    return None


def members_at(name: str, index: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    """The members whose host or country (name or two letters) that is."""
    index = index or load_index()
    key = name.lower()
    return [m for m in index["members"] if key in (m["host"].lower(), m["country"].lower(), m["country_name"].lower())]


def no_system(member: dict[str, Any], name: str) -> UserError:
    """The refusal for a member's name where a system is needed: its own systems, else its linked ones."""
    if member["systems"]:
        return UserError(
            f"'{name}' is an {member['kind']}, not a system"
            if member["kind"] == "antenna"
            else f"'{name}' is a factory, not a system",
            where="--site",
            fix=f"one of its systems: {', '.join(member['systems'])}",
        )
    linked = member.get("linked_systems") or []
    fix = (
        f"its linked factories run {', '.join(linked)}" if linked else "ask its contact point; nothing is invented here"
    )
    return UserError(
        f"{member['name']} has no system that can be used today: {member['reason']}", where="--site", fix=fix
    )
