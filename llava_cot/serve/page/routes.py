"""The page at ``/`` and its files. Only names of a fixed list are served, so no path of a request is ever opened."""

import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from llava_cot.search.plan import make_plan
from llava_cot.serve.errors import RequestError
from llava_cot.serve.presets import SEARCHES
from llava_cot.stages import LLAVA_COT

KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "json": "application/json"}
OWN = ("form.css", "page.js", "stream.js", "result.js", "images.js", "history.js")
OF_TRACES = ("page.css", "trace.css")  # of llava_cot.report
CANDIDATES = ("candidates", "n", "num_beams")  # what searches call the number of candidates that they draw at once

# Everything comes from files of this server.
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data: blob:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {sources}" for name, sources in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


def page_router() -> APIRouter:
    """Return the routes of the page. Its files are read once, here."""
    router, contents = APIRouter(), _contents()

    @router.get("/")
    async def page() -> Response:
        return _response("index.html", contents["index.html"], "no-store")

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in contents:
            raise RequestError(404, "there is no such route")
        return _response(name, contents[name], "no-cache")

    return router


def _contents() -> dict[str, str]:
    """Return what is served, by name."""
    found = {name: _read("llava_cot.serve.page", name) for name in ("index.html", *OWN)}
    found |= {name: _read("llava_cot.report", name) for name in OF_TRACES}
    found["trace.js"] = _trace_module()
    found["searches.json"] = json.dumps({search: _settings(search) for search in SEARCHES})
    return found


def _trace_module() -> str:
    """Return the script of a trace's page as a module, whose one function follows a trace in a given ``document``.

    In its own page that script runs once. Here it runs for each trace that is shown.
    """
    scripts = "\n".join(_read("llava_cot.report", name) for name in ("nav.js", "trace.js"))
    return f"export default function (document) {{\n{scripts}\n}}\n"


def _settings(search: str) -> dict[str, dict[str, Any]]:
    """Return the settings that the page offers of a search: their names and their default values, None if by stage."""
    settings = vars(make_plan(search, {}, LLAVA_COT).config)
    candidates = next((name for name in CANDIDATES if name in settings), None)
    offered = {"candidates": candidates, "rounds": "max_rounds" if "max_rounds" in settings else None}
    return {field: {"name": name, "default": _one(settings[name])} for field, name in offered.items() if name}


def _one(value: Any) -> Any:
    """Return the value of a setting, which may be the same for each stage, or None if it is not."""
    values = {*value.values()} if isinstance(value, Mapping) else {value}
    return values.pop() if len(values) == 1 else None


def _read(package: str, name: str) -> str:
    return files(package).joinpath(name).read_text("utf-8")


def _response(name: str, content: str, cache: str) -> Response:
    kind = KINDS[name.rpartition(".")[2]]
    return Response(content, media_type=kind, headers={**HEADERS, "Cache-Control": cache})
