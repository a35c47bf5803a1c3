"""The network interface of this node that gloo is to use: prints its name, or nothing where gloo's own choice is as
good.

NCCL takes prefixes (``ib``), exact names (``=ib0``) and exclusions (``^docker,lo``); gloo takes names of interfaces and
nothing else, and by itself the address that the host's name resolves to, which may be the loopback. So every rank looks
at its own node at the start and picks the first interface that is up, has an address and fits what NCCL was given. The
reason goes to standard error. Standard library only; runs on whatever Python a host has, before torch is imported.
"""

# ruff: noqa: UP031 - runs on the Python 3.6 of old hosts, as attempt.py does

import argparse
import collections
import contextlib
import os
import re
import socket
import struct
import sys

#: An interface of this node: its name, its addresses as text (``families`` of them: 4, 6), and whether it is up and a
#: loopback.
Interface = collections.namedtuple("Interface", "name addresses up loopback")

FAMILIES = {"AF_INET": 4, "AF_INET6": 6}


def interfaces():
    """All interfaces of this node, in the system's order."""
    import fcntl

    six = collections.defaultdict(list)  # type: dict
    with contextlib.suppress(OSError), open("/proc/net/if_inet6") as file:  # no such file: a kernel without IPv6
        for line in file:
            words = line.split()
            if words[3] != "20":  # link-local addresses reach nobody without a scope
                six[words[5]].append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(words[0])))
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                flags = struct.unpack("H", fcntl.ioctl(probe.fileno(), 0x8913, request)[16:18])[0]  # SIOCGIFFLAGS
            except OSError:
                continue  # gone since it was listed
            try:
                four = [socket.inet_ntoa(fcntl.ioctl(probe.fileno(), 0x8915, request)[20:24])]  # SIOCGIFADDR
            except OSError:
                four = []  # no IPv4 address
            # Up and running: a cable or fabric is there, not only the configuration.
            found.append(Interface(name, four + six[name], flags & 0x41 == 0x41, bool(flags & 0x8)))
    return found


def fits(name, pattern):
    """Whether NCCL would take the interface ``name`` under ``NCCL_SOCKET_IFNAME=pattern``."""
    return _position(name, pattern) is not None


def _position(name, pattern):
    """Where in the list ``pattern`` the interface's name is met: 0 for every one that a list of exclusions leaves, None
    without.
    """
    exclude = pattern.startswith("^")
    rest = pattern[1:] if exclude else pattern
    exact = rest.startswith("=")
    words = [word.partition(":")[0].strip() for word in (rest[1:] if exact else rest).split(",")]
    for number, word in enumerate(words):
        if word and (name == word if exact else name.startswith(word)):
            return None if exclude else number
    return 0 if exclude else None


def usable(one, family):
    """Whether gloo could bind to it: up, and with an address of the family (None: any)."""
    return one.up and any(family is None or family == (6 if ":" in a else 4) for a in one.addresses)


def choose(pattern, found, family=None):
    """The first usable interface that fits the pattern, in the order of the pattern and then by number; None without
    one.
    """
    ranked = []
    for one in found:
        position = _position(one.name, pattern)
        if position is None or not usable(one, family):
            continue
        if one.loopback and one.name not in re.split("[,=]", pattern):
            continue  # nobody means the loopback with a list of exclusions
        ranked.append((position, [int(n) for n in re.findall(r"\d+", one.name)], one.name))
    return min(ranked)[2] if ranked else None


def own_addresses():
    """What the name of this host resolves to, which is what gloo binds to by itself; empty where it does not
    resolve.
    """
    try:
        return sorted({entry[4][0] for entry in socket.getaddrinfo(socket.gethostname(), None)})
    except OSError:
        return []


def towards(address, found):
    """The interface from which ``address`` (a name or number) is reached, by the address that the kernel would send
    from.
    """
    try:
        entries = socket.getaddrinfo(address, 9, 0, socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return None
    for kind, _, _, _, where in entries:
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect(where)  # datagrams: nothing is sent
            except OSError:
                continue
            source = probe.getsockname()[0]
        for one in found:
            if source in one.addresses and not one.loopback:
                return one.name
    return None


def decide(environment, pattern, nodes, found):
    """(value of GLOO_SOCKET_IFNAME or None, why) for a rank with this environment; ``pattern`` is the profile's, or
    empty.
    """
    given = environment.get("GLOO_SOCKET_IFNAME", "")
    names = {one.name for one in found}
    if given and all(word in names for word in given.split(",")):
        return given, "GLOO_SOCKET_IFNAME as it was given"
    asked = given or environment.get("NCCL_SOCKET_IFNAME", "") or pattern
    family = FAMILIES.get(environment.get("NCCL_SOCKET_FAMILY") or environment.get("GLOO_SOCKET_FAMILY") or "")
    why = "no interface is named for this site"
    if asked:
        name = choose(asked, found, family)
        if name:
            return name, "the first interface that is up and fits '%s'" % asked
        seen = ", ".join(one.name for one in found if usable(one, family)) or "none"
        why = "no interface that is up with an address fits '%s' (there are: %s)" % (asked, seen)
    if nodes == 1:
        return None, why + "; the ranks of one node need none"
    own = own_addresses()
    if own and not all(a.startswith("127.") or a == "::1" for a in own):
        return None, "%s; gloo binds to what this host's name resolves to (%s)" % (why, ", ".join(own))
    name = towards(environment.get("MASTER_ADDR", ""), found)
    resolved = "%s; this host's name resolves to %s, which other nodes cannot reach" % (
        why,
        ", ".join(own) or "nothing",
    )
    if name:
        return name, resolved + "; the interface that leads to MASTER_ADDR"
    return None, resolved + ", and no interface leads to MASTER_ADDR: set GLOO_SOCKET_IFNAME"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--pattern", default="", help="what the profile says, in NCCL's notation")
    args = parser.parse_args(argv)
    value, why = decide(os.environ, args.pattern, args.nodes, interfaces())
    print("gloo: %s: %s" % (value or "GLOO_SOCKET_IFNAME is left as it is", why), file=sys.stderr)
    if value:
        print(value)
    return 0


if __name__ == "__main__":
    sys.exit(main())
