"""What tests that kill have in common: an input, the moments of a job, and its processes."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.corpus import digits, encode
from jobs.spec import JobPaths
from pipeline.storage import Store
from tests.check import Best, read_output
from tests.cluster import cluster_state
from tests.command import TOP_K
from tests.conftest import Demo
from tests.corpora import tar_of

IMAGES_PER_SHARD = 60
DEADLINE_S = 90.0

Moment = Callable[[Store, list[str]], bool]


@dataclass(frozen=True)
class Corpus:
    """An input, its keys, and what an undisturbed run makes of it."""

    url: str
    keys: list[str]
    undisturbed: Mapping[str, Best]


def write_digits(
    store: Store, demo: Demo, *, share: float = 1.0, copies: int = 1, per_shard: int = IMAGES_PER_SHARD
) -> Corpus:
    """Writes a share of the digits, `copies` times under other keys, in shards.

    The demo's run of them is the undisturbed one.
    """
    output = read_output(str(demo.folder / demo.done.json["output"])).best()
    every = digits()
    chosen = [(digit.key, *encode(digit)) for digit in every[: int(len(every) * share)]]
    members = {f"{key}-{copy}.{suffix}": data for copy in range(copies) for key, suffix, data in chosen}
    for number, start in enumerate(range(0, len(members), per_shard)):
        some = itertools.islice(members.items(), start, start + per_shard)
        store.write(f"{number:04}.tar", tar_of(dict(some)))
    undisturbed = {
        f"{key}-{copy}": (labels[:TOP_K], scores[:TOP_K])
        for copy in range(copies)
        for key, _, _ in chosen
        for labels, scores in [output[key]]
    }
    return Corpus(store.url, list(undisturbed), undisturbed)


def planning(store: Store, names: list[str]) -> bool:
    """A driver has the lease, and no plan yet."""
    return any(JobPaths.parse_lease(name) for name in names)


def staging(store: Store, names: list[str]) -> bool:
    """A chunk is staged."""
    return any(JobPaths.parse_staged(name) for name in names)


def committing(store: Store, names: list[str]) -> bool:
    """Some shards are committed."""
    return sum(name.endswith(".parquet") for name in names) >= 3


def nearly_done(store: Store, names: list[str]) -> bool:
    """Three quarters of the shards are committed."""
    shards = json.loads(store.read(JobPaths.JOB))["shards"] if JobPaths.JOB in names else 10**6
    return sum(name.endswith(".parquet") for name in names) >= shards * 3 / 4


def wait_for(moment: Moment, store: Store) -> None:
    """Waits until OUTPUT shows that the moment has come."""
    wait_until(lambda: moment(store, names_in(store)))


def wait_until(condition: Callable[[], bool], within_s: float = DEADLINE_S) -> None:
    """Waits until the condition holds."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.002)


def names_in(store: Store) -> list[str]:
    return [info.name for info in store.list()]


def driver(store: Store) -> int:
    """The process id of the job's driver, as its lease tells it."""
    newest = max(name for name in names_in(store) if JobPaths.parse_lease(name))
    process: int = json.loads(store.read(newest))["pid"]
    return process


def actors(address: str) -> list[dict[str, Any]]:
    """The cluster's living actors."""
    return [actor for actor in cluster_state(address, "actors") if actor["state"] == "ALIVE"]


def workers(address: str) -> list[dict[str, Any]]:
    """The cluster's living worker processes."""
    return [
        worker
        for worker in cluster_state(address, "workers")
        if worker["is_alive"] and worker["worker_type"] == "WORKER"
    ]


def title(process: int) -> str:
    """What a Ray worker does now, which is how it calls itself; empty once it is gone."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text().strip("\0")
    except (FileNotFoundError, ProcessLookupError):
        return ""
