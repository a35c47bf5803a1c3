"""The pages Run and Results: trainings as processes of their own, followed live, and what became of them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from markupsafe import Markup
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response, StreamingResponse

from aifactory_train.config.loading import recipe_ids
from aifactory_train.core.errors import UserError
from aifactory_train.core.files import object_or_nothing, reading
from aifactory_train.core.secrets import without_secrets
from aifactory_train.evaluation.verdict import Verdict
from aifactory_train.launchers.follow import status_of
from aifactory_train.record.files import load_record
from aifactory_train.report import page_parts
from aifactory_train.report.build import build, held_out
from aifactory_train.report.compare import compare_page, row
from aifactory_train.run.folder import RunFolder
from aifactory_train.studio import calls
from aifactory_train.studio.calls import Call, text_of
from aifactory_train.studio.live import Follower
from aifactory_train.studio.pages import desk_of, form_of, go, html, lines_of, page, said

#: Seconds between looks at a run, and between signs of life to a browser whose run says nothing.
_EVERY_S, _ALIVE_S = 1.0, 15.0
#: Characters of a training's output that are shown.
_LOG = 6000
#: What a run can be exported as: value, name, options of ``aifactory export``.
EXPORTS: dict[str, tuple[str, dict[str, str | bool]]] = {
    "adapter": ("adapter or weights, for transformers, peft and vLLM", {}),
    "merged": ("merged weights, for anything that reads a model folder", {"merge": True}),
    "gguf": ("GGUF, for llama.cpp, Ollama and LM Studio", {"format": "gguf"}),
}
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f]")


# ---- run


async def run_page(request: Request) -> Response:
    """The trainings of this folder, a form that starts one, and one of them, live."""
    return await run_in_threadpool(_run, request)


def _run(request: Request, values: dict[str, str] | None = None, refused: str | None = None) -> Response:
    desk, asked = desk_of(request), request.query_params
    name = "" if values is not None else asked.get("run", "")
    shown: dict[str, Any] = {
        "title": "Run",
        "values": values or {"recipe": asked.get("recipe", ""), "name": _name_for(asked.get("recipe", ""))},
        "recipes": desk.recipes(),
        "installed": recipe_ids(),
        "runs": desk.runs(),
        "run": name,
        "now": "",
        "charts": {},
        "log": "",
    }
    commands = []
    if name:
        _followed(request, name)
        news = _news(request, name, _follower(request, name))
        shown |= {"now": Markup(news["status"]), "log": news["log"], "state": news["state"]}
        shown["charts"] = {key: Markup(text) for key, text in news["charts"].items()}
        commands = [Call.of(word, name) for word in ("status", "logs", "stop")]
        config = desk.run(name).config_file
        if config.is_file():
            commands.append(_resume(desk.shown(config), name))
    return page(request, "run", calls=commands, refused=refused, status=400 if refused else 200, **shown)


def _name_for(recipe: str) -> str:
    return re.sub(r"[^\w.-]+", "-", Path(recipe).stem).strip("-.") if recipe else ""


async def start_run(request: Request) -> Response:
    """``aifactory train``, as a process that does not belong to the studio."""
    values, desk = await form_of(request), desk_of(request)
    name = text_of(values, "name")
    log = desk.log(name)
    if name in await run_in_threadpool(desk.runs):
        refused = f"there is a run '{name}' already\n  fix: another name, or resume it on its page"
        return await run_in_threadpool(_run, request, values, refused)
    call = Call.of("train", desk.recipe(text_of(values, "recipe")), name=name, set=lines_of(values, "set"))
    request.app.state.started[name] = calls.start(call, desk.root, log)
    return go("/run", run=name)


async def stop_run(request: Request) -> Response:
    """``aifactory stop``"""
    values, desk = await form_of(request), desk_of(request)
    name = desk.run(text_of(values, "run")).path.name
    return await _told(request, Call.of("stop", name), name)


async def resume_run(request: Request) -> Response:
    """``aifactory train runs/NAME/run.yaml --resume auto``"""
    values, desk = await form_of(request), desk_of(request)
    folder = desk.run(text_of(values, "run"))
    name = folder.path.name
    if not folder.config_file.is_file():
        raise UserError("did not come so far that it could be resumed", where=name, fix="start it anew")
    if await run_in_threadpool(folder.is_live):
        raise UserError("trains now", where=name)
    call = _resume(desk.shown(folder.config_file), name)
    request.app.state.started[name] = calls.start(call, desk.root, desk.log(name))
    return go("/run", run=name)


def _resume(config: str, name: str) -> Call:
    return Call.of("train", config, name=name, resume="auto")


async def _told(request: Request, call: Call, name: str) -> Response:
    """On to the page of the run, or the message of the command that was refused."""
    done = await calls.run(call, desk_of(request).root)
    if done.good:
        return go("/run", run=name)
    return page(request, "refused", calls=[call], refused=said(done), status=400, run=name)


def _followed(request: Request, name: str) -> None:
    """Refuse a run that neither lies here nor was started here."""
    desk = desk_of(request)
    if not (desk.run(name).path.is_dir() or desk.log(name).exists() or name in request.app.state.started):
        raise UserError(f"no run '{name}' here", where="run", fix="choose one from the list")


def _follower(request: Request, name: str) -> Follower:
    """What is known of a run's curves; one for all pages that show it."""
    known: dict[str, Follower] = request.app.state.followers
    return known.setdefault(name, Follower(desk_of(request).run(name).metrics_file))


