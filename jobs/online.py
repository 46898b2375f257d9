"""A steady stream of online requests beside a job: the demo's other half."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType

import httpx

from deployments.web import REPLICA_HEADER
from jobs.corpus import Digit, encode

TIMEOUT_S = 30.0


class Online:
    """Sends digits to an endpoint, one every `1 / per_s` seconds whether or not the last is answered, from a thread.

    Latencies count from the moment at which a request was due, so that a stalled server cannot hide its stall.
    """

    def __init__(self, url: str, images: Sequence[Digit], per_s: float) -> None:
        self.latencies_ms: list[float] = []
        self.errors = 0
        self.replicas: Counter[str] = Counter()
        self._url, self._per_s = url, per_s
        self._bodies = itertools.cycle([encode(digit)[1] for digit in images])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._send()), name="tandem-online")

    def __enter__(self) -> Online:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    async def _send(self) -> None:
        started = time.monotonic()
        async with httpx.AsyncClient(base_url=self._url, timeout=TIMEOUT_S) as client, asyncio.TaskGroup() as requests:
            for number in itertools.count():
                due = started + number / self._per_s
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                if self._stop.is_set():
                    return
                requests.create_task(self._request(client, next(self._bodies), due))

    async def _request(self, client: httpx.AsyncClient, body: bytes, due: float) -> None:
        try:
            response = await client.post("/predict", params={"top_k": 1}, content=body)
            response.raise_for_status()
        except httpx.HTTPError:
            self.errors += 1
            return
        self.latencies_ms.append((time.monotonic() - due) * 1e3)
        self.replicas[response.headers[REPLICA_HEADER]] += 1
