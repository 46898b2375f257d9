"""Whether the endpoint holds: most of what it can take, for long, from good clients among bad ones; then more.

    python benchmarks/hold.py                # 35 minutes: writes results
    python benchmarks/hold.py --minutes 2    # to see that it runs

First, images come at random (a Poisson process, whatever the answers do), at one rate after another: the capacity of
this machine's endpoint is the highest at which the p99 stays within 100 ms. Then they come at 90 % of that, one in
twenty of them broken, beside clients that send half a head, half a body, or hang up before their answer. Told: every
status by minute, latency by minute from the time at which a request was due, and the memory of the endpoint and of
the replica. Then capacity is measured once more, as machines that others share change their speed; and for a minute
requests come at three times the capacity.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter, defaultdict
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs as a script

from benchmarks.arrivals import arrivals
from benchmarks.online import IMAGE, P99_MS, Traffic, crowd, request_of, serving
from benchmarks.processes import family
from benchmarks.results import percentile, write_results

CLIENTS, WARM_S = 8, 5.0
RATES, RATE_S = range(100, 2001, 50), 10.0  # requests/s
SHARE, BAD_SHARE = 0.9, 0.05
TOO_MUCH, TOO_MUCH_S = 3.0, 60.0
BAD_CLIENTS_EVERY_S = 2.0
MEMORY_EVERY_S = 30.0


class Load:
    """What is sent, and what came back."""

    def __init__(self, port: int, server: int, seconds: float) -> None:
        self._port, self._server, self._traffic = port, server, Traffic(port)
        self._started_s = time.perf_counter()
        self._ends_s = self._started_s + seconds
        self.good: defaultdict[int, Counter[str]] = defaultdict(Counter)  # statuses by minute
        self.bad: defaultdict[int, Counter[str]] = defaultdict(Counter)
        self.unconnected: Counter[str] = Counter()  # bad clients that got no connection
        self.latencies_ms: defaultdict[int, list[float]] = defaultdict(list)
        self.memory_mb: list[dict[str, float]] = []

    async def run(self, per_s: float) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._bad_clients())
            group.create_task(self._watch_memory())
            async for due_s in arrivals(per_s, self._ends_s - self._started_s, random.Random()):
                group.create_task(self._request(due_s))
        self._traffic.close()

    async def _request(self, due_s: float) -> None:
        bad = random.random() < BAD_SHARE
        body = IMAGE[: random.randrange(1, len(IMAGE) // 2)] if bad else IMAGE
        head = f"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            status = (await self._traffic.ask(head.encode() + body)).split()[1].decode()
        except (OSError, asyncio.IncompleteReadError) as error:
            status = type(error).__name__
        minute = int((due_s - self._started_s) // 60)
        (self.bad if bad else self.good)[minute][status] += 1
        if status == "200":
            self.latencies_ms[minute].append((time.perf_counter() - due_s) * 1e3)

    async def _bad_clients(self) -> None:
        request = request_of("tandem")
        parts = [request[:30], request[: -len(IMAGE) // 2], request]
        async with asyncio.TaskGroup() as group:
            while time.perf_counter() < self._ends_s:
                for part, stays_s in zip(parts, (60.0, 60.0, 0.005), strict=True):
                    group.create_task(self._bad_client(part, stays_s))
                await asyncio.sleep(BAD_CLIENTS_EVERY_S)

    async def _bad_client(self, part: bytes, stays_s: float) -> None:
        """Sends a part, and waits until it is thrown out or has had enough."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError as error:
            self.unconnected[type(error).__name__] += 1
            return
        writer.write(part)
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(stays_s):
                await reader.read()
        writer.close()

    async def _watch_memory(self) -> None:
        while time.perf_counter() < self._ends_s:
            self.memory_mb.append({name: rss_mb(process) for name, process in actors(self._server).items()})
            await asyncio.sleep(MEMORY_EVERY_S)


def actors(server: int) -> dict[str, psutil.Process]:
    """The processes of the endpoint and of the pool's replica."""
    found = {}
    for process in family(server):
        with suppress(psutil.NoSuchProcess):
            title = " ".join(process.cmdline())
            if title.startswith("ray::ServeReplica:"):
                found["endpoint" if ":tandem-http:" in title else "replica"] = process
    return found


def rss_mb(process: psutil.Process) -> float:
    """Its resident memory."""
    return round(process.memory_info().rss / 2**20, 1)


def capacity_per_s(port: int) -> int:
    """The highest rate whose p99 is within bounds; two in a row that are not end the search."""
    request, fits, fails = request_of("tandem"), 0, 0
    asyncio.run(crowd(port, request, CLIENTS, WARM_S))
    for rate in RATES:
        latencies_ms = asyncio.run(Traffic(port).run(request, rate, RATE_S))
        if latencies_ms and percentile(latencies_ms, 0.99) <= P99_MS:
            fits, fails = rate, 0
            continue
        fails += 1
        if fails == 2:
            break
    return fits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    options = parser.parse_args()
    with serving("tandem", sys.executable) as (port, server):
        capacity = capacity_per_s(port)
        held = hold(port, server, SHARE * capacity, options.minutes * 60)
        after = capacity_per_s(port)
        too_much = hold(port, server, TOO_MUCH * after, TOO_MUCH_S)
    told = {"capacity_per_s": capacity, **held, "capacity_after_per_s": after, "too_much": too_much}
    print(json.dumps(told, indent=1))
    write_results("hold", {"minutes": options.minutes, **told})


def hold(port: int, server: int, per_s: float, seconds: float) -> dict[str, Any]:
    """What there is to tell of so many requests/s for so long."""
    load = Load(port, server, seconds)
    asyncio.run(load.run(per_s))
    return {"sent_per_s": round(per_s, 1), **summary(load)}


def summary(load: Load) -> dict[str, Any]:
    """What there is to tell of the load."""
    everything = [one for some in load.latencies_ms.values() for one in some]
    return {
        "good": sum(load.good.values(), Counter()),
        "good_by_minute": [some for _, some in sorted(load.good.items())],
        "bad": sum(load.bad.values(), Counter()),
        "bad_clients_without_connection": load.unconnected,
        "p50_ms": percentile(everything, 0.5),
        "p99_ms": percentile(everything, 0.99),
        "p99_ms_by_minute": [percentile(some, 0.99) for _, some in sorted(load.latencies_ms.items())],
        "memory_mb": load.memory_mb,
    }


if __name__ == "__main__":
    main()
