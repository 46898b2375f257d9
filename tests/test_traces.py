"""Spans of requests, as a collector gets them by OTLP."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1.trace_pb2 import ResourceSpans, Span

from deployments.config import EndpointConfig, parse_config
from deployments.traces import check_traces, traces_to
from deployments.web.app import build_app
from pipeline.errors import UsageError
from tests.servers import ask
from tests.test_web import Pool

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@contextmanager
def _collector() -> Iterator[tuple[str, list[tuple[str, bytes]]]]:
    """Its URL, and the paths and bodies that come."""
    came: list[tuple[str, bytes]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", came
        server.shutdown()
        thread.join()


def _spans(came: list[tuple[str, bytes]]) -> list[Span]:
    requests = []
    for path, body in came:
        assert path == "/v1/traces"
        requests.append(ExportTraceServiceRequest.FromString(body))
    resources = [resource for request in requests for resource in request.resource_spans]
    names = {one.value.string_value for one in _attributes(resources) if one.key == "service.name"}
    assert names == {"tandem"}
    return [span for resource in resources for scope in resource.scope_spans for span in scope.spans]


def _attributes(resources: list[ResourceSpans]) -> list[KeyValue]:
    return [one for resource in resources for one in resource.resource.attributes]


def test_a_request_is_a_span_of_its_clients_trace() -> None:
    with _collector() as (url, came):
        traces = traces_to(url)
        app = build_app(Pool(), EndpointConfig(), tracer=traces.get_tracer("test"))
        ask(app, "POST", "/predict?top_k=2", content=b"cat", headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
        ask(app, "POST", "/predict?top_k=0", content=b"cat")
        traces.shutdown()
    first, second = _spans(came)
    assert (first.name, first.trace_id.hex(), first.parent_span_id.hex()) == ("POST /predict", TRACE, PARENT)
    assert first.kind == Span.SPAN_KIND_SERVER
    told = {one.key: one.value for one in first.attributes}
    assert told["http.response.status_code"].int_value == 200
    assert told["http.route"].string_value == "/predict"
    assert {one.key: one.value.int_value for one in second.attributes}["http.response.status_code"] == 422
    assert (second.parent_span_id, second.trace_id == first.trace_id) == (b"", False)


def test_a_collector_that_is_away_costs_no_request() -> None:
    traces = traces_to("http://127.0.0.1:1")
    app = build_app(Pool(), EndpointConfig(), tracer=traces.get_tracer("test"))
    started_s = time.monotonic()
    assert ask(app, "POST", "/predict", content=b"cat").status_code == 200
    assert time.monotonic() - started_s < 5
    traces.shutdown()


def test_the_log_tells_of_the_trace(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="tandem.access")
    with _collector() as (url, came):
        traces = traces_to(url)
        ask(build_app(Pool(), EndpointConfig(), tracer=traces.get_tracer("test")), "GET", "/healthz")
        traces.shutdown()
    (span,) = _spans(came)
    assert f'"trace_id": "{span.trace_id.hex()}"' in caplog.text


def test_what_sends_traces_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    check_traces()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"pip install 'tandem\[traces\]'"):
        check_traces()


@pytest.mark.parametrize("url", ["collector:4318", "http://", "ftp://collector", "http://a b"])
def test_a_collector_has_a_url(url: str) -> None:
    with pytest.raises(UsageError, match="traces_to is"):
        parse_config({"endpoint": {"traces_to": url}})
