"""Who may ask the studio: the browser that opened the printed address, on a page of the studio itself.

Loopback is every user of a login node, and every page in the browser can send requests to it. So the address holds a
secret, which the first visit turns into a cookie that other sites' pages are not given; the Host must be our own (a
name of another site that leads here is none), and what changes something must come from a page of ours.
"""

from __future__ import annotations

import hmac
import secrets
import urllib.parse
from html import escape

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import cookie_parser
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

#: Everything is ours and lies in files: no inline script or style, nothing from elsewhere, in nobody's frame.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",  # with no-referrer, browsers would send forms with the Origin 'null'
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
_SAFE = ("GET", "HEAD")


class Door:
    """Lets requests through to ``app``, or refuses them with 403."""

    def __init__(self, app: ASGIApp, *, port: int, token: str):
        self.app, self.token = app, token
        self.session = secrets.token_urlsafe(32)  # so that the cookie does not tell the token
        self.cookie = f"aifactory-studio-{port}"  # browsers keep one jar for all ports
        self.hosts = {f"127.0.0.1:{port}", f"localhost:{port}"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # nothing here speaks another protocol

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        answer = self.answer(scope["method"], scope["path"], scope.get("query_string", b""), Headers(scope=scope))
        await (self.app if answer is None else answer)(scope, receive, with_headers)

    def answer(self, method: str, path: str, query: bytes, headers: Headers) -> Response | None:
        """What is answered without asking the pages: a refusal, or the cookie for the token. None: let through."""
        host = headers.get("host", "")
        if host not in self.hosts:
            return PlainTextResponse("refused: this name is not the studio's\n", 403)
        origin = headers.get("origin")
        if origin != f"http://{host}" and (origin is not None or method not in _SAFE):
            return PlainTextResponse("refused: the request comes from another page\n", 403)
        given = urllib.parse.parse_qs(query.decode("latin-1")).get("token", [""])[0]
        if method == "GET" and path == "/" and _same(given, self.token):
            return self._let_in(headers.get("sec-fetch-site", "none"))
        if not _same(cookie_parser(headers.get("cookie", "")).get(self.cookie, ""), self.session):
            return PlainTextResponse("refused: open the address that 'aifactory studio' printed\n", 403)
        return None

    def _let_in(self, came_from: str) -> Response:
        """The cookie, and on to the address without the secret. Where another page led here, a redirection would not
        be given the cookie: it would still be that page's request."""
        if came_from in ("cross-site", "same-site"):
            text = '<!doctype html><html lang="en"><title>aifactory studio</title>'
            text += '<meta http-equiv="refresh" content="0; url=/"><p><a href="/">aifactory studio</a></p></html>'
            answer: Response = HTMLResponse(text)
        else:
            answer = Response(status_code=303, headers={"Location": "/"})
        answer.set_cookie(self.cookie, self.session, httponly=True, samesite="strict", path="/")
        return answer


def _same(given: str, known: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), known.encode())


def opener(address: str) -> str:
    """A page that leads to ``address``: a browser is started with its file, because the words of a process are seen by
    everybody on the machine."""
    target = escape(address, quote=True)
    return f'<!doctype html><html lang="en"><meta http-equiv="refresh" content="0; url={target}"></html>'
