"""Jobs whose processes are killed: whatever dies, a finished job holds each image once."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobs.corpus import digits, encode
from jobs.spec import JobPaths
from pipeline.storage import Store, open_store
from tests.check import Best, check_output
from tests.command import submit, submitting
from tests.corpora import tar_of

COPIES = 3  # of the digits: a job of some seconds
DEADLINE_S = 60.0


@dataclass(frozen=True)
class Corpus:
    """An input, its keys, and what an undisturbed run makes of it."""

    url: str
    keys: list[str]
    undisturbed: dict[str, Best]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, address: str, endpoint: str) -> Corpus:
    folder = tmp_path_factory.mktemp("faults")
    store, keys = open_store(str(folder / "in")), []
    encoded = [(digit.key, *encode(digit)) for digit in digits()]
    some = {f"{key}-{copy}.{suffix}": data for copy in range(COPIES) for key, suffix, data in encoded}
    for number, start in enumerate(range(0, len(some), 150)):
        images = dict(list(some.items())[start : start + 150])
        store.write(f"{number:03}.tar", tar_of(images))
        keys += [name.partition(".")[0] for name in images]
    assert submit(address, store.url, str(folder / "out")).code == 0
    return Corpus(store.url, keys, check_output(str(folder / "out"), keys).best())


def staging(store: Store, names: list[str]) -> bool:
    return any(JobPaths.parse_staged(name) for name in names)


def planning(store: Store, names: list[str]) -> bool:
    return any(JobPaths.parse_lease(name) for name in names)


def committing(store: Store, names: list[str]) -> bool:
    return sum(name.endswith(".parquet") for name in names) >= 3


def nearly_done(store: Store, names: list[str]) -> bool:
    shards = store.read(JobPaths.PLAN).count(b"\n") if JobPaths.JOB in names else 10**6
    return sum(name.endswith(".parquet") for name in names) >= shards * 3 / 4


MOMENTS = [planning, staging, committing, nearly_done]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_driver_that_is_killed_is_followed_by_one_that_goes_on(
    moment: Callable[[Store, list[str]], bool], address: str, corpus: Corpus, tmp_path: Path
) -> None:
    target = open_store(str(tmp_path / "out"))
    with submitting(address, corpus.url, target.url) as process:
        wait_until(lambda: moment(target, names(target)))
        os.kill(driver(target), signal.SIGKILL)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1, err
    before = names(target)

    again = submit(address, corpus.url, target.url)

    assert again.code == 0, again.err
    check_output(target.url, corpus.keys, corpus.undisturbed)
    committed = sum(name.endswith(".parquet") for name in before)
    assert again.json["resumed"] >= committed  # the outputs that stood were not done again
    assert JobPaths.SUCCESS not in before


def test_a_driver_that_is_told_to_stop_ends_cleanly_and_can_be_followed_at_once(
    address: str, corpus: Corpus, tmp_path: Path
) -> None:
    target = open_store(str(tmp_path / "out"))
    with submitting(address, corpus.url, target.url) as process:
        wait_until(lambda: committing(target, names(target)))
        os.kill(driver(target), signal.SIGTERM)
        _, err = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "the job was stopped; submit it again to go on with it" in err
    assert not json.loads(target.read(JobPaths.lease(1)))["held"]

    assert submit(address, corpus.url, target.url).code == 0
    check_output(target.url, corpus.keys, corpus.undisturbed)


@pytest.mark.parametrize("victim", ["ServeReplica:tandem-pool", "MapWorker(MapBatches(_Caller))"])
def test_an_actor_that_is_killed_costs_no_image(victim: str, address: str, corpus: Corpus, tmp_path: Path) -> None:
    target = open_store(str(tmp_path / "out"))
    with submitting(address, corpus.url, target.url) as process:
        wait_until(lambda: staging(target, names(target)))
        (actor,) = [one for one in actors(address) if one["class_name"].startswith(victim)]
        os.kill(actor["pid"], signal.SIGKILL)
        out, err = process.communicate(timeout=150)

    assert process.returncode == 0, err
    check_output(target.url, corpus.keys, corpus.undisturbed)
    assert json.loads(out)["images"] >= len(corpus.keys)  # a chunk may have been scored twice; it is held once


def test_a_second_driver_on_the_same_output_is_refused_while_the_first_goes_on(
    address: str, corpus: Corpus, tmp_path: Path
) -> None:
    target = open_store(str(tmp_path / "out"))
    with submitting(address, corpus.url, target.url) as process:
        wait_until(lambda: planning(target, names(target)))
        second = submit(address, corpus.url, target.url)
        process.communicate(timeout=DEADLINE_S)

    assert process.returncode == 0
    check_output(target.url, corpus.keys, corpus.undisturbed)
    # refused, unless the first was done by the time that the second looked
    assert second.code == 1 or second.json["resumed"] == second.json["shards"]
    assert second.code == 0 or "another driver" in second.err


def names(store: Store) -> list[str]:
    return [info.name for info in store.list()]


def driver(store: Store) -> int:
    """The process id of the job's driver, as its lease tells it."""
    (lease,) = [name for name in names(store) if JobPaths.parse_lease(name)]
    process: int = json.loads(store.read(lease))["pid"]
    return process


def actors(address: str) -> list[dict[str, Any]]:
    """The cluster's living actors."""
    response = httpx.get(f"{address}/api/v0/actors", params={"detail": "true", "limit": 1000}, timeout=30)
    found: list[dict[str, Any]] = response.raise_for_status().json()["data"]["result"]["result"]
    return [actor for actor in found if actor["state"] == "ALIVE"]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    for _ in itertools.takewhile(lambda _: not condition(), itertools.count()):
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.002)
