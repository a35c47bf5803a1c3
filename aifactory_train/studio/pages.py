"""What all pages share: the frame, forms, the command that is shown, refusals."""

from __future__ import annotations

import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from aifactory_train.core.errors import UserError
from aifactory_train.core.templates import render
from aifactory_train.studio.calls import Call, Outcome
from aifactory_train.studio.desk import Desk

_TEMPLATES = Path(__file__).with_name("templates")
#: Bytes of a form: a recipe and some fields.
_FORM = 1 << 20
#: address, name
PAGES = (
    ("/data", "Data"),
    ("/recipe", "Recipe"),
    ("/where", "Where"),
    ("/plan", "Plan"),
    ("/run", "Run"),
    ("/results", "Results"),
)


def desk_of(request: Request) -> Desk:
    found = request.app.state.desk
    assert isinstance(found, Desk)
    return found


def html(template: str, **values: Any) -> str:
    """A template, filled in; what is not Markup there is text."""
    return render(_TEMPLATES / f"{template}.html.j2", autoescape=True, **values)


def page(
    request: Request,
    template: str,
    *,
    calls: Sequence[Call] = (),
    refused: str | None = None,
    status: int = 200,
    **values: Any,
) -> HTMLResponse:
    """A page in the common frame. ``calls``: what it did, or will do, as command lines; ``refused``: a message."""
    asked = request.query_params
    frame = {
        "pages": PAGES,
        "here": request.url.path,
        "folder": str(desk_of(request).root),
        "recipe": values.pop("recipe", asked.get("recipe", "")),
        "run": values.pop("run", asked.get("run", "")),
        "commands": [call.shown for call in calls],
        "refused": refused,
        "link": link,
    }
    return HTMLResponse(html(template, **frame, **values), status_code=status)


def said(outcome: Outcome) -> str | None:
    """The message of a command that was refused or failed; None where it was neither."""
    if outcome.good:
        return None
    return outcome.said.strip() or f"'{outcome.call.shown}' ended with exit code {outcome.code} and no message"


def refusal(request: Request, error: Exception) -> Response:
    """The page for a :class:`UserError`."""
    return page(request, "refused", refused=str(error), status=400)


def link(path: str, **values: str) -> str:
    """An address of the studio."""
    given = {name: value for name, value in values.items() if value}
    return f"{path}?{urllib.parse.urlencode(given)}" if given else path


def go(path: str, **values: str) -> Response:
    """On to a page, after something was done."""
    return RedirectResponse(link(path, **values), status_code=303)


async def form_of(request: Request) -> dict[str, str]:
    """The fields of a form, each the last of its name. Raises :class:`UserError` for anything else."""
    if request.headers.get("content-type", "").partition(";")[0] != "application/x-www-form-urlencoded":
        raise UserError("is no form", where="the request")
    raw = b""
    async for piece in request.stream():
        raw += piece
        if len(raw) > _FORM:
            raise UserError(f"has more than {_FORM:,} bytes", where="the form", fix="change the file in an editor")
    try:
        pairs = urllib.parse.parse_qsl(raw.decode(), keep_blank_values=True, max_num_fields=200, errors="strict")
    except ValueError:
        raise UserError("cannot be read", where="the form") from None
    return {name: value.replace("\r\n", "\n") for name, value in pairs}


def lines_of(values: Mapping[str, str], name: str) -> list[str]:
    """The lines of a field that are not empty."""
    return [line.strip() for line in values.get(name, "").splitlines() if line.strip()]
