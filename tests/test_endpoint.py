"""What the endpoint makes of the pool's answers, of replicas that die under a call, and of clients that leave."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from huggingface_hub import InferenceClient
from playwright.sync_api import expect
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError

from deployments.endpoint import _answer
from deployments.pool import APP as POOLS
from deployments.pool import app_name
from jobs.corpus import digits, encode, write_shards
from pipeline.errors import PoolFailed
from tests.browser import chromium
from tests.cluster import OPEN, Cluster, clean_environment
from tests.command import MODEL, Done, submitting, tandem


class Call:
    """A call to a replica: what awaiting it gives or raises. None hangs."""

    def __init__(self, result: object) -> None:
        self.result, self.cancelled = result, False

    def __await__(self) -> Generator[object, None, object]:
        if self.result is None:
            yield from asyncio.Event().wait().__await__()
        if isinstance(self.result, Exception):
            raise self.result
        return self.result

    def cancel(self) -> None:
        self.cancelled = True


def _ask(*results: object) -> tuple[object, int]:
    """What is answered where the calls end so one after another, and how many were made."""
    calls = iter(results)
    answer = asyncio.run(_answer(lambda: Call(next(calls))))
    return answer, len(results) - len(list(calls))


DIED = ActorDiedError()
UNAVAILABLE = ActorUnavailableError("gone for a while", None)


def test_one_call_is_enough_where_the_replica_lives() -> None:
    assert _ask("scores", "never asked for") == ("scores", 1)


@pytest.mark.parametrize("error", [DIED, UNAVAILABLE], ids=["died", "unavailable"])
def test_another_replica_is_asked_where_the_first_one_dies(error: Exception) -> None:
    assert _ask(error, "scores") == ("scores", 2)


def test_it_is_asked_once_again_and_not_for_ever() -> None:
    with pytest.raises(PoolFailed, match="the pool does not answer; try again later"):
        _ask(DIED, DIED, "never asked for")


def test_what_no_other_replica_would_do_better_is_not_tried_again() -> None:
    with pytest.raises(PoolFailed):
        _ask(GetTimeoutError(), "never asked for")


def test_a_caller_that_leaves_takes_its_call_along() -> None:
    async def test() -> None:
        call = Call(None)
        task = asyncio.create_task(_answer(lambda: call))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert call.cancelled

    asyncio.run(test())


def test_protocols_are_spoken_through_the_cluster(endpoint: str) -> None:
    some = digits()[:40]  # more than go to the pool in one call
    files = [encode(digit)[1] for digit in some]
    image = triton.InferInput("image", [len(files)], "BYTES")
    image.set_data_from_numpy(np.array(files, object))
    client = triton.InferenceServerClient(endpoint.removeprefix("http://"))

    labels = client.infer("digits-vit", [image]).as_numpy("label")
    (best,) = InferenceClient(model=endpoint).image_classification(files[0], top_k=1, function_to_apply="none")
    several = httpx.post(
        f"{endpoint}/predict?embedding=true", files=[("image", file) for file in (files[0], b"bad", files[1])]
    )

    client.close()
    assert np.mean([label.decode() == str(digit.label) for label, digit in zip(labels, some, strict=True)]) > 0.9
    assert (best.label, best.score > 1) == (labels[0].decode(), True)
    first, bad, second = several.json()["results"]
    assert [one["predictions"][0]["label"] for one in (first, second)] == [label.decode() for label in labels[:2]]
    assert len(first["embedding"]) == len(second["embedding"]) > 1
    assert bad.keys() == {"error"}


def test_a_request_is_in_the_log_and_among_the_metrics_of_the_cluster(endpoint: str) -> None:
    request_id = uuid.uuid4().hex
    _, file = encode(digits()[0])
    response = httpx.post(f"{endpoint}/predict", content=file, headers={"x-request-id": request_id})
    assert response.headers.get_list("x-request-id") == [request_id]

    (line,) = _until(lambda: _logged(request_id))
    told = json.loads(line)
    assert (told["route"], told["status"]) == ("/predict", 200)
    assert told["replica"] == response.headers["x-tandem-replica"]
    for counted in (
        r'^tandem_request_seconds_count\{.*protocol="tandem",status="200"\} [1-9]',
        r'^tandem_lane_images_total\{.*lane="online".*\} [1-9]',
        "^# TYPE tandem_step_seconds histogram$",
    ):
        assert _until(lambda: re.search(counted, _metrics(endpoint), re.MULTILINE))  # noqa: B023 -- called at once


def test_calls_to_the_pool_go_by_channels(endpoint: str) -> None:
    """All but the first, which Serve carries while they are opened."""
    for _ in range(40):
        httpx.post(f"{endpoint}/predict", content=encode(digits()[0])[1]).raise_for_status()
    _until(lambda: _calls(endpoint, "channel") >= 30)
    assert _calls(endpoint, "serve") >= 1
    assert _calls(endpoint, "channel") > _calls(endpoint, "serve")


def _calls(endpoint: str, way: str) -> float:
    counts = re.findall(rf'^tandem_online_calls_total\{{.*way="{way}".*\}} (\S+)', _metrics(endpoint), re.MULTILINE)
    return sum(map(float, counts))


def _logged(text: str) -> list[str]:
    """The lines of JSON with that text on the standard errors of Ray's workers, where Serve has lines of its own."""
    logs = Path("/tmp/ray/session_latest/logs").glob("worker-*.err")
    lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
    return [line for line in lines if text in line and line.startswith("{")]


