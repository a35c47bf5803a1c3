"""The sites that a user named: a small JSON file each, in the folder of the user's settings. No secret is in it."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aifactory_train.core.errors import UserError, did_you_mean
from aifactory_train.core.files import read_json, write_json
from aifactory_train.sites.finding import config_dir

NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,39}")
#: A host, an alias of ~/.ssh/config or an address, with a user before and a port behind where they are wanted.
HOST = re.compile(
    r"([A-Za-z0-9_][A-Za-z0-9._-]{0,63}@)?([A-Za-z0-9][A-Za-z0-9.-]{0,252}|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?"
)
#: The one folder there that holds everything of ours.
FOLDER = "~/aifactory-remote"
#: Paths that stand in batch scripts: what launchers refuse is refused here, before anything is made.
_PATH = re.compile(r"(~/|/)[A-Za-z0-9_./ -]{1,150}")


@dataclass(frozen=True)
class Remote:
    """How a site is reached. ``folder``: the one folder there; ``work``: where runs lie (None: in ``folder``)."""

    name: str
    host: str
    jump: str | None = None
    site: str | None = None
    folder: str = FOLDER
    work: str | None = None
    python: str | None = None
    ssh_config: str | None = None

    def checked(self) -> Remote:
        """This remote, or a UserError that names what cannot be used."""
        check_name(self.name)
        for flag, value in (("USER@HOST", self.host), *(("--jump", jump) for jump in (self.jump or "").split(","))):
            if (value or flag == "USER@HOST") and not HOST.fullmatch(value):
                fix = "user@host, user@host:port, or an alias of ~/.ssh/config"
                raise UserError(f"{value[:80]!r} is no host", where=flag, fix=fix)
        for flag, path in (("--folder", self.folder), ("--python", self.python), ("user.work_dir", self.work)):
            if path is not None and (not _PATH.fullmatch(path) or ".." in path.split("/") or path != path.strip()):
                fix = "an absolute path, or one that begins with ~/, of letters, digits, blanks and '_./-'"
                raise UserError(f"{path[:80]!r} cannot be used", where=flag, fix=fix)
        return self


def check_name(name: str) -> None:
    """Refuse what is no name of a remote: it becomes a file's name."""
    if not NAME.fullmatch(name):
        fix = "up to 40 small letters, digits, '.', '_' and '-', beginning with a letter or digit"
        raise UserError(f"{name[:80]!r} is not a name", where="NAME", fix=fix)


def folder() -> Path:
    return config_dir() / "remotes"


def names() -> list[str]:
    """Names of the remotes, sorted."""
    return sorted(path.stem for path in folder().glob("*.json"))


def load(name: str) -> Remote:
    """A remote by name; a UserError where there is none or its file is damaged."""
    check_name(name)
    path = folder() / f"{name}.json"
    if not path.is_file():
        known = names()
        fix = f"known: {', '.join(known)}" if known else "aifactory remote add NAME USER@HOST"
        raise UserError(f"no remote '{name}'{did_you_mean(name, known)}", where="--on", fix=fix)
    value = read_json(path, {"host": str, "folder?": str})
    fields = {field.name for field in dataclasses.fields(Remote)} - {"name"}
    given: dict[str, Any] = {
        key: text for key, text in value.items() if key in fields and (text is None or isinstance(text, str))
    }
    return Remote(name=name, **given).checked()


def save(remote: Remote) -> Path:
    path = folder() / f"{remote.checked().name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {key: value for key, value in dataclasses.asdict(remote).items() if key != "name"})
    return path


def forget(name: str) -> None:
    (folder() / f"{name}.json").unlink(missing_ok=True)
