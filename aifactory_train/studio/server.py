"""The studio as a server of this machine alone."""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
import threading
import webbrowser
from collections.abc import Callable
from pathlib import Path

import uvicorn

from aifactory_train.core.errors import UserError
from aifactory_train.studio.app import make_app
from aifactory_train.studio.door import opener

HOST = "127.0.0.1"


class StudioServer:
    """A server that listens already; ``address`` is for its user's eyes alone."""

    def __init__(self, folder: Path, port: int):
        self._socket = _listen(port)
        self.port = int(self._socket.getsockname()[1])
        token = secrets.token_urlsafe(24)
        self.address = f"http://{HOST}:{self.port}/?token={token}"
        config = uvicorn.Config(
            make_app(folder, port=self.port, token=token),
            http="h11",
            ws="none",
            lifespan="off",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,  # pages that follow a run never end by themselves
        )
        self._server = uvicorn.Server(config)

    def serve(self) -> None:
        """Answer until Ctrl-C, or :meth:`stop`."""
        self._server.run(sockets=[self._socket])

    def stop(self) -> None:
        self._server.should_exit = True


def _listen(port: int) -> socket.socket:
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((HOST, port))
        made.listen(128)  # whoever reads the address may come at once
    except (OSError, OverflowError) as error:
        made.close()
        why = getattr(error, "strerror", None) or "ports are 0 to 65535"
        raise UserError(f"port {port} cannot be used: {why}", where="--port", fix="--port 0 takes a free one") from None
    return made


def open_browser(address: str) -> Callable[[], None]:
    """Open the user's browser soon; returns what takes the file away that leads it to ``address``."""
    handle, name = tempfile.mkstemp(suffix=".html", prefix="aifactory-studio-")  # readable by this user alone
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(opener(address))
    threading.Thread(target=webbrowser.open, args=(Path(name).as_uri(),), daemon=True).start()
    return lambda: Path(name).unlink(missing_ok=True)