def _metrics(endpoint: str) -> str:
    return httpx.get(f"{endpoint}/metrics", timeout=10).raise_for_status().text


def _until(found: Callable[[], Any]) -> Any:
    """What is found, as soon as it is: Ray's agents are told of metrics some seconds later."""
    deadline = time.monotonic() + 60
    while not (what := found()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return what


def test_the_page_shows_the_pool_and_how_far_a_job_is(address: str, endpoint: str, tmp_path: Path) -> None:
    for part in "abc":
        write_shards(tmp_path / "digits" / part)
    target = str(tmp_path / "out")
    seven = encode(next(digit for digit in digits() if digit.label == 7))[1]
    with chromium() as browser, submitting(address, str(tmp_path / "digits"), target) as job:
        page = browser.new_page()
        page.goto(endpoint)
        expect(page.locator("#rows tr")).to_have_count(1)
        page.locator("#files").set_input_files({"name": "seven.png", "mimeType": "image/png", "buffer": seven})
        expect(page.locator("#results ol li span").first).to_have_text("7")
        expect(page.get_by_role("progressbar", name=f"Progress of {target}")).to_be_visible(timeout=60_000)
        scores = re.compile(r"scores: \d+ of 30 shards, [1-9][\d,]* images")
        expect(page.locator("#list")).to_contain_text(scores, timeout=60_000)
        (told,) = httpx.get(f"{endpoint}/jobs").raise_for_status().json()["jobs"]
        assert (told["output"], told["shards"]) == (target, 30)
        assert job.wait(timeout=120) == 0
        expect(page.get_by_text("None runs.")).to_be_visible()
        requests = page.locator("#p50_ms").inner_text()
    assert requests.endswith(" ms")


def test_an_endpoint_is_replaced_under_requests_without_an_error_and_the_former_pool_is_ended(
    address: str, endpoint: str, tmp_path: Path
) -> None:
    """Here, and not only at its listener: the new process must listen before Serve ends the former."""
    other, config = str(shutil.copytree(MODEL, tmp_path / "other")), tmp_path / "changed.yaml"
    config.write_text("endpoint:\n  max_images: 63\n")
    many = [("image", b"bad")] * 64
    assert httpx.post(f"{endpoint}/predict", files=many).status_code == 200
    with _requests(endpoint) as failures:
        mistaken = _serve(str(tmp_path / "missing"), address, endpoint)
        assert mistaken.code == 1
        assert "no such folder" in mistaken.err
        assert _pools(address) == {app_name(MODEL)}

        served = _serve(other, address, endpoint, "--config", str(config))
        assert served.code == 0, served.err
        assert httpx.post(f"{endpoint}/predict", files=many).status_code == 413
        assert _pools(address) == {app_name(other)}

        served = _serve(MODEL, address, endpoint)  # back, for the tests that follow
        assert served.code == 0, served.err
        assert httpx.post(f"{endpoint}/predict", files=many).status_code == 200
        assert _pools(address) == {app_name(MODEL)}
    assert failures == []


def _serve(model: str, address: str, endpoint: str, *options: str) -> Done:
    """`tandem serve`, where the endpoint runs."""
    port = str(httpx.URL(endpoint).port)
    return tandem("serve", "--model", model, "--port", port, "--address", address, *options)


def _pools(address: str) -> set[str]:
    """The Serve applications that are pools."""
    told = httpx.get(f"{address}/api/serve/applications/", timeout=30).raise_for_status().json()
    return {name for name in told["applications"] if name.startswith(POOLS)}


@contextmanager
def _requests(endpoint: str) -> Iterator[list[httpx.HTTPError]]:
    """Clients that ask all the while; what they are told of errors."""
    ended, failures, (_, file) = threading.Event(), list[httpx.HTTPError](), encode(digits()[0])

    def ask() -> None:
        with httpx.Client(base_url=endpoint, timeout=60) as client:
            while not ended.is_set():
                try:
                    client.post("/predict", content=file).raise_for_status()
                except httpx.HTTPError as error:
                    failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        ended.set()
        for thread in threads:
            thread.join()


def test_a_client_that_hangs_up_is_not_scored(shared_cluster: Cluster, endpoint: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.hangups", shared_cluster.gcs_address, endpoint],
        env=clean_environment(OPEN), capture_output=True, text=True, timeout=120,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["hung_up"] >= 5, "the lane was not full"
    assert told["scored"] <= told["hung_up"] // 2  # one may be in a step already as its client leaves