def _news(request: Request, name: str, follower: Follower) -> dict[str, Any]:
    """What the page of a run shows now; every text is escaped already, but that of ``log``."""
    folder = desk_of(request).run(name)
    more = follower.read()
    state, facts = _state(request, name, folder)
    record = object_or_nothing(folder.path / "record.json")
    hparams = record.get("hparams")
    total = hparams.get("steps") if isinstance(hparams, dict) else None
    verdict = Verdict.read(object_or_nothing(folder.eval_file))
    status = html(
        "status",
        name=name,
        state=state,
        step=follower.step,
        total=total if isinstance(total, int) and total else None,
        last=follower.last,
        cause=(facts.get("cause") or {}).get("message"),
        attempts=facts.get("attempts") or [],
        verdict=verdict,
    )
    return {
        "state": state,
        "status": status,
        "charts": follower.charts(),
        "log": _log(desk_of(request).log(name)),
        "more": more,
    }


def _state(request: Request, name: str, folder: RunFolder) -> tuple[str, dict[str, Any]]:
    """``starting``, or a state of ``aifactory status``, with the facts of that."""
    process = request.app.state.started.get(name)
    at_work = process is not None and process.poll() is None
    facts: dict[str, Any] = {}
    if folder.path.is_dir():
        try:
            with reading(folder.path, "a file of this run is damaged", "aifactory verify RUN"):
                facts = status_of(folder.path, ask=False)
        except UserError as error:
            facts = {"state": "failed", "cause": {"message": str(error)}}
    state = str(facts.get("state", "new"))
    if state == "new":  # no attempt is written down
        state = str(object_or_nothing(folder.state_file).get("state", "new"))
    if at_work and state != "running":
        return "starting", facts
    if state == "new" and process is not None:
        code = process.returncode
        return (
            ("failed", {"cause": {"message": f"it ended with exit code {code}: see its output"}})
            if code
            else (state, facts)
        )
    return state, facts


