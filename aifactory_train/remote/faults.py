"""What OpenSSH says, as one sentence with a fix; and certificates that are about to expire."""

from __future__ import annotations

import datetime
import re
import subprocess

from aifactory_train.core.errors import RunFailed, UserError
from aifactory_train.remote.known import Remote

#: A certificate with less than this many seconds left is told before it bites.
SOON_S = 900
_UNTIL = re.compile(r"Valid: .*?from \S+ to (\S+)")


def last(text: str) -> str:
    """The last line of what ssh printed."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "the connection was cut"


def explained(text: str, remote: Remote) -> UserError | None:
    """The error behind ssh's words; None where it is a cut, after which one may ask again."""
    host, lower = remote.host, text.lower()
    if "host identification has changed" in lower or "revoked host key" in lower:
        fix = f"ask the site whether its key changed; then: ssh-keygen -R {host.rpartition('@')[2]}, and connect once"
        return UserError("the host's key is another one than before; nothing was sent", where=host, fix=fix)
    if "host key verification failed" in lower or "host key is known" in lower:
        fix = f"connect once by hand and compare the fingerprint with the one that the site publishes: ssh {host}"
        return UserError("the host's key is not known here", where=host, fix=fix)
    if "permission denied" in lower or "too many authentication failures" in lower:
        return _denied(text, remote)
    for sign, what in (
        ("could not resolve hostname", "no such host"),
        ("connection refused", "nobody listens there"),
        ("no route to host", "the network does not lead there"),
        ("timed out", "no answer"),
    ):
        if sign in lower:
            return RunFailed(f"{what} ({last(text)})", where=host, fix="check name, port, --jump and your VPN")
    if "bad configuration option" in lower or "can't open user config" in lower or "no such identity" in lower:
        return UserError(last(text), where=remote.ssh_config or "~/.ssh/config")
    return None


def _denied(text: str, remote: Remote) -> UserError:
    ended = [(path, until) for path, until in certificates(remote) if until < datetime.datetime.now()]
    if ended:
        path, until = ended[0]
        fix = "fetch a new one as your site says, and ask again"
        return UserError(f"the certificate {path} expired at {until:%Y-%m-%d %H:%M}", where=remote.host, fix=fix)
    methods = re.search(r"Permission denied \(([^)]*)\)", text)
    offered = methods[1].split(",") if methods else []
    if "keyboard-interactive" in offered or "password" in offered:
        return UserError(
            "password or second factor was not accepted, or nobody was there to give it",
            where=remote.host,
            fix="ask again at a terminal; a code of a clock is refused where this machine's clock is wrong",
        )
    fix = f"try: ssh {remote.host}; is the key with the site, and loaded (ssh-add -l)?"
    return UserError("the site did not accept your key", where=remote.host, fix=fix)


def certificates(remote: Remote) -> list[tuple[str, datetime.datetime]]:
    """(file, end) of the certificates that ssh would show to this host; local time."""
    words = ["ssh", *(["-F", remote.ssh_config] if remote.ssh_config else []), "-G", "--", remote.host.split(":")[0]]
    listed = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout
    files = []
    for line in listed.splitlines():
        key, _, value = line.partition(" ")
        if key in ("identityfile", "certificatefile"):
            files.append(value if key == "certificatefile" else f"{value}-cert.pub")
    found = []
    for name in files:
        shown = subprocess.run(
            ["ssh-keygen", "-L", "-f", _expanded(name)], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        match = _UNTIL.search(shown.stdout) if shown.returncode == 0 else None
        if match:
            found.append((name, datetime.datetime.fromisoformat(match[1])))
    return found


def _expanded(path: str) -> str:
    import os

    return os.path.expanduser(path)


def expiring(remote: Remote) -> str | None:
    """A sentence where a certificate ends soon."""
    now = datetime.datetime.now()
    for path, until in certificates(remote):
        left = (until - now).total_seconds()
        if 0 < left < SOON_S:
            return f"the certificate {path} expires in {left / 60:.0f} min ({until:%H:%M})"
    return None
