"""``aifactory report RUN --serve``: the report of a live run, followed in a browser. It reads and never writes.

Loopback only, which on a login node is every user of the machine: so the address holds a secret that is printed once.
The first visit with it leaves a cookie, and goes on to the address without it.
"""

from __future__ import annotations

import hmac
import http.cookies
import http.server
import secrets
import urllib.parse
from typing import Any

from aifactory_train.core.errors import UserError
from aifactory_train.record.files import load_record
from aifactory_train.report.build import build
from aifactory_train.report.page_parts import page
from aifactory_train.run.folder import RunFolder


class ReportServer(http.server.ThreadingHTTPServer):
    """The server, and what opens it: ``address`` for a browser."""

    def __init__(self, port: int, handler: type[http.server.BaseHTTPRequestHandler]):
        super().__init__(("127.0.0.1", port), handler)
        self.token = secrets.token_urlsafe(24)
        self.cookie = f"aifactory-report-{self.server_address[1]}"  # browsers keep one jar for all ports

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/?token={self.token}"


def make_server(run: RunFolder, port: int) -> ReportServer:
    """A server on 127.0.0.1; ``port`` 0 takes a free one. Its ``address`` is for the caller's eyes alone."""
    load_record(run.path)  # a folder without a record is refused now, not at the first request

    class Handler(http.server.BaseHTTPRequestHandler):
        server: ReportServer

        def do_GET(self) -> None:
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            if host not in (
                "127.0.0.1",
                "localhost",
            ):  # another site's page must not read this one through its own name
                self.send_error(403)
                return
            asked = split(self.path)
            if asked.path == "/" and self._is_token(urllib.parse.parse_qs(asked.query).get("token", [""])[0]):
                self._let_in()
            elif not self._has_cookie():
                self.send_error(403, explain="Open the address that 'aifactory report --serve' printed.")
            elif self.path == "/":
                self._answer(live_page(run).encode(errors="replace"), "text/html; charset=utf-8")
            elif self.path == "/state":
                self._answer(state(run).encode(), "text/plain; charset=utf-8")
            else:
                self.send_error(404)

        def _is_token(self, given: str) -> bool:
            return hmac.compare_digest(given.encode(errors="replace"), self.server.token.encode())

        def _has_cookie(self) -> bool:
            try:
                found = http.cookies.SimpleCookie(self.headers.get("Cookie", "")).get(self.server.cookie)
            except http.cookies.CookieError:
                return False
            return found is not None and self._is_token(found.value)

        def _let_in(self) -> None:
            self.send_response(303)
            self.send_header("Location", "/")
            self.send_header("Set-Cookie", f"{self.server.cookie}={self.server.token}; Path=/; HttpOnly; SameSite=Lax")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("Cache-Control", "no-store")
            self.send_header("Content-Length", "0")
            self.end_headers()

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

    return ReportServer(port, Handler)


def split(address: str) -> urllib.parse.SplitResult:
    """The parts of what was asked for; nothing where it is no address, such as ``http://[``."""
    try:
        return urllib.parse.urlsplit(address)
    except ValueError:
        return urllib.parse.urlsplit("")


def live_page(run: RunFolder) -> str:
    """The report now; where the record is damaged, a page that says so and goes on looking."""
    try:
        return build(run, load_record(run.path), live=True)
    except UserError as error:
        return page("damaged.html.j2", "damaged record", live=True, error=str(error))


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
