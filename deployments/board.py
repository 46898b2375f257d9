"""The jobs that run on the cluster now, for whoever watches.

Their drivers tell Ray's head, in its key-value store, since they know nobody else whom an endpoint knows as well. What
a driver told last is left out once it is old, as that of a driver that was killed would stay for ever.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from ray.experimental import internal_kv

NAMESPACE = "tandem"
STALE_S = 60.0  # more than clocks of a cluster's nodes differ


@contextmanager
def posted(**job: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A function that posts how far the job is; what is posted is taken down as the context ends."""
    key = f"job:{uuid.uuid4().hex}"

    def post(progress: Mapping[str, Any]) -> None:
        entry = {**job, **progress, "told_at_s": time.time()}
        with suppress(Exception):  # a job does not end because nobody can watch it
            internal_kv._internal_kv_put(key, json.dumps(entry), namespace=NAMESPACE)

    try:
        yield post
    finally:
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
