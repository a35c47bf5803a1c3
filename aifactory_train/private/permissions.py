"""Who else can read a path. On shared file systems 'others' means every user of the machine."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_ACL = "system.posix_acl_access"
#: ACL tags that give someone else access: a named user, a named group.
_NAMED = {0x02: "user", 0x08: "group"}


@dataclass(frozen=True)
class Exposure:
    """Somebody else can read (or write) this path."""

    path: str
    who: str
    how: str
    fix: str

    def __str__(self) -> str:
        return f"{self.path} can be read by {self.who} ({self.how})"


def exposures(path: Path, *, allow_gid: int | None = None, below: bool = True) -> list[Exposure]:
    """What lets others at ``path`` (a file or folder) and, with ``below``, at what lies in it; the target of a link
    counts.

    A path whose parents cannot be passed by others is not exposed, whatever its own bits say. At most ten are named.
    """
    found: list[Exposure] = []
    try:
        real = path.resolve(strict=True)
    except OSError:
        return found
    for one, reach in _walk(real, reachable(real), below):
        found += _exposed(one, reach, allow_gid, shown=path if one == real else one)
        if len(found) >= 10:
            break
    return found[:10]


def reachable(path: Path) -> tuple[bool, bool]:
    """Whether (some group, others) can pass all the parents of ``path``."""
    reach = (True, True)
    for parent in path.parents:
        reach = _through(parent, reach)
    return reach


def _through(folder: Path, reach: tuple[bool, bool]) -> tuple[bool, bool]:
    """``reach`` of what lies in ``folder``."""
    try:
        mode = folder.stat().st_mode
    except OSError:
        return reach
    return reach[0] and bool(mode & (stat.S_IXGRP | stat.S_IXOTH)), reach[1] and bool(mode & stat.S_IXOTH)


def _walk(path: Path, reach: tuple[bool, bool], below: bool) -> Iterable[tuple[Path, tuple[bool, bool]]]:
    """``path`` and what lies below it, as far as anybody else could get."""
    yield path, reach
    if not below or not path.is_dir() or path.is_symlink():
        return
    inner = _through(path, reach)
    if any(inner):
        for child in sorted(path.iterdir()):
            yield from _walk(child, inner, below)


def _exposed(path: Path, reach: tuple[bool, bool], allow_gid: int | None, shown: Path) -> list[Exposure]:
    try:
        facts = path.stat()
    except OSError:
        return []
    group, others = reach
    found = []
    mode = facts.st_mode
    if others and mode & (stat.S_IROTH | stat.S_IWOTH):
        found.append(
            Exposure(
                str(shown), "every user of this machine", f"mode {stat.S_IMODE(mode):o}", f"chmod -R o-rwx {shown}"
            )
        )
    if group and mode & (stat.S_IRGRP | stat.S_IWGRP) and facts.st_gid != allow_gid:
        found.append(
            Exposure(
                str(shown),
                f"group {group_name(facts.st_gid)}",
                f"mode {stat.S_IMODE(mode):o}",
                f"chmod -R g-rwx {shown}, or allow the group with privacy.allow_group",
            )
        )
    found += [
        Exposure(str(shown), who, "access control list", f"setfacl -b {shown}")
        for who, gid in acl_entries(path)
        if gid is None or gid != allow_gid
    ]
    return found


def acl_entries(path: Path) -> list[tuple[str, int | None]]:
    """``(who, group id or None)`` of the named users and groups whom an access control list lets read or write."""
    try:
        raw = os.getxattr(path, _ACL)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOENT):
            return []
        raise
    if len(raw) < 4 or struct.unpack_from("<I", raw)[0] != 2:
        return [("unknown (an access control list of an unknown version)", None)]
    entries = [struct.unpack_from("<HHI", raw, at) for at in range(4, len(raw) - 7, 8)]
    mask = next((bits for tag, bits, _ in entries if tag == 0x10), 7)
    found: list[tuple[str, int | None]] = []
    for tag, bits, number in entries:
        if tag in _NAMED and bits & mask & 6:
            found.append((f"{_NAMED[tag]} {number}", number if tag == 0x08 else None))
    return found


def group_name(gid: int) -> str:
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)


def group_id(name: str) -> int | None:
    import grp

    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return int(name) if name.isdecimal() else None


def folder_mode() -> int:
    """The mode of a finished folder: what the umask leaves of 755."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o755 & ~mask
