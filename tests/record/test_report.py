"""The report: one small file that asks nobody for anything, right at any length, fit for readers of all kinds."""

from __future__ import annotations

import http.client
import itertools
import json
import math
import os
import re
import shutil
import socket
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aifactory_train.cli import main
from aifactory_train.core.errors import UserError
from aifactory_train.record.files import load_record
from aifactory_train.report import build
from aifactory_train.report.compare import compare_page, find_runs, row
from aifactory_train.report.serve import make_server
from aifactory_train.report.svg import BUCKETS, duration, reduce, short, ticks


class Reader(HTMLParser):
    """What a browser would look at: ids, links, everything that could load something."""

    def __init__(self, text: str):
        super().__init__()
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                self.references.append(value or "")

    def handle_data(self, data):
        self.text += data


def test_it_is_whole_and_loads_nothing(tell):
    run = tell()
    text = (run.path / "report.html").read_text()
    page = Reader(text)
    assert len(page.ids) == len(set(page.ids))
    outside = [r for r in page.references if not r.startswith(("#", "data:", "evidence/"))]
    assert outside == []
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org)", text)
    assert "default-src 'none'" in text and 'lang="en"' in text and "viewport" in text
    assert page.tags.count("h1") == 1 and page.tags.count("svg") >= 5
    for words in (
        "Held-out evaluation",
        "Attempts",
        "Data card",
        "Where each choice came from",
        "The door is red.",
        "one-third",
    ):
        assert words in page.text, words
    levels = [int(t[1]) for t in page.tags if re.fullmatch(r"h[1-6]", t)]
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))


def test_hostile_texts_stay_texts(tell):
    run = tell({"about.title": "<script>alert(1)</script>", "about.languages": ['"><img src=x>']})
    text = build(run, load_record(run.path))
    assert "<script>alert" not in text and "<img" not in text and "&lt;script&gt;alert(1)" in text


def test_100_000_steps_stay_under_2_mb(tell):
    run = tell()
    with open(run.metrics_file, "w") as file:
        for step in range(1, 100_001):
            loss = 1000.0 if step == 77_777 else 5.0 / step**0.1
            file.write(
                f'{{"kind":"train","step":{step},"loss":{loss},"grad_norm":{0.1 + step % 7 / 10},"learning_rate":{1e-3 * (1 - step / 1e5)},'  # noqa: E501
                f'"tokens_per_s":{1e5 + step % 1000},"tokens":4096,"supervised_tokens":2048,"seconds":0.04,"memory_bytes":{2**30}}}\n'  # noqa: E501
            )
    text = build(run, load_record(run.path))
    assert len(text.encode()) < 2_000_000, len(text)
    assert "largest 1k" in text  # one spike among 100,000 steps is not averaged away


def test_a_run_that_has_just_begun(tell):
    from .conftest import attempt

    run = tell(story=lambda run, recipe: attempt(run, recipe, 0, 0, number=1, how="stopped"))
    text = build(run, load_record(run.path))
    assert "No step is finished yet" in text and "Nothing was evaluated yet" in text


def test_protected_runs_show_no_samples(tell):
    run = tell()
    record = load_record(run.path)
    record["run"]["privacy_profile"] = "sensitive"
    text = build(run, record)
    assert "The door is red." not in text and "withheld" in text


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000))
def test_reducing_keeps_ends_and_extremes(values):
    points = reduce(range(len(values)), values)
    assert len(points) <= BUCKETS + 1
    assert min(p[2] for p in points) == min(values) and max(p[3] for p in points) == max(values)
    assert points[-1][0] == len(values) - 1
    assert [p[0] for p in points] == sorted(p[0] for p in points)


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_are_few_and_inside(low, width):
    width = max(width, 1e-9 * abs(low))  # an axis of less is what the next test is for
    found = ticks(low, low + width)
    assert 1 <= len(found) <= 12 and found == sorted(found)
    slack = width * 1e-6 + 8 * math.ulp(abs(low) + width)  # each tick is the sum of a few rounded numbers
    assert all(low - slack <= t <= low + width + slack for t in found)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.0), (3.5, 3.5), (9e8, math.nextafter(9e8, 1e9)), (-1e9, -1e9)])
def test_ticks_of_almost_nothing_end(low, high):
    assert 1 <= len(ticks(low, high)) <= 12


def test_short_numbers():
    assert [short(x) for x in (0, 0.5, 1234, 2.5e6, 3e-7)] == ["0", "0.5", "1.23k", "2.5M", "3e-7"]
    assert [duration(x) for x in (12, 120, 7200, 200_000)] == ["12 s", "2 min", "2 h", "2.31 d"]


# ---- live


