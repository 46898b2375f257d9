"""Metrics, kept by Ray as those of its own: each process tells its node's agent, and each agent answers Prometheus.

`/metrics` of the endpoint gathers what concerns Tandem from all nodes, so that whichever endpoint process is asked, and
however many there are, the answer is the whole. A Prometheus that scrapes Ray's agents has it under `ray_tandem_`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from typing import Literal

import httpx
import ray
from ray.util.metrics import Counter, Gauge, Histogram

from pipeline.dispatcher import Dispatcher
from pipeline.lanes import Lane

SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0]
IMAGES = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0]
EVERY_S = 1.0
SCRAPE_S = 5.0
RAY = "ray_"
_OURS = re.compile(rf"^(# \w+ )?{RAY}(tandem_\w+)")


class EndpointMetrics:
    """Of one endpoint process."""

    def __init__(self) -> None:
        self._requests = Histogram(
            "tandem_request_seconds",
            "From a request's head to the end of its answer.",
            boundaries=SECONDS,
            tag_keys=("protocol", "status"),
        )
        self._calls = Counter("tandem_online_calls", "Calls to replicas, by how they went.", tag_keys=("way",))
        self._decode = Histogram("tandem_decode_seconds", "Decoding and resizing an image.", boundaries=SECONDS)

    def request(self, protocol: str, status: int, seconds: float) -> None:
        """Counts an answer."""
        self._requests.observe(seconds, {"protocol": protocol, "status": str(status)})

    def called(self, way: Literal["channel", "serve"]) -> None:
        """Counts a call whose images were scored."""
        self._calls.inc(1, {"way": way})

    def decoded(self, seconds: float) -> None:
        """Counts an image."""
        self._decode.observe(seconds)


class ReplicaMetrics:
    """Of one replica of the pool."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._told, self._told_busy_s = dict.fromkeys(Lane, 0), dict.fromkeys(Lane, 0.0)
        self._backlog = Gauge("tandem_lane_backlog_images", "Images that wait in the lane.", tag_keys=("lane",))
        self._images = Counter("tandem_lane_images", "Images scored.", tag_keys=("lane",))
        self._busy = Counter("tandem_lane_busy_seconds", "Time of the model, by lane.", tag_keys=("lane",))
        self._step_seconds = Histogram("tandem_step_seconds", "Time of the model for a step.", boundaries=SECONDS)
        self._step_images = Histogram("tandem_step_images", "Images in a step.", boundaries=IMAGES)

    async def tell(self) -> None:
        """Tells what the dispatcher does, until cancelled."""
        while True:
            for lane in Lane:
                self._backlog.set(self._dispatcher.backlog(lane), {"lane": lane})
                images, busy_s = self._dispatcher.images[lane], self._dispatcher.lane_busy_s[lane]
                if images > self._told[lane]:  # Ray refuses to add nothing
                    self._images.inc(images - self._told[lane], {"lane": lane})
                if busy_s > self._told_busy_s[lane]:
                    self._busy.inc(busy_s - self._told_busy_s[lane], {"lane": lane})
                self._told[lane], self._told_busy_s[lane] = images, busy_s
            while self._dispatcher.recent_steps:
                images, step_ms = self._dispatcher.recent_steps.popleft()
                self._step_images.observe(images)
                self._step_seconds.observe(step_ms / 1e3)
            await asyncio.sleep(EVERY_S)


async def gather_metrics() -> str:
    """What all nodes tell of Tandem now, in Prometheus' text format. A node that does not answer is left out."""
    nodes = await asyncio.to_thread(ray.nodes)
    async with httpx.AsyncClient(timeout=SCRAPE_S, trust_env=False) as client:
        asked = [_scraped(client, node) for node in nodes if node["Alive"] and node["MetricsExportPort"]]
        return ours(await asyncio.gather(*asked))


async def _scraped(client: httpx.AsyncClient, node: dict[str, str]) -> str:
    try:
        response = await client.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics")
    except httpx.HTTPError:
        return ""
    return response.text if response.is_success else ""


def ours(texts: Iterable[str]) -> str:
    """Of several agents' metrics those of Tandem, each under one description, and without Ray's prefix."""
    descriptions: dict[str, None] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        for line in text.splitlines():
            if not (found := _OURS.match(line)):
                continue
            if found[1]:
                descriptions[line.replace(RAY, "", 1)] = None
            else:
                family = re.sub(r"_(bucket|sum|count)$", "", found[2])
                samples.setdefault(family, []).append(line.removeprefix(RAY))
    lines = []
    for family, some in samples.items():
        lines += [line for line in descriptions if line.split()[2] == family]
        lines += some
    return "".join(f"{line}\n" for line in lines)
