"""``aifactory report RUN --serve``: the report of a live run, followed in a browser. Loopback only; it reads and never writes."""

from __future__ import annotations

import http.server
from typing import Any

from aifactory_train.record.files import load_record
from aifactory_train.report.build import build
from aifactory_train.run.folder import RunFolder


def make_server(run: RunFolder, port: int) -> http.server.ThreadingHTTPServer:
    """A server on 127.0.0.1; ``port`` 0 takes a free one."""
    load_record(run.path)  # a folder without a record is refused now, not at the first request

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            if host not in (
                "127.0.0.1",
                "localhost",
            ):  # another site's page must not read this one through its own name
                self.send_error(403)
            elif self.path == "/":
                self._answer(build(run, load_record(run.path), live=True).encode(), "text/html; charset=utf-8")
            elif self.path == "/state":
                self._answer(state(run).encode(), "text/plain; charset=utf-8")
            else:
                self.send_error(404)

        def _answer(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            return  # a request a few seconds apart is no news

    return http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler)


def state(run: RunFolder) -> str:
    """Changes whenever the page would: sizes and times of what it is made from."""
    parts = []
    for path in (run.metrics_file, run.path / "record.json", run.eval_file):
        try:
            stat = path.stat()
            parts.append(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}")
        except OSError:
            parts.append(f"{path.name}:-")
    return " ".join(parts)
