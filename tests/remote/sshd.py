"""A real OpenSSH server on loopback: port, host key, user key and configuration of its own, in a temporary folder."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

INSTALL = "apt-get install --no-install-recommends openssh-server"
BINARY = shutil.which("sshd", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


def require() -> None:
    """Skip the test where sshd is not installed; fail it where the environment says that it must be there."""
    if BINARY is None or shutil.which("ssh") is None:
        message = f"OpenSSH's server is not installed here; {INSTALL}"
        if os.environ.get("AIFACTORY_REQUIRE_SSHD") == "1":
            pytest.fail(message, pytrace=False)
        pytest.skip(message)


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@dataclass
class Server:
    """A login node: ``bin`` comes first on its PATH, ``home`` is where everything of a test lies."""

    base: Path
    port: int
    config: Path
    bin: Path
    home: Path
    user: str = field(default_factory=getpass.getuser)

    @property
    def host(self) -> str:
        return f"{self.user}@127.0.0.1"

    def log(self) -> str:
        return (self.base / "sshd.log").read_text(errors="replace")

    def logins(self) -> int:
        """Authentications that succeeded."""
        return self.log().count("Accepted publickey")

    def client(self, name: str, port: int | None = None, extra: str = "") -> Path:
        """A configuration of ssh for this server, through ``port`` where a proxy stands before it."""
        known = f"{self.base}/known_hosts"
        path = self.base / f"{name}.conf"
        path.write_text(
            f"{extra}\nHost *\n  Port {port or self.port}\n  HostKeyAlias sshd.test\n  UserKnownHostsFile {known}\n"
            f"  GlobalKnownHostsFile /dev/null\n  StrictHostKeyChecking yes\n  IdentitiesOnly yes\n"
            f"  IdentityFile {self.base}/user\n  IdentityAgent none\n"
        )
        return path


def keys(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)


@contextlib.contextmanager
def server(base: Path, more: str = "", environment: dict[str, str] | None = None) -> Iterator[Server]:
    for name in ("bin", "home"):
        (base / name).mkdir(parents=True)
    keys(base / "host")
    keys(base / "user")
    keys(base / "authority")
    shutil.copy(base / "user.pub", base / "authorized")
    (base / "known_hosts").write_text(f"sshd.test {(base / 'host.pub').read_text()}")
    port = free_port()
    path = f"{base}/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    settings = {"PATH": path, "AIFACTORY_CONFIG": f"{base}/home/config", **(environment or {})}
    (base / "sshd.conf").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {base}/host\nPidFile {base}/sshd.pid\nStrictModes no\n"
        f"AuthorizedKeysFile {base}/authorized\nTrustedUserCAKeys {base}/authority.pub\nPasswordAuthentication no\n"
        f"KbdInteractiveAuthentication no\nUsePAM no\nLogLevel VERBOSE\nMaxStartups 100\nMaxSessions 50\n"
        f"PermitRootLogin yes\nSetEnv {' '.join(f'{k}={v}' for k, v in settings.items())}\n{more}\n"
    )
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    assert BINARY is not None
    words = [BINARY, "-D", "-f", str(base / "sshd.conf"), "-E", str(base / "sshd.log")]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    made = Server(base, port, base / "sshd.conf", base / "bin", base / "home")
    try:
        end = time.time() + 20
        while process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert time.time() < end, made.log()
            time.sleep(0.05)
        assert process.poll() is None, made.log()
        made.client("plain")
        yield made
    finally:
        process.terminate()
        process.wait()


class CuttingProxy:
    """Passes bytes to a port and cuts each connection after so many of them; ``None``: never."""

    def __init__(self, target: int):
        self.target, self.after, self.cuts = target, None, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self.listener.getsockname()[1])
        self.after: int | None
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            left = [self.after]
            self.after = None  # one cut at a time: what comes after it gets through
            lock = threading.Lock()
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pass, args=(source, sink, left, lock), daemon=True).start()

    def _pass(self, source: socket.socket, sink: socket.socket, left: list[int | None], lock: threading.Lock) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                with lock:
                    if left[0] is not None:
                        data, left[0] = data[: left[0]], left[0] - len(data)
                    ended = left[0] is not None and left[0] <= 0
                sink.sendall(data)
                if ended:
                    self.cuts += 1
                    break
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.listener.close()


PYTHON = os.path.realpath(sys.executable)
