"""What is kept of a request: one line, without images or keys, and one observation."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from deployments.config import EndpointConfig
from deployments.metrics import ours
from deployments.web.access import CLIENT_GONE, REQUEST_ID
from deployments.web.app import build_app
from deployments.web.keys import Scope, new_key
from tests.servers import ask
from tests.test_web import Pool

SECRET, KEY = new_key("nightly", [Scope.PREDICT])
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


class Kept:
    """An application, and what is kept of what is asked of it."""

    def __init__(self, caplog: pytest.LogCaptureFixture, **config: Any) -> None:
        caplog.set_level("INFO", logger="tandem.access")
        self._caplog = caplog
        self.observed: list[tuple[str, int, float]] = []
        self.app = build_app(Pool(), EndpointConfig(**config), observe=lambda *one: self.observed.append(one))

    def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        return ask(self.app, method, path, **options)

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(record.message) for record in self._caplog.records if record.name == "tandem.access"]


def test_a_request_is_one_line_with_what_one_looks_for(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept(caplog, keys=(str(KEY),))
    headers = {"x-api-key": SECRET, REQUEST_ID: "mine-7", "traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}
    kept.ask("POST", "/predict?top_k=4", content=b"the image itself", headers=headers)
    (line,) = kept.lines
    assert line.pop("time")
    assert line.pop("ms") >= 0
    assert line == {
        "request_id": "mine-7", "trace_id": TRACE, "method": "POST", "route": "/predict", "status": 200, "bytes": "16",
        "key": "nightly", "replica": "replica-7",
    }  # fmt: skip
    assert SECRET not in caplog.text
    assert "the image itself" not in caplog.text


def test_an_id_cannot_break_the_line_nor_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept(caplog)
    kept.ask("GET", "/healthz", headers={REQUEST_ID: 'a"},{"b'})
    assert kept.lines[0]["request_id"] == 'a"},{"b'
    for told in ("x" * 129, "two words", "tab\t", ""):
        answer = kept.ask("GET", "/healthz", headers={REQUEST_ID: told})
        (one,) = answer.headers.get_list(REQUEST_ID)
        assert len(one) == 32
        assert one == kept.lines[-1]["request_id"]


def test_an_answer_bears_the_id_of_its_request(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept(caplog)
    given = kept.ask("GET", "/nothing", headers={REQUEST_ID: "mine-7"})
    first, second = (kept.ask("GET", "/healthz").headers[REQUEST_ID] for _ in range(2))
    assert given.headers.get_list(REQUEST_ID) == ["mine-7"]
    assert first != second
    assert [line["request_id"] for line in kept.lines] == ["mine-7", first, second]
    assert "trace_id" not in kept.lines[0]


@pytest.mark.parametrize("told", ["", "00-xyz", f"00-{TRACE}", f"00-{TRACE.upper()}-00f067aa0ba902b7-01"])
def test_a_trace_that_is_none_is_not_told(told: str, caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept(caplog)
    kept.ask("GET", "/healthz", headers={"traceparent": told})
    assert "trace_id" not in kept.lines[0]


@pytest.mark.parametrize(
    ("method", "path", "observed"),
    [
        ("POST", "/predict", ("tandem", 200)),
        ("POST", "/", ("huggingface", 200)),
        ("GET", "/v2/health/live", ("oip", 200)),
        ("GET", "/v1/models/name", ("tensorflow", 200)),
        ("GET", "/ping", ("containers", 200)),
        ("GET", "/predict_image_class?image_url=http://x", ("url", 403)),
        ("GET", "/nothing", ("none", 404)),
        ("POST", "/predict?top_k=0", ("tandem", 422)),
    ],
)
def test_answers_are_observed_by_protocol_and_status(
    method: str, path: str, observed: tuple[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    kept = Kept(caplog)
    kept.ask(method, path, content=b"cat" if method == "POST" else None)
    ((protocol, status, seconds),) = kept.observed
    assert (protocol, status) == observed
    assert 0 < seconds < 10


def test_those_who_are_not_let_in_are_kept_too(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept(caplog, keys=(str(KEY),))
    kept.ask("POST", "/predict", headers={"x-api-key": "wrong-secret"})
    assert (kept.lines[0]["status"], kept.observed[0][:2]) == (401, ("none", 401))
    assert "wrong-secret" not in caplog.text


def test_a_client_that_goes_before_its_answer_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    kept = Kept(caplog)

    async def test() -> None:
        async def receive() -> Any:
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            raise AssertionError("nothing is sent")

        scope = {"type": "http", "method": "POST", "path": "/predict", "query_string": b"", "headers": []}
        task = asyncio.create_task(kept.app(scope, receive, send))
        await asyncio.sleep(0.05)
        task.cancel()
        await asyncio.wait([task])

    asyncio.run(test())
    assert (kept.lines[0]["status"], kept.observed[0][1]) == (CLIENT_GONE, CLIENT_GONE)


def test_of_all_nodes_metrics_those_of_tandem_are_gathered_under_one_description_each() -> None:
    head = (
        "# HELP ray_node_cpu CPU\n# TYPE ray_node_cpu gauge\nray_node_cpu 3\n"
        "# HELP ray_tandem_step_images Images in a step.\n# TYPE ray_tandem_step_images histogram\n"
        'ray_tandem_step_images_bucket{le="1.0",Node="a"} 5\nray_tandem_step_images_sum{Node="a"} 7\n'
        '# TYPE ray_tandem_lane_images_total counter\nray_tandem_lane_images_total{lane="online"} 7\n'
    )
    other = (
        "# HELP ray_tandem_step_images Images in a step.\n# TYPE ray_tandem_step_images histogram\n"
        'ray_tandem_step_images_bucket{le="1.0",Node="b"} 6\n'
    )
    assert ours([head, "", other]) == (
        "# HELP tandem_step_images Images in a step.\n# TYPE tandem_step_images histogram\n"
        'tandem_step_images_bucket{le="1.0",Node="a"} 5\ntandem_step_images_sum{Node="a"} 7\n'
        'tandem_step_images_bucket{le="1.0",Node="b"} 6\n'
        '# TYPE tandem_lane_images_total counter\ntandem_lane_images_total{lane="online"} 7\n'
    )
