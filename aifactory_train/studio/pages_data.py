"""The pages Data and Recipe: from rows to a recipe, and the recipe itself."""

from __future__ import annotations

import urllib.parse
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from aifactory_train.config.loading import find_recipe, load_recipe, recipe_ids
from aifactory_train.config.objective import objective
from aifactory_train.config.schema import Recipe
from aifactory_train.core.errors import UserError
from aifactory_train.core.files import object_or_nothing
from aifactory_train.studio import calls, recipe_form
from aifactory_train.studio.calls import Call, text_of
from aifactory_train.studio.pages import desk_of, form_of, go, lines_of, page, said

_TASKS = (
    ("chat", "conversations"),
    ("qa", "questions and answers"),
    ("text", "texts"),
    ("preference", "a better and a worse answer"),
    ("feedback", "answers with a rating"),
)
#: Documents whose tokens are shown.
_INSPECTED = "3"


# ---- data


async def data_page(request: Request) -> Response:
    """Files of the folder to make a recipe of, and what was found in the rows of one that is made."""
    asked = request.query_params
    values = {"file": asked.get("file", ""), "id": _id_for(asked.get("file", ""))}
    name = asked.get("recipe", "")
    found = await run_in_threadpool(_report, request, name) if name else None
    return _data(request, values, found=found, recipe=name)


def _data(request: Request, values: dict[str, str], **more: Any) -> Response:
    desk = desk_of(request)
    shown = {"found": None, "remarks": [], "prepared": None, "licence": "", **more}
    return page(request, "data", title="Data", values=values, files=desk.rows(), tasks=_TASKS, **shown)


def _id_for(file: str) -> str:
    """An id for a recipe of a file."""
    stem = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in Path(file).stem.casefold())
    return f"my/{stem.strip('-._') or 'rows'}" if file else ""


def _report(request: Request, name: str) -> dict[str, Any] | None:
    """What the report beside a recipe says; None where there is none."""
    desk = desk_of(request)
    known = desk.recipe(name)
    if known in recipe_ids():
        return None
    file = desk.root / known
    facts = object_or_nothing(file.with_name(f"{file.stem}.report.json"))
    return _facts(facts) if facts else None


def _facts(facts: dict[str, Any]) -> dict[str, Any]:
    """The report on rows as lines of text."""
    from aifactory_train.data.report import lines_of as lines

    try:
        known = lines(facts)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise UserError("the report on the rows is damaged", fix="aifactory prepare RECIPE --report") from None
    unused = facts.get("unused") or {}
    remarks = [f"not used: column '{name}' ({n:,} rows)" for name, n in (unused.get("columns") or {}).items()]
    remarks += [f"not used: key of a turn '{name}' ({n:,})" for name, n in (unused.get("turn_keys") or {}).items()]
    left_out = (facts.get("files") or {}).get("left_out") or []
    remarks += [f"left out: {entry.get('file')}: {entry.get('why')}" for entry in left_out]
    personal = (facts.get("personal_data") or {}).get("counts") or {}
    return {"lines": known, "remarks": remarks, "personal": sorted(personal)}


async def upload(request: Request) -> Response:
    """A file that was dropped into the page; answers where it lies."""
    name = urllib.parse.unquote(request.query_params.get("name", ""))
    try:
        path = await desk_of(request).keep(name, request.stream())
    except UserError as error:
        return JSONResponse(error.as_dict(), status_code=400)
    return JSONResponse({"file": path})


async def make_recipe(request: Request) -> Response:
    """``aifactory recipes new``"""
    values, desk = await form_of(request), desk_of(request)
    file = desk.inside(text_of(values, "file"), "file")
    options = {name: text_of(values, name) for name in ("licence", "base", "task", "group_by", "time", "sector")}
    held = text_of(values, "eval")
    call = Call.of(
        *("recipes", "new", text_of(values, "id")),
        data=desk.shown(file),
        eval=desk.shown(desk.inside(held, "eval")) if held else None,
        map=lines_of(values, "map"),
        **options,
    )
    done = await calls.run(call, desk.root)
    if not done.good:
        return _data(request, values, calls=[call], refused=said(done), status=400)
    answer = done.answer
    more = {"remarks": answer["remarks"], "found": _facts(answer["report"]), "licence": answer["licence"]}
    return _data(request, values, calls=[call], recipe=answer["recipe"], **more)


