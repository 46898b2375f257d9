"""What is kept of each request: a line of JSON in the log, and its time among the metrics.

The line has the request's id (`X-Request-ID`, given or new, which the answer bears), and the id of the trace that it is
part of (`traceparent`, W3C Trace Context). It has neither images nor keys.
"""

from __future__ import annotations

import json
import logging
import re
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from opentelemetry.propagate import extract
from opentelemetry.trace import Span, SpanKind, Tracer, format_trace_id
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.web.scoring import REPLICA_HEADER

REQUEST_ID = "x-request-id"
CLIENT_GONE = 499  # as nginx has it
_ID = re.compile(r"[\x21-\x7e]{1,128}")
_TRACE = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")

Observe = Callable[[str, int, float], None]  # protocol, status, seconds

log = logging.getLogger("tandem.access")


class Access:
    """ASGI middleware around all others."""

    def __init__(self, app: ASGIApp, observe: Observe, tracer: Tracer) -> None:
        self._app, self._observe, self._tracer = app, observe, tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        parent = extract({"traceparent": headers.get("traceparent", "")})
        with self._tracer.start_as_current_span(scope["method"], parent, SpanKind.SERVER) as span:
            await self._request(scope, receive, send, headers, span)

    async def _request(self, scope: Scope, receive: Receive, send: Send, headers: Headers, span: Span) -> None:
        started_s = time.perf_counter()
        request_id = headers.get(REQUEST_ID, "")
        if not _ID.fullmatch(request_id):
            request_id = uuid.uuid4().hex
        answer: dict[str, Any] = {"status": CLIENT_GONE, "replica": None}

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent = MutableHeaders(scope=message)
                sent[REQUEST_ID] = request_id
                answer.update(status=message["status"], replica=sent.get(REPLICA_HEADER))
            await send(message)

        try:
            await self._app(scope, receive, send_and_note)
        finally:
            took_s, route = time.perf_counter() - started_s, scope.get("route")
            self._observe(_protocol(route), answer["status"], took_s)
            path = getattr(route, "path", None)
            if span.is_recording():
                span.update_name(f"{scope['method']} {path}" if path else scope["method"])
                told = {"http.request.method": scope["method"], "http.response.status_code": answer["status"]}
                span.set_attributes(told | ({"http.route": path} if path else {}))
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "request_id": request_id,
                "trace_id": _trace_id(span, headers),
                "method": scope["method"],
                "route": path,
                "status": answer["status"],
                "ms": round(took_s * 1e3, 2),
                "bytes": headers.get("content-length"),
                "key": scope.get("state", {}).get("key"),
                "replica": answer["replica"],
            }
            log.info(json.dumps({name: value for name, value in line.items() if value is not None}))


def _trace_id(span: Span, headers: Headers) -> str | None:
    """That of the span, which is its client's where it told one; without traces, what the client told."""
    if span.is_recording():
        return format_trace_id(span.get_span_context().trace_id)
    told = _TRACE.fullmatch(headers.get("traceparent", ""))
    return told[1] if told else None


def _protocol(route: Any) -> str:
    """The first tag of the route, which is its protocol's name."""
    return str((getattr(route, "tags", None) or ["none"])[0])
