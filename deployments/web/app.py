"""The ASGI application: every protocol's routes around one scorer."""

from __future__ import annotations

from fastapi import FastAPI

from deployments.config import EndpointConfig
from deployments.web import containers, huggingface, links, oip, own, tensorflow
from deployments.web.fetch import Fetcher
from deployments.web.problems import answer_the_rest
from deployments.web.scoring import Scorer, Service
from pipeline import __version__


def build_app(scorer: Scorer, config: EndpointConfig, fetcher: Fetcher | None = None) -> FastAPI:
    """The application. Without a fetcher of its own it has the one that the configuration describes."""
    app = FastAPI(
        title="Tandem",
        version=__version__,
        description="Scores images on the pool's model actors.",
        docs_url=None,
        redoc_url=None,
    )
    service = Service(scorer, config)
    fetcher = fetcher or Fetcher(
        hosts=config.image_url_hosts, max_bytes=config.max_body_bytes, timeout_s=config.timeout_s
    )
    for protocol in (own, huggingface, oip, tensorflow, containers):
        app.include_router(protocol.routes(service))
    app.include_router(links.routes(service, fetcher))
    answer_the_rest(app)
    return app