async def inspect(request: Request) -> Response:
    """``aifactory prepare --inspect``"""
    values, desk = await form_of(request), desk_of(request)
    name = desk.recipe(text_of(values, "recipe"))
    recipe = await run_in_threadpool(_loaded, request, name)
    shown = _INSPECTED if recipe.privacy.profile == "open" else None
    call = Call.of("prepare", name, inspect=shown, report=True)
    done = await calls.run(call, desk.root)
    if not done.good:
        return _data(request, {"id": ""}, calls=[call], refused=said(done), recipe=name, status=400)
    return _data(request, {"id": ""}, calls=[call], recipe=name, prepared=_prepared(done.answer))


def _prepared(report: dict[str, Any]) -> dict[str, Any]:
    """What became of the rows, as the page shows it."""
    dropped = [
        (source["name"], what, count) for source in report["sources"] for what, count in source["counts"].items()
    ]
    documents = []
    for found in report["inspected"]:
        pieces: list[tuple[bool, str]] = []
        for token in found["document"]:
            if pieces and pieces[-1][0] == token["supervised"]:
                pieces[-1] = (token["supervised"], pieces[-1][1] + token["text"])
            else:
                pieces.append((token["supervised"], token["text"]))
        documents.append({"place": found["place"], "tokens": found["tokens"], "of": found["supervised"], "is": pieces})
    return {
        "sets": report["sets"],
        "dropped": dropped,
        "duplicates": report["duplicates"]["rows"],
        "warnings": report["warnings"],
        "documents": documents,
    }


# ---- recipe


def _loaded(request: Request, name: str) -> Recipe:
    return load_recipe(name if name in recipe_ids() else str(desk_of(request).root / name))


async def recipe_page(request: Request) -> Response:
    name = request.query_params.get("recipe", "")
    return await run_in_threadpool(_recipe, request, name)


def _recipe(request: Request, name: str, *, text: str | None = None, refused: str | None = None) -> Response:
    desk = desk_of(request)
    shown: dict[str, Any] = {"recipes": desk.recipes(), "installed": recipe_ids(), "title": "Recipe", "recipe": name}
    if not name:
        return page(request, "recipe", text="", **shown)
    known = desk.recipe(name)
    own = known not in recipe_ids()
    saved = find_recipe(known if not own else str(desk.root / known)).read_text(encoding="utf-8", errors="replace")
    about = ""
    if refused is None:
        try:
            about = objective(_loaded(request, known))
        except UserError as error:
            refused = str(error)
    current = saved if text is None else text
    return page(
        request,
        "recipe",
        calls=[Call.of("config", "show", known)],
        refused=refused,
        status=400 if text is not None else 200,
        text=current,
        own=own,
        fields=recipe_form.fields(current),
        seen=recipe_form.digest(saved),
        about=about,
        saved=request.query_params.get("saved", ""),
        **shown,
    )


async def save_recipe(request: Request) -> Response:
    """Write the form's values, or the YAML, into the recipe's file; what is no recipe is refused and not written."""
    values = await form_of(request)
    return await run_in_threadpool(_save, request, values)


def _save(request: Request, values: dict[str, str]) -> Response:
    desk = desk_of(request)
    name = desk.recipe(text_of(values, "recipe"))
    if name in recipe_ids():
        raise UserError("is a recipe of the program, which stays as it is", where=name, fix="copy it into this folder")
    path = desk.root / name
    text = values.get("yaml")
    try:
        if text is None:
            text = path.read_text(encoding="utf-8")
            text = recipe_form.with_values(text, values)
        recipe_form.save(path, text, values.get("seen", ""))
    except UserError as error:
        return _recipe(request, name, text=text, refused=f"not saved: {error}")
    return go("/recipe", recipe=name, saved="1")
