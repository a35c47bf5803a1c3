"""The addresses of the studio."""

from __future__ import annotations

from pathlib import Path

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from aifactory_train.core.errors import UserError
from aifactory_train.report import page_parts
from aifactory_train.studio import pages_data, pages_runs, pages_sites
from aifactory_train.studio.desk import Desk
from aifactory_train.studio.door import Door
from aifactory_train.studio.pages import go, refusal

_HERE = Path(__file__).resolve().parent
#: What pages load: name -> file, kind. Nothing else of any folder is handed out.
_STATIC = {
    "studio.css": (_HERE / "studio.css", "text/css"),
    "studio.js": (_HERE / "studio.js", "text/javascript"),
    "report.css": (page_parts.HERE / "style.css", "text/css"),
    "charts.js": (page_parts.HERE / "script.js", "text/javascript"),
}


def make_app(folder: Path, *, port: int, token: str) -> Starlette:
    """The studio for ``folder``, on ``port`` of 127.0.0.1; ``token`` lets a browser in."""
    routes = [
        Route("/", first),
        Route("/static/{name}", static),
        Route("/data", pages_data.data_page),
        Route("/data/upload", pages_data.upload, methods=["POST"]),
        Route("/data/recipe", pages_data.make_recipe, methods=["POST"]),
        Route("/data/inspect", pages_data.inspect, methods=["POST"]),
        Route("/recipe", pages_data.recipe_page),
        Route("/recipe/save", pages_data.save_recipe, methods=["POST"]),
        Route("/where", pages_sites.where_page),
        Route("/plan", pages_sites.plan_page),
        Route("/run", pages_runs.run_page),
        Route("/run/events", pages_runs.events),
        Route("/run/start", pages_runs.start_run, methods=["POST"]),
        Route("/run/stop", pages_runs.stop_run, methods=["POST"]),
        Route("/run/resume", pages_runs.resume_run, methods=["POST"]),
        Route("/results", pages_runs.results_page),
        Route("/results/export", pages_runs.export_run, methods=["POST"]),
        Route("/report", pages_runs.report_page),
        Route("/compare", pages_runs.compare),
    ]
    door = Middleware(Door, port=port, token=token)
    app = Starlette(routes=routes, middleware=[door], exception_handlers={UserError: refused})
    app.state.desk = Desk(folder.resolve())
    app.state.started = {}  # name of a run -> its process, as long as this studio lives
    app.state.followers = {}  # name of a run -> its curves
    return app


async def first(request: Request) -> Response:
    return go("/data")


async def static(request: Request) -> Response:
    found = _STATIC.get(request.path_params["name"])
    if found is None:
        return Response("no such file\n", 404, media_type="text/plain")
    return Response(found[0].read_bytes(), media_type=found[1])


async def refused(request: Request, error: Exception) -> Response:
    return refusal(request, error)
