"""The jobs that run on the cluster now, for whoever watches.

Their drivers tell Ray's head, in its key-value store, since they know nobody else whom an endpoint knows as well. What
a driver told last is left out once it is old, as that of a driver that was killed would stay for ever.
"""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from ray.experimental import internal_kv

NAMESPACE = "tandem"
AGAIN_S = 20.0
STALE_S = 60.0  # more than clocks of a cluster's nodes differ


@contextmanager
def posted(**job: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that posts how far the job is. That stays posted, and is taken down as the context ends.

    A job may be silent for long: while nodes come for its pool, for one.
    """
    key, last, ended = f"job:{uuid.uuid4().hex}", {}, threading.Event()

    def post(progress: Mapping[str, Any]) -> None:
        nonlocal last
        last = {**job, **progress}
        tell()

    def tell() -> None:
        with suppress(Exception):  # a job does not end because nobody can watch it
            entry = json.dumps({**last, "told_at_s": time.time()})
            internal_kv._internal_kv_put(key, entry, namespace=NAMESPACE)

    def go_on() -> None:
        while not ended.wait(AGAIN_S):
            if last:
                tell()

    thread = threading.Thread(target=go_on, name="tandem-board", daemon=True)
    thread.start()
    try:
        yield post
    finally:
        ended.set()
        thread.join()
        with suppress(Exception):
            internal_kv._internal_kv_del(key, namespace=NAMESPACE)


def running_jobs() -> list[dict[str, Any]]:
    """What the drivers of running jobs have told last, those that run the longest first. It blocks."""
    keys = internal_kv._internal_kv_list("job:", namespace=NAMESPACE)
    entries = (internal_kv._internal_kv_get(key, namespace=NAMESPACE) for key in keys)
    return current([entry for entry in entries if entry], time.time())  # one may have ended meanwhile


def current(entries: Iterable[bytes], now_s: float) -> list[dict[str, Any]]:
    """The jobs of the entries that are not old."""
    jobs = [json.loads(entry) for entry in entries]
    told = [job for job in jobs if now_s - job.pop("told_at_s") < STALE_S]
    return sorted(told, key=lambda job: -float(job["elapsed_s"]))
