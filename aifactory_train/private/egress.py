"""No connections but to the job's own nodes.

A Python audit hook sees every socket that Python code opens and every name or address it looks up, whichever library
asks. A child process is told by an environment variable, and guards itself as soon as it imports this package: workers
that multiprocessing spawns, and the processes that check an export. What is not bound: native code (NCCL and MPI open
their own sockets, on purpose, and a C extension could open others), other programs, and Python children that never
import this package or are given another environment; the record says so, and says whether this network namespace has a
way out at all.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

#: Reserved for documentation (RFC 5737): nobody's machine, so a guard that fails reaches no one.
_NOBODY = "192.0.2.1"

#: Tells child processes that they are guarded, and which nodes they may reach (names parted by commas).
VARIABLE = "AIFACTORY_EGRESS_NODES"

_allowed: set[str] | None = None  # None: the guard is open
_hooked = False
blocked = 0
blocked_by_test = 0  # of these, those that the self-test tried on purpose


class EgressBlocked(PermissionError):
    """A connection that the privacy profile does not allow."""


def close(nodes: Iterable[str] = ()) -> None:
    """From now on connections go to this host and ``nodes`` only. An audit hook cannot be taken away again."""
    global _allowed, _hooked
    nodes = [node for node in nodes if node]
    os.environ[VARIABLE] = ",".join(nodes)
    allowed = {"localhost", "localhost.localdomain", "", "0.0.0.0", "::", socket.gethostname(), socket.getfqdn()}
    for node in nodes:
        allowed.add(node)
        try:
            allowed |= {str(info[4][0]) for info in socket.getaddrinfo(node, None)}
        except OSError:
            continue  # a node that cannot be resolved cannot be reached either
    _allowed = allowed
    if not _hooked:
        sys.addaudithook(_hook)
        _hooked = True


def open_again() -> None:
    """Let everything through (tests)."""
    global _allowed
    _allowed = None
    os.environ.pop(VARIABLE, None)


def job_nodes(environment: dict[str, str] | None = None) -> list[str]:
    """Host names of this job, from the launcher's variables."""
    env = dict(os.environ) if environment is None else environment
    found = [env[k] for k in ("MASTER_ADDR",) if env.get(k)]
    found += expand(env.get("SLURM_JOB_NODELIST", ""))
    hosts = env.get("PBS_NODEFILE")
    if hosts and Path(hosts).is_file():
        found += Path(hosts).read_text(encoding="utf-8").split()
    return sorted(set(found))


def expand(nodelist: str) -> list[str]:
    """Slurm's ``nid[001-003,007],login1`` as names."""
    found: list[str] = []
    for part in re.findall(r"[^,\[\]]+(?:\[[^\]]*\][^,\[\]]*)?", nodelist):
        match = re.fullmatch(r"([^\[]*)\[([^\]]*)\](.*)", part)
        if not match:
            found.append(part)
            continue
        head, inner, tail = match.groups()
        for piece in inner.split(","):
            low, dash, high = piece.partition("-")
            if not dash:
                found.append(f"{head}{low}{tail}")
            elif low.isdecimal() and high.isdecimal() and int(high) - int(low) < 100_000:
                found += [f"{head}{n:0{len(low)}d}{tail}" for n in range(int(low), int(high) + 1)]
    return found


def _hook(event: str, args: tuple[Any, ...]) -> None:
    if _allowed is None or not event.startswith("socket."):
        return
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        address = args[1] if event == "socket.connect" or len(args) < 3 else args[-1]
        if isinstance(address, tuple) and address:
            _check(address[0])
    elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
        _check(args[0])
    elif event == "socket.getnameinfo":  # asks the name server of an address: whoever runs that learns what it holds
        _check(args[0][0] if isinstance(args[0], tuple) else args[0])


def _check(host: Any) -> None:
    """Loopback, this host and the job's nodes pass; anything else raises."""
    global blocked
    text = (
        host.decode("ascii", "replace") if isinstance(host, (bytes, bytearray)) else ("" if host is None else str(host))
    )
    assert _allowed is not None
    if text in _allowed:
        return
    if _is_loopback(text):
        return
    blocked += 1
    raise EgressBlocked("the privacy profile allows connections to the job's own nodes only")


def _is_loopback(text: str) -> bool:
    try:
        return ipaddress.ip_address(text.partition("%")[0]).is_loopback
    except ValueError:
        return False  # a name, not an address


def self_test() -> dict[str, Any]:
    """Try what must not work. ``ok`` is False if anything got through."""
    global blocked_by_test
    before = blocked
    attempts: dict[str, str] = {}
    for name, attempt in (
        ("connect", _try_connect),
        ("look up a name", _try_lookup),
        ("look up an address", _try_reverse),
        ("send a datagram", _try_datagram),
    ):
        try:
            attempt()
            attempts[name] = "NOT BLOCKED"
        except EgressBlocked:
            attempts[name] = "blocked"
        except OSError as error:
            attempts[name] = f"NOT BLOCKED by the guard (the system answered {type(error).__name__})"
    blocked_by_test += blocked - before
    return {
        "ok": all(v == "blocked" for v in attempts.values()),
        "attempts": attempts,
        "blocked_by_test": blocked - before,
        "way_out": way_out(),
        "limits": "binds Python code of this program and of its Python children; NCCL, MPI, other native code and "
        "other programs open their own sockets",
    }


def _try_connect() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.2)
        probe.connect((_NOBODY, 443))


def _try_lookup() -> None:
    socket.getaddrinfo("example.invalid", 443)


def _try_reverse() -> None:
    socket.getnameinfo((_NOBODY, 443), 0)


def _try_datagram() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.sendto(b"", (_NOBODY, 9))


def way_out() -> str:
    """Whether this network namespace has a default route, from the kernel's table."""
    try:
        routes = Path("/proc/net/route").read_text(encoding="ascii").splitlines()[1:]
    except OSError:
        return "unknown"
    if any(line.split()[1] == "00000000" for line in routes if len(line.split()) > 2):
        return "a default route exists: native code could leave this machine"
    return "no default route: nothing can leave this network namespace"
