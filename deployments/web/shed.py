"""Load that is too much is refused unread, before a route is looked for: what it saves goes to those that are taken."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from deployments.web.problems import Problem, early_json
from deployments.web.scoring import Service


class Shed:
    """ASGI middleware that answers what would send images while the service has no room for them."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http" and scope["method"] == "POST":
            try:
                self._service.check_room()
            except Problem as problem:
                await early_json(problem)(scope, receive, send)
                return
        await self._app(scope, receive, send)
