"""Who comes in with which key, for what and how often; and that without one nothing is read, nor told."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from deployments.config import EndpointConfig
from deployments.web.app import build_app
from deployments.web.keys import Key, Keys, Scope, new_key, parse_keys
from pipeline.errors import UsageError
from tests.command import tandem
from tests.servers import ask
from tests.test_web import Pool

PREDICT, PREDICT_KEY = new_key("nightly", [Scope.PREDICT])
ADMIN, ADMIN_KEY = new_key("watch", [Scope.ADMIN])
KEYS = (str(PREDICT_KEY), str(ADMIN_KEY))
SCORING = ["/predict", "/", "/models/x", "/invocations", "/v2/models/name/infer", "/v1/models/name:predict", "/v"]


def _ask(method: str, path: str, *, config: EndpointConfig | None = None, **options: Any) -> httpx.Response:
    config = config or EndpointConfig(keys=KEYS, health_route="/h", predict_route="/v")
    return ask(build_app(Pool(), config), method, path, **options)


def _bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


@pytest.mark.parametrize("path", SCORING)
def test_no_route_that_scores_is_reached_without_a_key(path: str) -> None:
    response = _ask("POST", path, content=b"cat")
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["content-type"] == "application/problem+json"
    assert "send it as Authorization: Bearer KEY" in response.json()["detail"]
    assert response.json()["error"] == response.json()["detail"]


def test_what_is_not_known_is_not_told_to_strangers() -> None:
    for path in ("/nothing", "/v2/models/name", "/v1/models/name", "/predict_image_class", "/healthz/"):
        assert _ask("GET", path).status_code == 401, path


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/ping", "/h", "/v2/health/live", "/openapi.json"])
def test_probes_need_no_key(path: str) -> None:
    assert _ask("GET", path).status_code == 200
    assert _ask("POST", path).status_code == 401


@pytest.mark.parametrize("headers", [_bearer(PREDICT), {"authorization": f"bearer  {PREDICT}"}, {"x-api-key": PREDICT}])
def test_a_key_lets_its_holder_in(headers: dict[str, str]) -> None:
    assert _ask("POST", "/predict", content=b"cat", headers=headers).json()["predictions"][0]["label"] == "cat"


@pytest.mark.parametrize(
    "secret",
    [PREDICT[:-1], PREDICT + "x", PREDICT.upper(), PREDICT_KEY.sha256, "é", " "],
    ids=["shorter", "longer", "other case", "digest", "not ASCII", "blank"],
)
def test_another_one_does_not(secret: str) -> None:
    response = _ask("POST", "/predict", content=b"cat", headers={"x-api-key": secret.encode()})
    assert response.status_code == 401
    assert "nightly" not in response.text


def test_a_body_is_not_read_before_the_key() -> None:
    async def body() -> Any:
        raise AssertionError("the body was read")
        yield b""

    assert _ask("POST", "/predict", content=body()).status_code == 401


def test_a_key_is_for_its_scopes() -> None:
    assert _ask("GET", "/metrics", headers=_bearer(PREDICT)).status_code == 403
    assert _ask("GET", "/metrics", headers=_bearer(ADMIN)).status_code != 403
    assert _ask("POST", "/predict", content=b"cat", headers=_bearer(ADMIN)).status_code == 200


def test_jobs_are_told_to_keys_for_jobs() -> None:
    async def jobs() -> list[dict[str, Any]]:
        return [{"output": "s3://bucket/out", "images": 3}]

    secret, key = new_key("nightly-check", [Scope.JOBS])
    app = build_app(Pool(), EndpointConfig(keys=(str(key), *KEYS)), jobs=jobs)
    assert ask(app, "GET", "/jobs", headers=_bearer(PREDICT)).status_code == 403
    for allowed in (secret, ADMIN):
        assert ask(app, "GET", "/jobs", headers=_bearer(allowed)).json() == {
            "jobs": [{"output": "s3://bucket/out", "images": 3}]
        }
    for other in ("/metrics", "/status"):
        assert ask(app, "GET", other, headers=_bearer(secret)).status_code == 403
    assert ask(app, "POST", "/predict", content=b"cat", headers=_bearer(secret)).status_code == 403


def test_openapi_tells_which_routes_want_a_key() -> None:
    app = build_app(Pool(), EndpointConfig(keys=KEYS, health_route="/h"))
    for _ in range(2):  # it is kept between calls
        paths = app.openapi()["paths"]
        assert paths["/predict"]["post"]["security"] == [{"bearer": []}, {"header": []}]
        assert {"401", "403", "429"} <= paths["/predict"]["post"]["responses"].keys()
        for probe in ("/healthz", "/h", "/v2/health/live"):
            assert "security" not in paths[probe]["get"]
            assert "401" not in paths[probe]["get"]["responses"]
    assert "security" not in build_app(Pool(), EndpointConfig()).openapi()["paths"]["/predict"]["post"]


def test_a_key_that_asks_too_often_is_told_when_to_come_again() -> None:
    app = build_app(Pool(), EndpointConfig(keys=KEYS, rate_per_s=0.01))

    first, second, other = (
        ask(app, "POST", "/predict", content=b"cat", headers=_bearer(secret)) for secret in (PREDICT, PREDICT, ADMIN)
    )
    assert [one.status_code for one in (first, second, other)] == [200, 429, 200]
    assert 0 < int(second.headers["retry-after"]) <= 100


def test_the_rate_is_kept_over_time_with_a_burst_of_one_second() -> None:
    now_s = 0.0
    keys = Keys([PREDICT_KEY], 10.0, clock=lambda: now_s)
    passed = 0
    for tick in range(1000):
        now_s = tick / 100
        passed += keys.wait_s(PREDICT_KEY) == 0
    assert passed == pytest.approx(10 * 10 + 10, abs=1)
    now_s += 100
    assert sum(keys.wait_s(PREDICT_KEY) == 0 for _ in range(20)) == 10
    assert keys.wait_s(PREDICT_KEY) == pytest.approx(0.1)


def test_lines_of_keys_come_back() -> None:
    for key in (PREDICT_KEY, ADMIN_KEY, new_key("both", [Scope.ADMIN, Scope.PREDICT])[1]):
        assert Key.parse(str(key)) == key
    assert parse_keys(f"# team\n\n{PREDICT_KEY}\n  {ADMIN_KEY}  ") == KEYS
    for name in ("", "two words", "a\nb", "x" * 65):
        with pytest.raises(UsageError, match="cannot be a key's"):
            new_key(name, [Scope.PREDICT])


def test_the_command_makes_a_key_that_lets_in_and_keeps_it_nowhere() -> None:
    done = tandem("key", "nightly")
    line, secret = done.out.strip(), done.err.split()[-1]
    assert (done.code, secret in line) == (0, False)
    config = EndpointConfig(keys=(line,))
    assert _ask("POST", "/predict", config=config, content=b"cat", headers=_bearer(secret)).status_code == 200
    made = tandem("key", "watch", "--scope", "admin", "--scope", "predict", "--json").json
    assert Key.parse(made["line"]).scopes == {Scope.ADMIN, Scope.PREDICT}
    assert tandem("key", "two words").code == 2
    assert tandem("key", "x", "--scope", "all").code == 2


def test_an_endpoint_that_others_reach_is_not_started_without_keys() -> None:
    done = tandem("serve", "--model", "some/model", "--host", "0.0.0.0")
    assert (done.code, done.out) == (2, "")
    assert "--host 0.0.0.0 is reached from other machines, so the endpoint needs keys" in done.err