def test_serve_follows(tell):
    run = tell()
    server = make_server(run, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host, port = server.server_address[:2]
    assert host == "127.0.0.1"

    def ask(path: str, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        connection.request("GET", path, headers=headers)
        return connection.getresponse()

    def get(path: str, **headers: str) -> tuple[int, str]:
        answer = ask(path, **{"Cookie": cookie, **headers})
        return answer.status, answer.read().decode()

    try:
        cookie = f"{server.cookie}=guessed"
        for path in ("/", "/state", "/?token=", "/?token=guessed", "/state?token=" + server.token):
            assert get(path)[0] == 403 and ask(path).status == 403  # everybody on this machine reaches the port
        first = ask(server.address.partition(str(port))[2])
        assert first.status == 303 and first.headers["Location"] == "/"
        cookie = first.headers["Set-Cookie"].partition(";")[0]
        assert "HttpOnly" in first.headers["Set-Cookie"] and len(server.token) >= 32
        assert ask(f"/?token={server.token}", Host="evil.example").status == 403
        status, page = get("/")
        assert status == 200 and "setInterval(news" in page and "connect-src 'self'" in page
        before = get("/state")[1]
        with open(run.metrics_file, "a") as file:
            file.write(json.dumps({"kind": "train", "step": 9, "loss": 0.123, "seconds": 1.0, "tokens": 5}) + "\n")
        assert get("/state")[1] != before
        assert "0.123" in get("/")[1]
        assert get("/../../etc/passwd")[0] == 404
        with socket.create_connection(("127.0.0.1", port), timeout=20) as raw:  # an address that no client would send
            raw.sendall(b"GET http://[/ HTTP/1.0\r\nHost: 127.0.0.1:1\r\n\r\n")
            assert b" 403 " in raw.recv(100)
        assert get("/", Host="evil.example")[0] == 403  # another site's page cannot read this one
        for damage in (
            "{",
            "[]",
            "{}",
            '{"log": {"events": 1, "head_sha256": 2}, "compute": {"attempts": 7}, "data": [1]}',
        ):
            (run.path / "record.json").write_text(damage)
            status, page = get("/")
            assert status == 200 and "No report now" in page and "record.json" in page, damage
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("port", ["99999", "-1"])
def test_a_port_that_none_is_is_refused(tell, port, capsys):
    assert main(["report", str(tell().path), "--serve", "--port", port]) == 2
    assert f"--port: port {port} cannot be used: ports are 0 to 65535" in capsys.readouterr().err


# ---- several runs


def test_compare(tell, tmp_path):
    tell(name="one"), tell({"train.learning_rate": 1e-3}, name="two")
    runs = find_runs(tmp_path / "runs", [])
    rows = [row(r) for r in runs]
    assert {r["run"] for r in rows} == {"one", "two"} and rows[0]["bits_per_byte_after"] == 2.6
    assert rows[0]["kwh"] is None  # not measured here: nothing, not zero
    page = Reader(compare_page(runs, rows))
    assert page.references == ["data:,", "#main"] and "not recorded" in page.text
    with pytest.raises(UserError, match="holds no runs"):
        find_runs(tmp_path / "nowhere", [])


def test_commands(tell, tmp_path, capsys, monkeypatch):
    from aifactory_train.cli import main

    run = tell()
    monkeypatch.chdir(tmp_path)

    def one_line() -> dict:
        out = capsys.readouterr().out
        assert out.count("\n") == 1
        return json.loads(out)

    assert main(["report", "run", "--json"]) == 0
    reported = one_line()
    assert (
        reported["run"]["id"] == "run" and reported["log"]["head_sha256"] == load_record(run.path)["log"]["head_sha256"]
    )
    assert main(["verify", "run", "--json"]) == 0
    assert {k: v for k, v in one_line().items() if k in ("ok", "faults")} == {"ok": True, "faults": []}
    path = run.path / "export" / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert main(["verify", "run", "--json"]) == 1
    faults = one_line()["faults"]
    assert [f["where"] for f in faults] == ["export/adapter/adapter_model.safetensors"]
    assert main(["record", "sign", str(run.path)]) == 2  # no key
    assert "aifactory record key" in capsys.readouterr().err
    assert main(["record", "key"]) == 0 and main(["record", "sign", "run"]) == 2
    assert "nothing was signed" in capsys.readouterr().err  # a changed file must not be signed as if it were whole
    assert main(["record", "show", "run", "--missing", "--json"]) == 0
    assert any(e["place"] == "people/contact" for e in one_line())
    assert main(["runs", "--json"]) == 0
    capsys.readouterr()
    assert main(["report", "run", "--html"]) == 0


# ---- in a browser


@pytest.mark.slow
def test_in_chromium(tell, tmp_path):
    """No console errors, no requests, no accessibility fault that axe-core knows, no sideways scrolling; light and
    dark, desktop and phone. Screenshots go to $AIFACTORY_SCREENSHOTS."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    modules = Path(os.environ.get("AIFACTORY_NODE_MODULES", Path(__file__).parent / "node_modules"))
    if not (chromium and shutil.which("node") and (modules / "axe-core").is_dir()):
        assert not os.environ.get("AIFACTORY_REQUIRE_BROWSER"), "chromium, node or axe-core is missing"
        pytest.skip("needs chromium, node and: npm install --ignore-scripts --prefix tests/record")
    out = Path(os.environ.get("AIFACTORY_SCREENSHOTS", tmp_path / "shots"))
    out.mkdir(parents=True, exist_ok=True)
    one = tell(name="one")
    page = tmp_path / "compare.html"
    page.write_text(compare_page([one], [row(one)]))
    urls = [(one.path / "report.html").as_uri(), page.as_uri()]
    script = Path(__file__).with_name("browser.mjs")
    done = subprocess.run(
        ["node", str(script), chromium, str(modules), str(out), *urls],
        capture_output=True,
        text=True,
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.strip().splitlines()[-1])
    assert len(seen) == 8
    for visit in seen:
        where = f"{visit['url']} {visit['scheme']} {visit['size']}"
        assert visit["errors"] == [] and visit["requests"] == [], where
        assert visit["violations"] == [], (where, visit["violations"])
        assert visit["overflow"] <= 0 and visit["small"] == 0, where
        assert visit["outputs"] == visit["filled"] and visit["passes"] > 20, where
