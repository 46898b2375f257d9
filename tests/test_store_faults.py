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
from tests.faults import DEADLINE_S, Corpus, committing, driver, names_in, planning, staging, wait_for, write_digits
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


HELD = {
    "before the plan is written": (planning, rf"^PUT .*/{JobPaths.PLAN}"),
    "between the plan and what makes it count": (planning, rf"^PUT .*/{JobPaths.JOB}"),
    "between the last stage and the commit": (planning, r"^PUT .*\.parquet"),
    "between the commit and the end of the stage": (staging, r"^POST "),
    "between the last commit and _SUCCESS": (planning, rf"^PUT .*/{JobPaths.SUCCESS}"),
}


@pytest.mark.parametrize("moment", HELD)
def test_a_driver_that_is_killed_at_a_moment_is_followed_by_one_that_goes_on(
    moment: str, address: str, corpus: Corpus, proxy: Proxy, target: str
) -> None:
    store, (earlier, request) = open_store(target), HELD[moment]
    with submitting(address, corpus.url, target) as process:
        wait_for(earlier, store)
        with proxy.hold(request) as held:
            assert held.wait(DEADLINE_S)
            os.kill(driver(store), signal.SIGKILL)
            process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 1
    before = names_in(store)
    assert JobPaths.SUCCESS not in before

    again = submit(address, corpus.url, target)

    assert again.code == 0, again.err
    check_output(target, corpus.keys, corpus.undisturbed)


@pytest.mark.parametrize(
    "faults",
    [
        Faults(slow_down=0.1),
        Faults(reset=0.1, short=0.1),
        Faults(stall=0.03),
    ],
    ids=["503 on a tenth of all requests", "broken bodies", "stalls"],
)
def test_a_store_that_fails_now_and_then_costs_no_image(
    faults: Faults, address: str, corpus: Corpus, proxy: Proxy, target: str
) -> None:
    before = proxy.injected.copy()
    proxy.faults = faults

    done = submit(address, corpus.url, target)

    proxy.faults = Faults()
    assert done.code == 0, done.err
    check_output(target, corpus.keys, corpus.undisturbed)
    assert (proxy.injected - before).total() >= 3


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
