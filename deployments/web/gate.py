"""Who comes in: keys are asked for before a body is read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from deployments.web.keys import Key, Keys, Scope
from deployments.web.page import PARTS
from deployments.web.problems import Problem, documented, early_json, problem_json

PAGE = {"/", "/docs", *(f"/{name}" for name in PARTS)}
OPEN = PAGE | {"/healthz", "/readyz", "/ping", "/openapi.json", "/v2/health/live", "/v2/health/ready"}  # to GET
SCOPES = {"/metrics": Scope.ADMIN, "/status": Scope.ADMIN, "/jobs": Scope.JOBS}  # others score


class Gate:
    """ASGI middleware that lets a request pass which has a key for its route; where there are no keys, each one.

    A key is in `Authorization: Bearer` or in `X-API-Key`. Without one, only probes and descriptions are answered.
    """

    def __init__(self, app: ASGIApp, keys: Keys, open_routes: Iterable[str] = ()) -> None:
        self._app, self._keys, self._open = app, keys, OPEN | set(open_routes)

    async def __call__(self, connection: Connection, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if connection["type"] == "http" and self._keys and not self._is_open(connection):
            try:
                connection.setdefault("state", {})["key"] = self._admitted(connection).name
            except Problem as problem:
                await early_json(problem)(connection, receive, send)
                return
        await self._app(connection, receive, send)

    def _is_open(self, connection: Connection) -> bool:
        return connection["method"] in ("GET", "HEAD") and connection["path"] in self._open

    def _admitted(self, connection: Connection) -> Key:
        secret = _secret(Headers(scope=connection))
        if not secret:
            detail = "a key is needed: send it as Authorization: Bearer KEY, or as X-API-Key: KEY"
            raise Problem(HTTPStatus.UNAUTHORIZED, detail, **{"www-authenticate": "Bearer"})
        key = self._keys.find(secret)
        if key is None:
            detail = "the key is not known here; have one made with tandem key"
            raise Problem(HTTPStatus.UNAUTHORIZED, detail, **{"www-authenticate": 'Bearer error="invalid_token"'})
        scope = SCOPES.get(connection["path"], Scope.PREDICT)
        if not key.may(scope):
            raise Problem(HTTPStatus.FORBIDDEN, f"the key of {key.name} is not for {scope}; use one that is")
        if wait_s := self._keys.wait_s(key):
            headers = {"retry-after": str(math.ceil(wait_s))}
            raise Problem(HTTPStatus.TOO_MANY_REQUESTS, f"the key of {key.name} asks too often; slow down", **headers)
        return key


def document_keys(app: FastAPI, open_routes: Iterable[str] = ()) -> None:
    """Has OpenAPI tell which routes want a key, and how they answer without."""
    plain, free = app.openapi, OPEN | set(open_routes)

    def openapi() -> dict[str, Any]:
        document = plain()
        document.setdefault("components", {})["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
        }
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                if method != "get" or path not in free:
                    operation["security"] = [{"bearer": []}, {"header": []}]
                    refusals = documented(problem_json, 401, 403, 429)
                    operation["responses"] |= {str(status): told for status, told in refusals.items()}
        return document

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's own way to extend it


def _secret(headers: Headers) -> str:
    kind, _, secret = headers.get("authorization", "").partition(" ")
    return secret.strip() if kind.lower() == "bearer" else headers.get("x-api-key", "").strip()
