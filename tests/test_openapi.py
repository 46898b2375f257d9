"""What the endpoint says of itself in OpenAPI is what it does, whatever it is sent."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from deployments.config import EndpointConfig
from deployments.web.app import build_app
from tests.images import real_images
from tests.local_scorer import LocalScorer

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


APP = build_app(LocalScorer(), EndpointConfig(health_route="/health", predict_route="/vertex:predict"))


@schemathesis.openapi.from_asgi("/openapi.json", APP).parametrize()
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
def test_answers_are_those_that_are_documented(case: Any) -> None:
    case.call_and_validate(checks=CHECKS)


def test_damaged_images_are_answered_with_what_is_wrong_and_cost_no_memory() -> None:
    rng = random.Random(5)
    small = sorted(real_images().values(), key=len)[:12]

    async def ask(requests: int) -> None:
        transport = httpx.ASGITransport(APP)
        async with httpx.AsyncClient(transport=transport, base_url="http://tandem") as client:
            for _ in range(requests):
                response = await client.post("/predict", content=_damaged(rng, rng.choice(small)))
                assert response.status_code in (200, 422), response.text

    asyncio.run(ask(100))
    before_mb = _resident_mb()
    asyncio.run(ask(400))
    assert _resident_mb() - before_mb < 30


def _damaged(rng: random.Random, image: bytes) -> bytes:
    """The image with some bytes changed, and perhaps a part of it cut out or said twice."""
    damaged = bytearray(image)
    for _ in range(rng.randint(1, 20)):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    start, stop = sorted(rng.randrange(len(damaged)) for _ in range(2))
    kind = rng.randrange(3)
    return (
        bytes(damaged) if kind == 0 else bytes(damaged[:start] + (damaged[start:stop] * (kind == 1)) + damaged[start:])
    )


def _resident_mb() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1e3