def _log(path: Path) -> str:
    """The end of a training's output, without colours; what a line was overwritten with is its last."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 4 * _LOG))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return ""
    lines = [line.rpartition("\r")[2] for line in text.replace("\r\n", "\n").split("\n")]
    return without_secrets(_CONTROL.sub("", "\n".join(lines))[-_LOG:])


async def events(request: Request) -> Response:
    """Server-sent events: what the page of a run shows, whenever it changed; ``end`` when the run is over."""
    name = request.query_params.get("run", "")
    await run_in_threadpool(_followed, request, name)
    return StreamingResponse(_events(request, name), media_type="text/event-stream")


async def _events(request: Request, name: str) -> AsyncIterator[str]:
    follower, before, quiet = _follower(request, name), "", 0.0
    sent: dict[str, Any] = {}
    while not await request.is_disconnected():
        news = await run_in_threadpool(_news, request, name, follower)
        text = json.dumps(news, sort_keys=True)
        if text != before:
            before, quiet = text, 0.0
            charts = {key: chart for key, chart in news["charts"].items() if sent.get(key) != chart}
            sent = news["charts"]
            yield f"event: news\ndata: {json.dumps({**news, 'charts': charts})}\n\n"
        elif quiet >= _ALIVE_S:
            quiet = 0.0
            yield ": still here\n\n"
        if not news["more"] and news["state"] not in ("starting", "running", "pending"):
            yield "event: end\ndata: {}\n\n"
            return
        pause = 0.0 if news["more"] else _EVERY_S
        quiet += pause
        await asyncio.sleep(pause)


# ---- results


async def results_page(request: Request) -> Response:
    """Verdict, figures before and after, answers, and what may be done with the run."""
    return await run_in_threadpool(_results, request, request.query_params.get("run", ""))


def _results(
    request: Request, name: str, *, done: list[Call] | None = None, exported: Any = None, refused: str | None = None
) -> Response:
    desk = desk_of(request)
    shown: dict[str, Any] = {"title": "Results", "runs": desk.runs(), "run": name, "exports": EXPORTS, "held": ""}
    shown |= {"verdict": None, "exported": exported, "files": [], "chosen": "", "can_report": False}
    if not name:
        return page(request, "results", **shown)
    folder = _known(request, name)
    record = object_or_nothing(folder.path / "record.json")
    with reading(folder.path, "a file of this run is damaged", f"aifactory verify {name}"):
        results = object_or_nothing(folder.eval_file)
        protected = folder.load_config().privacy.profile != "open"
        run = {**(record.get("run") or {}), **({"privacy_profile": "sensitive"} if protected else {})}
        shown["held"] = held_out({**record, "run": run}, results)
        shown["verdict"] = Verdict.read(results)
    below = folder.export.iterdir() if folder.export.is_dir() else ()
    shown["files"] = sorted(desk.shown(p) for p in below if p.is_dir() and not p.name.startswith("."))
    written = {kind for kind in EXPORTS if any(Path(path).name.startswith(kind) for path in shown["files"])}
    shown["chosen"] = next((kind for kind in EXPORTS if kind not in written), "")
    shown["can_report"] = bool(record)
    shown["state"] = folder.state().get("state")
    calls_shown = done or [Call.of("report", name, html=True), Call.of("chat", name)]
    return page(request, "results", calls=calls_shown, refused=refused, status=400 if refused else 200, **shown)


def _known(request: Request, name: str) -> RunFolder:
    folder = desk_of(request).run(name)
    if not folder.config_file.is_file():
        raise UserError(f"no run '{name}' here", where="run", fix="choose one from the list")
    return folder


async def export_run(request: Request) -> Response:
    """``aifactory export``"""
    values, desk = await form_of(request), desk_of(request)
    name = _known(request, text_of(values, "run")).path.name
    kind = text_of(values, "kind")
    if kind not in EXPORTS:
        raise UserError(f"'{kind}' is no kind of export", where="kind", fix=", ".join(EXPORTS))
    call = Call.of("export", name, **EXPORTS[kind][1])
    done = await calls.run(call, desk.root)
    exported = done.answer if done.good else None
    return await run_in_threadpool(_results, request, name, done=[call], exported=exported, refused=said(done))


async def report_page(request: Request) -> Response:
    """The page that ``aifactory report --html`` writes."""

    def made() -> str:
        folder = _known(request, request.query_params.get("run", ""))
        return build(folder, load_record(folder.path))

    return _foreign(await run_in_threadpool(made))


async def compare(request: Request) -> Response:
    """The page that ``aifactory runs --html`` writes."""

    def made() -> str:
        folders = [_known(request, name) for name in request.query_params.getlist("run")]
        if not folders:
            raise UserError("no run was chosen", where="compare", fix="choose two or three")
        return compare_page(folders, [row(folder) for folder in folders])

    return _foreign(await run_in_threadpool(made))


def _foreign(text: str) -> Response:
    """A page with its style and script inside: these two are allowed by their digests, and nothing else."""
    policy = f"default-src 'none'; style-src {_digest('style.css')}; script-src {_digest('script.js')}; img-src data:; "
    policy += "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return HTMLResponse(text, headers={"Content-Security-Policy": policy})


def _digest(name: str) -> str:
    text = (page_parts.HERE / name).read_text(encoding="utf-8")
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
