"""The pages Where and Plan: which systems, at what cost, and what a plan on one of them comes to."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from aifactory_train.advice.page import drawn_map
from aifactory_train.advice.show import number
from aifactory_train.config.loading import recipe_ids
from aifactory_train.planning.page import facts, memory_stack, scaling_curve
from aifactory_train.sites.index import load_index
from aifactory_train.studio import calls
from aifactory_train.studio.calls import Call, text_of
from aifactory_train.studio.pages import desk_of, page, said


async def where_page(request: Request) -> Response:
    """``aifactory where``"""
    values, desk = dict(request.query_params), desk_of(request)
    name = text_of(values, "recipe")
    shown: dict[str, Any] = {
        "title": "Where",
        "values": values,
        "recipes": desk.recipes(),
        "installed": recipe_ids(),
        "countries": sorted({(m["country_name"], m["country"]) for m in load_index()["members"]}),
        "number": number,
        "answer": None,
    }
    if not name:
        return page(request, "where", **shown)
    options = {key: text_of(values, key) for key in ("country", "deadline", "budget", "tokens")}
    flags = {key: bool(text_of(values, key)) for key in ("sme", "sensitive")}
    call = Call.of("where", desk.recipe(name), **options, **flags)
    done = await calls.run(call, desk.root)
    if not done.good:
        return page(request, "where", calls=[call], refused=said(done), status=400, **shown)
    shown["answer"] = done.answer
    drawn = Markup(await run_in_threadpool(drawn_map, done.answer))
    return page(request, "where", calls=[call], map=drawn, notes=done.said.strip(), **shown)


async def plan_page(request: Request) -> Response:
    """``aifactory plan``"""
    values, desk = dict(request.query_params), desk_of(request)
    name, site = text_of(values, "recipe"), text_of(values, "site")
    shown: dict[str, Any] = {
        "title": "Plan",
        "values": values,
        "recipes": desk.recipes(),
        "installed": recipe_ids(),
        "systems": [(s["id"], s["name"]) for s in load_index()["systems"] if s["status"] == "usable"],
        "plan": None,
    }
    if not name or not site:
        return page(request, "plan", **shown)
    options = {key: text_of(values, key) for key in ("nodes", "gpus_per_node", "partition", "tokens")}
    known = desk.recipe(name)
    call = Call.of("plan", known, site=site, **options)
    done = await calls.run(call, desk.root)
    if not done.good:
        return page(request, "plan", calls=[call], refused=said(done), status=400, **shown)
    plan = done.answer
    settings = [f"{key}={_written(value)}" for key, value in plan["overrides"].items()]
    size = {"nodes": str(plan["nodes"]), "gpus_per_node": str(plan["gpus"] // plan["nodes"])}
    follow = Call.of("launch", known, site=site, partition=options["partition"], **size, set=settings)
    shown |= {
        "plan": plan,
        "facts": facts(plan),
        "stack": Markup(memory_stack(plan)),
        "scaling": Markup(scaling_curve(plan)),
        "launch": follow.shown,
        "notes": done.said.strip(),
    }
    return page(request, "plan", calls=[call], **shown)


def _written(value: Any) -> str:
    """A value as ``--set`` takes it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return str(value)
