"""What a person sees: a page to try images and to watch the pool, and the protocols explained.

It comes from the endpoint alone, and has no build step.
"""

from __future__ import annotations

import html
import re
from collections.abc import Awaitable, Callable
from functools import cache
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from markdown_it import MarkdownIt

from deployments.web.naming import short_name
from deployments.web.problems import answers_in, documented, problem_json
from deployments.web.scoring import Service

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {"content-security-policy": POLICY, "x-content-type-options": "nosniff", "referrer-policy": "no-referrer"}
PARTS = {"page.css": "text/css", "page.js": "text/javascript", "icon.svg": "image/svg+xml"}
# What the documentation writes, where the page writes what is so here.
_ADDRESS, _MODEL = "127.0.0.1:8000", "vit-base-patch16-224"

Status = Callable[[], Awaitable[dict[str, Any]]]


def routes(service: Service, status: Status | None) -> APIRouter:
    """The page's routes. Without `status` it shows no pool."""
    router = APIRouter(tags=["page"], route_class=answers_in(problem_json))

    @router.get("/", response_class=HTMLResponse)
    async def page() -> Response:
        """A page to try images and to watch the pool."""
        return HTMLResponse(_part("index.html"), headers=HEADERS)

    @router.get("/docs", response_class=HTMLResponse)
    async def docs(request: Request) -> Response:
        """The protocols, with commands as they are for this endpoint."""
        host = html.escape(request.headers.get("host", _ADDRESS))
        text = _documentation().replace(_ADDRESS, host).replace(_MODEL, html.escape(short_name(service.info)))
        return HTMLResponse(text, headers=HEADERS)

    for name, media_type in PARTS.items():
        router.add_api_route(f"/{name}", _serve_part(name, media_type), include_in_schema=False)

    if status is not None:

        @router.get("/status", responses=documented(problem_json, 503))
        async def state() -> Response:
            """The pool's replicas, this process's requests of the last minute, and the jobs that run."""
            return JSONResponse(await status())

    return router


def _serve_part(name: str, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def part() -> Response:
        return Response(_part(name), media_type=media_type, headers=HEADERS)

    return part


@cache
def _part(name: str) -> str:
    return files(__name__).joinpath(name).read_text(encoding="utf-8")


@cache
def _documentation() -> str:
    """The documentation's Markdown as a page; headings can be linked to."""
    body = MarkdownIt("commonmark").enable("table").render(_part("docs.md"))
    body = re.sub(r"<h2>(.*?)</h2>", lambda found: f'<h2 id="{_slug(found[1])}">{found[1]}</h2>', body)
    return _part("docs.html").replace("<!-- docs.md -->", body)


def _slug(heading: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-")
