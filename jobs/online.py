"""A steady stream of online requests beside a job: the demo's other half.

The requests come from a process of their own (`python -m jobs.online`): in the process that drives the job they would
wait for its interpreter, and the latencies would tell of the client, not of the endpoint.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from deployments.web.scoring import REPLICA_HEADER
from jobs.corpus import digits, encode

TIMEOUT_S = 30.0


@dataclass
class Answers:
    """What came back: ms from the moment at which a request was due to its answer, and who scored how many."""

    latencies_ms: list[float] = field(default_factory=list)
    errors: int = 0
    replicas: Counter[str] = field(default_factory=Counter)


class Online:
    """The process that sends. It is started ahead, since that takes a second, and ends with the context."""

    def __init__(self, per_s: float) -> None:
        self.answers = Answers()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jobs.online", str(per_s)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    @contextmanager
    def to(self, url: str) -> Iterator[None]:
        """Sends to an endpoint for as long as the context lasts; then `answers` tells what came back."""
        assert self._process.stdin is not None
        self._process.stdin.write(url + "\n")
        self._process.stdin.flush()
        yield
        out, _ = self._process.communicate(timeout=TIMEOUT_S)  # closes its standard input, which stops it
        told = json.loads(out)
        self.answers = Answers(told["latencies_ms"], told["errors"], Counter(told["replicas"]))

    def __enter__(self) -> Online:
        return self

    def __exit__(self, *error: object) -> None:
        with self._process:  # closes the pipes and waits
            self._process.kill()


async def _send(url: str, per_s: float, stop: threading.Event) -> Answers:
    """One request every `1 / per_s` seconds, whether or not the last is answered: a stall cannot hide itself."""
    answers = Answers()
    bodies = itertools.cycle([encode(digit)[1] for digit in digits() if digit.held_out])
    started = time.monotonic()
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S) as client, asyncio.TaskGroup() as requests:
        for number in itertools.count():
            due = started + number / per_s
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if stop.is_set():
                break
            requests.create_task(_request(client, next(bodies), due, answers))
    return answers


async def _request(client: httpx.AsyncClient, body: bytes, due: float, answers: Answers) -> None:
    try:
        response = await client.post("/predict", params={"top_k": 1}, content=body)
        response.raise_for_status()
    except httpx.HTTPError:
        answers.errors += 1
        return
    answers.latencies_ms.append((time.monotonic() - due) * 1e3)
    answers.replicas[response.headers[REPLICA_HEADER]] += 1


def _set_at_end_of_input(stop: threading.Event) -> None:
    sys.stdin.read()
    stop.set()


def main() -> None:
    """Reads the URL from standard input, sends until that is closed, and prints what came back as JSON."""
    url = sys.stdin.readline().strip()
    stop = threading.Event()
    threading.Thread(target=_set_at_end_of_input, args=(stop,), daemon=True).start()
    answers = asyncio.run(_send(url, float(sys.argv[1]), stop))
    print(json.dumps(vars(answers)))


if __name__ == "__main__":
    main()
