"""The ASGI application: every protocol's routes around one scorer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from opentelemetry.trace import NoOpTracer, Tracer

from deployments.config import EndpointConfig
from deployments.web import containers, huggingface, links, oip, own, page, tensorflow
from deployments.web.access import Access, Observe
from deployments.web.fetch import Fetcher
from deployments.web.gate import Gate, document_keys
from deployments.web.keys import Key, Keys
from deployments.web.problems import answer_the_rest
from deployments.web.scoring import Scorer, Service
from deployments.web.shed import Shed
from pipeline import __version__

Jobs = Callable[[], Awaitable[list[dict[str, Any]]]]

PROMETHEUS = "text/plain; version=0.0.4"


def build_app(
    scorer: Scorer,
    config: EndpointConfig,
    *,
    fetcher: Fetcher | None = None,
    observe: Observe = lambda protocol, status, seconds: None,
    metrics: Callable[[], Awaitable[str]] | None = None,
    status: page.Status | None = None,
    jobs: Jobs | None = None,
    tracer: Tracer | None = None,
) -> FastAPI:
    """The application.

    Without a fetcher of its own it has the one that the configuration describes. `observe` is told of each answer.
    `metrics` gives what Prometheus comes for, `status` what the page shows of the pool, and `jobs` those that run. With
    a `tracer`, each request is a span.
    """
    app = FastAPI(
        title="Tandem",
        version=__version__,
        description="Scores images on the pool's model actors.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    service = Service(scorer, config)
    fetcher = fetcher or Fetcher(
        hosts=config.image_url_hosts, max_bytes=config.max_body_bytes, timeout_s=config.timeout_s
    )
    for protocol in (own, huggingface, oip, tensorflow, containers):
        app.include_router(protocol.routes(service))
    app.include_router(links.routes(service, fetcher))
    app.include_router(page.routes(service, status))
    if metrics:
        _add_metrics(app, metrics)
    if jobs:
        _add_jobs(app, jobs)
    answer_the_rest(app)
    keys, probes = Keys(map(Key.parse, config.keys), config.rate_per_s), [config.health_route or "/ping"]
    app.add_middleware(Shed, service=service)
    app.add_middleware(Gate, keys=keys, open_routes=probes)
    if keys:
        document_keys(app, probes)
    app.add_middleware(Access, observe=observe, tracer=tracer or NoOpTracer())  # the last one is the outermost
    return app


def _add_metrics(app: FastAPI, metrics: Callable[[], Awaitable[str]]) -> None:
    @app.get("/metrics", tags=["tandem"], response_class=PlainTextResponse)
    async def prometheus() -> PlainTextResponse:
        """Metrics of the endpoint and the pool."""
        return PlainTextResponse(await metrics(), media_type=PROMETHEUS)


def _add_jobs(app: FastAPI, jobs: Jobs) -> None:
    @app.get("/jobs", tags=["tandem"])
    async def running() -> dict[str, list[dict[str, Any]]]:
        """The jobs that run on the cluster, the oldest first: what each does, and how far it is."""
        return {"jobs": await jobs()}
