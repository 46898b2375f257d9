"""Jobs on a real S3 store that fails: slow, broken off, gone; and drivers killed at exact moments of their requests."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from jobs.spec import JobPaths
from pipeline import s3
from pipeline.storage import open_store
from tests.check import check_output
from tests.command import submit, submitting
from tests.conftest import Demo, lead_to_store, new_bucket
from tests.faults import DEADLINE_S, Corpus, committing, driver, names_in, wait_for, wait_until, write_digits
from tests.proxy import Faults, Proxy
from tests.stores import Radosgw

OUTAGE_S = 10.0


@pytest.fixture(scope="module")
def proxy(radosgw: Radosgw) -> Iterator[Proxy]:
    with Proxy(radosgw.port) as proxy:
        yield proxy


@pytest.fixture(autouse=True)
def through_proxy(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The commands of a test speak to the store through the proxy."""
    lead_to_store(monkeypatch, proxy.port)
    yield
    proxy.faults = Faults()
    s3._client.cache_clear()


@pytest.fixture(scope="module")
def corpus(radosgw: Radosgw, demo: Demo, address: str, endpoint: str) -> Iterator[Corpus]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        lead_to_store(monkeypatch, radosgw.port)
        yield write_digits(open_store(f"s3://{new_bucket()}/in"), demo, share=0.5)


@pytest.fixture
def target(corpus: Corpus) -> str:
    return f"s3://{new_bucket()}/out"


# What the driver is about to ask of the store: where it has written neither plan nor what makes it count, between the
# last stage of a shard and its commit, between a commit and the end of its stage, between the last commit and _SUCCESS.
MOMENTS = tuple(
    f"^{request}" for request in (f"PUT .*/{JobPaths.PLAN}", f"PUT .*/{JobPaths.JOB}", r"PUT .*\.parquet", "POST ",
                                  f"PUT .*/{JobPaths.SUCCESS}")
)  # fmt: skip


def test_drivers_that_are_killed_at_each_moment_are_followed_by_one_that_finishes(
    address: str, corpus: Corpus, proxy: Proxy, target: str
) -> None:
    store = open_store(target)
    for request in MOMENTS:
        before = names_in(store)
        with submitting(address, corpus.url, target) as process:
            wait_until(lambda: _has_come(request, before, names_in(store)))  # noqa: B023 -- called at once
            with proxy.hold(request) as held:
                assert held.wait(DEADLINE_S)
                os.kill(driver(store), signal.SIGKILL)
                process.communicate(timeout=DEADLINE_S)
            assert process.returncode == 1
        assert JobPaths.SUCCESS not in names_in(store)

    done = submit(address, corpus.url, target)

    assert done.code == 0, done.err
    assert done.json["run_images"] == 0  # all of them stood
    assert done.json["scored"] == len(corpus.keys)
    check_output(target, corpus.keys, corpus.undisturbed)


def _has_come(request: str, before: list[str], now: list[str]) -> bool:
    """Whether the driver has OUTPUT and, as it drops other things before that, has committed a shard."""
    leased = max(filter(JobPaths.parse_lease, now), default="") > max(filter(JobPaths.parse_lease, before), default="")
    committed = sum(name.endswith(".parquet") for name in now) > sum(name.endswith(".parquet") for name in before)
    return leased and (committed or not request.startswith("^POST"))


def test_a_store_that_fails_now_and_then_costs_no_image(
    address: str, corpus: Corpus, proxy: Proxy, target: str
) -> None:
    before = proxy.injected.copy()
    proxy.faults = Faults(slow_down=0.1, reset=0.05, short=0.05, stall=0.02)

    done = submit(address, corpus.url, target)

    proxy.faults = Faults()
    assert done.code == 0, done.err
    check_output(target, corpus.keys, corpus.undisturbed)
    injected = proxy.injected - before
    assert injected["slow_down"] >= 3
    assert injected["reset"] + injected["short"] + injected["stall"] >= 3


def test_a_store_that_is_gone_for_a_while_is_waited_for(
    address: str, corpus: Corpus, radosgw: Radosgw, target: str
) -> None:
    store = open_store(target)

    def outage() -> None:
        radosgw.kill_gateway()
        time.sleep(OUTAGE_S)
        radosgw.start_gateway()

    with submitting(address, corpus.url, target) as process:
        wait_for(committing, store)
        out = threading.Thread(target=outage)
        out.start()
        _, err = process.communicate(timeout=150)
        out.join()

    assert process.returncode == 0, err
    check_output(target, corpus.keys, corpus.undisturbed)


def test_an_output_that_may_not_be_written_is_told_before_any_work(
    address: str, corpus: Corpus, proxy: Proxy, target: str
) -> None:
    bucket = target.removeprefix("s3://").partition("/")[0]
    s3._client().put_bucket_policy(Bucket=bucket, Policy=_read_only(bucket))
    started_s = time.monotonic()

    done = submit(address, corpus.url, target)

    assert done.code == 1
    assert "the store refuses access" in done.err
    assert target in done.err
    assert time.monotonic() - started_s < 30
    assert names_in(open_store(target)) == []


def _read_only(bucket: str) -> str:
    return (
        '{"Version": "2012-10-17", "Statement": [{"Effect": "Deny", "Principal": "*", "Action": "s3:PutObject", '
        f'"Resource": "arn:aws:s3:::{bucket}/*"' + "}]}"
    )
