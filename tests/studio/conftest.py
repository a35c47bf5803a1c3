"""A studio that listens, a browser's worth of requests to it, and what a page may hold."""

from __future__ import annotations

import http.client
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="extra: studio")

from aifactory_train.studio.server import StudioServer


class Browser:
    """Requests to a studio, with the cookie that its address gave."""

    def __init__(self, address: str):
        parts = urllib.parse.urlsplit(address)
        self.port, self.token = int(parts.port or 0), parts.query.partition("=")[2]
        self.own = f"http://127.0.0.1:{self.port}"
        self.cookie = ""

    def ask(self, method: str, path: str, body: bytes | str | None = None, **headers: str) -> http.client.HTTPResponse:
        """A request with these headers (``_`` for ``-``) and no others."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body=body, headers=named)
        return connection.getresponse()

    def enter(self) -> None:
        answer = self.ask("GET", f"/?token={self.token}")
        assert answer.status == 303, answer.read()
        self.cookie = answer.headers["Set-Cookie"].partition(";")[0]

    def get(self, path: str, **query: str) -> tuple[int, str]:
        asked = f"{path}?{urllib.parse.urlencode(query)}" if query else path
        answer = self.ask("GET", asked, Cookie=self.cookie)
        return answer.status, answer.read().decode()

    def post(self, path: str, **fields: str) -> tuple[int, str]:
        kind = "application/x-www-form-urlencoded"
        answer = self.ask(
            "POST", path, urllib.parse.urlencode(fields), Cookie=self.cookie, Origin=self.own, Content_Type=kind
        )
        return answer.status, answer.headers.get("Location") or answer.read().decode()


Opened = Callable[[Path], Browser]


@contextmanager
def studio_for(folder: Path) -> Iterator[Browser]:
    server = StudioServer(folder, 0)
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    browser = Browser(server.address)
    browser.enter()
    try:
        yield browser
    finally:
        server.stop()
        thread.join(20)


@pytest.fixture
def studio(tmp_path: Path) -> Iterator[Browser]:
    """A studio that works in ``tmp_path``."""
    with studio_for(tmp_path) as browser:
        yield browser


class Looked(HTMLParser):
    """What a browser would run, load or follow in a page."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.faults: list[str] = []
        self.links: list[str] = []
        self.forms: list[str] = []
        self.unlabelled: list[str] = []
        self.text = ""
        self._in: list[str] = []
        self._labels: set[str] = set()
        self._fields: list[str] = []
        self.feed(text)
        self.unlabelled = [name for name in self._fields if name not in self._labels]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self._in.append(tag)
        if tag in ("iframe", "object", "embed", "img", "base", "video", "audio", "style", "frame", "applet"):
            self.faults.append(f"<{tag}>")
        for name, value in given.items():
            if name.startswith("on") or name == "style":
                self.faults.append(f"{tag} {name}")
            if name in ("href", "src", "action", "formaction", "xlink:href", "data", "srcset", "poster"):
                if not (value.startswith(("/", "#")) and not value.startswith("//")) and value != "data:,":
                    self.links.append(value)
                if name in ("src", "formaction") and not value.startswith("/static/"):
                    self.faults.append(f"{tag} {name}={value}")
        if tag == "label":
            self._labels.add(given.get("for", ""))
        if tag in ("select", "textarea") or (tag == "input" and given.get("type") != "hidden"):
            self._fields.append(given.get("id", "nameless"))
        if tag == "form":
            self.forms.append(given.get("action", ""))

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in and self._in[-1] == "script" and data.strip():
            self.faults.append(f"inline script: {data[:40]}")

    def handle_endtag(self, tag: str) -> None:
        if tag in self._in:
            while self._in.pop() != tag:
                pass


def innocent(text: str, *, elsewhere: bool = False) -> Looked:
    """The page, which runs and loads nothing but the studio's own files; ``elsewhere``: links out are expected."""
    looked = Looked(text)
    assert looked.faults == [], looked.faults
    assert elsewhere or looked.links == [], looked.links
    assert all(link.startswith("https://") for link in looked.links), looked.links
    assert all(action.startswith("/") for action in looked.forms) and looked.unlabelled == [], looked.unlabelled
    return looked
