"""The endpoint beside what people would serve a model with instead, on this machine, with the small model that ships.

    python benchmarks/online.py            # half an hour: writes results
    python benchmarks/online.py --json     # the same, with one JSON object as the last line

Tandem, LitServe with its own batching, FastAPI with a pipeline of transformers, and Ray Serve with `@serve.batch` (with
one hop, and with two as Tandem has) take turns, each with a fresh server in each round. Each is checked to give the
right class first.

First, clients are closed loops: each sends an image, waits for the answer, and sends the next one. Of each number of
clients: requests/s, p50, p99, and the CPU time of a request, in all processes of the server. Then requests come at
random (a Poisson process), whatever the answers do, at one rate after another until the server falls behind; a latency
is counted from the time at which its request was due.

Then the same with the model on a simulated accelerator, which takes time (ten times that of ViT-B/16 on an H200) and no
CPU: what is measured is all that is around a model.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs as a script

from benchmarks.arrivals import arrivals
from benchmarks.processes import Cpu, stop
from benchmarks.results import percentile, write_results
from jobs.corpus import digits, encode
from jobs.models import shipped
from tests.stores import free_ports

ROOT = Path(__file__).resolve().parents[1]
MODEL = str(shipped("digits-vit"))
SYSTEMS = ("tandem", "litserve", "fastapi", "ray_serve", "ray_serve_two")
PEERS = ("litserve==0.2.19", "pyzmq==27.3.0")
CLIENTS = (1, 8, 16, 32, 128)
RATES = (50, 100, 150, 200, 250, 300, 400, 500)  # requests/s
BEHIND_MS, MOST_WAITING = 500.0, 1000  # where a server has fallen behind
WARM_S, START_S, P99_MS = 3.0, 120.0, 100.0
STRETCH = 10.0
DEVICES = {"cpu": 0.0, "simulated": STRETCH}  # and how far time is stretched there
DIGIT = digits()[0]
_, IMAGE = encode(DIGIT)
CONNECTIONS = 64
BOUNDARY = "of-the-benchmark"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=4.0, help="at each number of clients")
    parser.add_argument("--systems", nargs="+", default=SYSTEMS, choices=SYSTEMS)
    parser.add_argument("--devices", nargs="+", default=tuple(DEVICES), choices=tuple(DEVICES))
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    peers = peers_python()
    results = {}
    for device in options.devices:
        found: dict[str, list[dict[str, Any]]] = {system: [] for system in options.systems}
        for _ in range(options.rounds):
            for system, rounds in found.items():
                with serving(system, peers, DEVICES[device]) as (port, server):
                    rounds.append(measure(system, port, server, options.seconds))
        results[device] = {system: summary(rounds) for system, rounds in found.items()}
        print(f"{device}:\n{table(results[device])}")
    if options.systems == SYSTEMS and options.devices == tuple(DEVICES):
        write_results(
            "online", {"rounds": options.rounds, "seconds": options.seconds, "stretch": STRETCH, "devices": results}
        )
    if options.json:
        print(json.dumps(results))


def peers_python() -> str:
    """An interpreter that has this environment's packages, and the peers' beside them."""
    folder = ROOT / "benchmarks" / ".venv-peers"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        (site,) = folder.glob("lib/python*/site-packages")
        ours = next(path for path in sys.path if path.endswith("site-packages"))
        (site / "ours.pth").write_text(ours + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", "-c", ROOT / "constraints.txt", *PEERS], check=True)
    return str(python)


@contextmanager
def serving(system: str, peers: str, stretch: float = 0.0) -> Iterator[tuple[int, int]]:
    """The port at which the system answers, and its process's id, for as long as the context lasts.

    With `stretch` its model runs on a simulated accelerator, in time that is stretched so.
    """
    (port,) = free_ports(1)
    script = [peers, str(ROOT / "benchmarks" / "online_peers.py"), system, str(port), MODEL]
    ours = [str(Path(sys.executable).parent / "tandem"), "serve", "--model", MODEL, "--port", str(port)]
    if stretch:
        ours = [sys.executable, str(ROOT / "benchmarks" / "online_own.py"), str(port), MODEL]
    with tempfile.TemporaryFile() as log, tempfile.TemporaryDirectory() as state:
        environment = {**os.environ, "XDG_STATE_HOME": state, "RAY_USAGE_STATS_ENABLED": "0"}
        environment |= {"PYTHONPATH": str(ROOT), "STRETCH": str(stretch)}  # replicas of Serve, too, import from here
        command = ours if system == "tandem" else script
        with subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True) as process:
            try:
                wait_ready(system, port, process, check=not stretch)
                yield port, process.pid
            finally:
                stop(process)


def request_of(system: str) -> bytes:
    """An HTTP request as the system wants it."""
    form = system in ("fastapi", "litserve")
    kind, body = "application/octet-stream", IMAGE
    if form:
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="digit.png"\r\n\r\n'
        kind, body = f"multipart/form-data; boundary={BOUNDARY}", head.encode() + IMAGE + f"\r\n--{BOUNDARY}--".encode()
    path = "/predict" if system in ("fastapi", "litserve", "tandem") else "/"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def wait_ready(system: str, port: int, process: subprocess.Popen[bytes], *, check: bool) -> None:
    """Waits for an answer, and checks that it is the digit's class where asked to."""
    head, _, body = request_of(system).partition(b"\r\n\r\n")
    path = head.split()[1].decode()
    headers = {"content-type": head.partition(b"Content-Type: ")[2].partition(b"\r\n")[0].decode()}
    deadline = time.monotonic() + START_S
    while True:
        assert process.poll() is None and time.monotonic() < deadline, f"{system} does not come up"  # noqa: PT018
        try:
            response = httpx.post(f"http://127.0.0.1:{port}{path}", content=body, headers=headers, timeout=30)
        except httpx.HTTPError:
            time.sleep(0.2)
            continue
        if response.is_success:
            told = response.json()
            best = (told["predictions"] if system == "tandem" else told)[0]
            assert not check or best["label"] == str(DIGIT.label), f"{system} takes a {DIGIT.label} for {best}"
            return
        time.sleep(0.2)


def measure(system: str, port: int, server: int, seconds: float) -> dict[str, Any]:
    """Of each number of clients and each rate what is seen, and what it costs the server."""
    request, loops, rates = request_of(system), {}, {}
    asyncio.run(crowd(port, request, 8, WARM_S))
    for clients in CLIENTS:
        with Cpu(server) as cpu:
            latencies_ms, took_s = asyncio.run(crowd(port, request, clients, seconds))
        loops[str(clients)] = {
            "requests_per_s": round(len(latencies_ms) / took_s, 1),
            "p50_ms": percentile(latencies_ms, 0.5),
            "p99_ms": percentile(latencies_ms, 0.99),
            "cpu_ms_per_request": round(cpu.used_s / len(latencies_ms) * 1e3, 2),
        }
    for rate in RATES:
        latencies_ms = asyncio.run(Traffic(port).run(request, rate, seconds))
        if not latencies_ms:
            break
        rates[str(rate)] = {"p50_ms": percentile(latencies_ms, 0.5), "p99_ms": percentile(latencies_ms, 0.99)}
        if rates[str(rate)]["p99_ms"] > BEHIND_MS:
            break
    return {"closed": loops, "open": rates}


async def crowd(port: int, request: bytes, clients: int, seconds: float) -> tuple[list[float], float]:
    """Clients that ask for so long; the ms of each request, and the time that it took all."""
    latencies_ms: list[float] = []
    started_s = time.perf_counter()
    ends_s = started_s + seconds

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (sent_s := time.perf_counter()) < ends_s:
            writer.write(request)
            head = await read_answer(reader)
            assert b" 200 " in head.split(b"\r\n", 1)[0], head
            latencies_ms.append((time.perf_counter() - sent_s) * 1e3)
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return latencies_ms, time.perf_counter() - started_s


async def read_answer(reader: asyncio.StreamReader) -> bytes:
    """Reads an answer to its end; its status and headers in lower case."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
    if length:
        await reader.readexactly(int(length))
    else:
        await reader.readuntil(b"\r\n0\r\n\r\n")  # it comes in chunks
    return head


class Traffic:
    """Requests that come at random, on connections that are kept."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def run(self, request: bytes, per_s: float, seconds: float) -> list[float]:
        """The ms of each request, from when it was due; none where the server has fallen too far behind."""
        latencies_ms: list[float] = []
        waiting: set[asyncio.Task[None]] = set()
        randoms = random.Random(per_s)  # the same for each system

        async def one(due_s: float) -> None:
            head = await self.ask(request)
            assert b" 200 " in head.split(b"\r\n", 1)[0], head
            latencies_ms.append((time.perf_counter() - due_s) * 1e3)

        async for due_s in arrivals(per_s, seconds, randoms):
            if len(waiting) >= MOST_WAITING:
                break
            waiting.add(task := asyncio.create_task(one(due_s)))
            task.add_done_callback(waiting.discard)
        fell_behind = len(waiting) >= MOST_WAITING
        await asyncio.gather(*waiting)
        self.close()
        return [] if fell_behind else latencies_ms

    async def ask(self, request: bytes) -> bytes:
        """The status and the headers of the answer, in lower case."""
        reader, writer = self._kept() or await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(request)
        head = await read_answer(reader)
        if len(self._idle) < CONNECTIONS and b"connection: close" not in head:
            self._idle.append((reader, writer))
        else:
            writer.close()
        return head

    def _kept(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """A connection that the server has not closed meanwhile."""
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():
                return reader, writer
            writer.close()
        return None

    def close(self) -> None:
        """Leaves the connections on which nothing waits."""
        while self._idle:
            self._idle.pop()[1].close()


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of the rounds, and the most requests/s whose p99 stays within 100 ms: of clients, and of rates."""
    loops, rates = (_medians([one[kind] for one in rounds]) for kind in ("closed", "open"))
    fits = [one["requests_per_s"] for one in loops.values() if one["p99_ms"] <= P99_MS]
    rates_that_fit = [int(rate) for rate, one in rates.items() if one["p99_ms"] <= P99_MS]
    return {
        "closed": loops,
        "open": rates,
        "requests_per_s_at_p99_100ms": max(fits, default=None),
        "rate_at_p99_100ms": max(rates_that_fit, default=None),
        "rounds": rounds,
    }


def _medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of each point that all rounds have."""
    points = [point for point in rounds[0] if all(point in one for one in rounds)]
    return {
        point: {name: round(statistics.median(one[point][name] for one in rounds), 2) for name in rounds[0][point]}
        for point in points
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """A few lines for people."""
    lines = [f"{'':14} {'clients':>8} {'req/s':>8} {'p50 ms':>8} {'p99 ms':>8} {'CPU ms':>8}"]
    for system, result in results.items():
        for clients, one in result["closed"].items():
            lines.append(
                f"{system:14} {clients:>8} {one['requests_per_s']:>8} {one['p50_ms']:>8} {one['p99_ms']:>8} "
                f"{one['cpu_ms_per_request']:>8}"
            )
        rates = ", ".join(f"{rate}: {one['p50_ms']}/{one['p99_ms']}" for rate, one in result["open"].items())
        lines.append(f"{'':14} requests/s that come at random: p50/p99 ms: {rates}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
