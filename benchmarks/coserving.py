"""What a batch job that saturates the pool does to online requests, and what online leaves to it.

    python benchmarks/coserving.py                    # the frontier, in half an hour: writes results and plots
    python benchmarks/coserving.py --quick --json     # the 10 % load alone, under 3 minutes
    python benchmarks/coserving.py --model MODEL --steps 10 20   # a real model, on two replicas of one thread each

Unless MODEL is given, the accelerators are simulated, so that two cores can tell the truth about scheduling: a step of
n images takes 0.6 + 0.11 n ms, as ViT-B/16 does on an H200, and no CPU. Everything else is the real thing: Serve,
handles, replicas, both lanes, chunks by reference. Time is stretched, so that the rate of requests stays within what
the cores serve; all times that are printed are in stretched time. A real model's time is not: its capacity is what a
job alone gets of it, and where a load would be more requests than the cores serve, each request has several images.

Four ways to serve both kinds of work on the same two accelerators, interleaved in one run:

    alone    online requests, and no job
    tandem   both lanes on both accelerators
    fifo     the same replicas with one queue, as `@serve.batch` has
    split    one accelerator for online, the other for the job

The second runs with each value of `online_step_ms`, which the others do not know.

Online load is open: requests come at random (Poisson) at the times that were drawn, whether or not earlier ones were
answered, and their latency counts from then. The job keeps its window of chunks full.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs as a script, and uses what the tests do

from benchmarks.accelerator import MAX_STEP, Accelerator, step_ms
from benchmarks.arrivals import arrivals
from benchmarks.results import percentile, write_results
from deployments.cluster import local_ray, own_ray, start_serve
from pipeline.dispatcher import Dispatcher, Scores
from pipeline.lanes import Lane, LaneLimits
from pipeline.steps import StepTimes

ACCELERATORS = 2
CHUNK, WINDOW = 256, 3  # images; chunks that the job keeps at each of its accelerators
REQUESTS_PER_S = 60.0  # at most: what two cores generate and serve without being what is measured
LEAST_STRETCH = 20.0  # so that the host's own milliseconds stay small beside a step's
WARM_S = 11.0  # until an accelerator has forgotten the online requests of the arm before
CALIBRATE_S = 10.0
ARMS = ("alone", "tandem", "fifo", "split")


class Simulated:
    """A model on a simulated accelerator."""

    def __init__(self, stretch: float) -> None:
        self._accelerator = Accelerator(stretch)

    def launch(self, images: Sequence[np.ndarray], top_k: int, *, details: bool) -> Callable[[], Scores]:
        """See `pipeline.dispatcher.Model`."""
        count = sum(map(len, images))
        ends_s = self._accelerator.begin(count)

        def scores() -> Scores:
            self._accelerator.wait(ends_s)
            return Scores(np.zeros((count, top_k), np.int32), np.zeros((count, top_k), np.float32))

        return scores


@dataclass(frozen=True)
class Device:
    """What each accelerator is: of a real model, or of none, and then simulated."""

    model: str | None
    images_per_ms: float
    height: int
    width: int

    def images(self, count: int) -> np.ndarray:
        """uint8 [count, height, width, 3], black."""
        return np.zeros((count, self.height, self.width, 3), np.uint8)


SIMULATED = Device(None, MAX_STEP / step_ms(MAX_STEP), 8, 8)


@dataclass(frozen=True)
class Setting:
    """What an arm is measured at. `online_step_ms` is in the model's time."""

    device: Device
    load: float
    online_step_ms: float
    seconds: float

    @property
    def stretch(self) -> float:
        """By how much time is stretched."""
        return 1.0 if self.device.model else max(LEAST_STRETCH, self._online_per_s / REQUESTS_PER_S)

    @property
    def request_images(self) -> int:
        """In each online request."""
        return math.ceil(self._online_per_s / self.stretch / REQUESTS_PER_S)

    @property
    def requests_per_s(self) -> float:
        """In stretched time."""
        return self._online_per_s / self.stretch / self.request_images

    @property
    def _online_per_s(self) -> float:
        return self.load * ACCELERATORS * self.device.images_per_ms * 1e3


@contextmanager
def pools(setting: Setting, name: str, *, fifo: bool) -> Iterator[list[Any]]:
    """A handle to each accelerator: a pool of the real replicas, with the model simulated."""
    from ray import serve

    from deployments.config import PoolConfig
    from deployments.pool import DEPLOYMENT, MAX_ONGOING_REQUESTS, ModelReplica

    step_ms_at_most = 1e12 if fifo else setting.online_step_ms * setting.stretch
    room = PoolConfig(threads=1, online_step_ms=step_ms_at_most, max_batch_backlog=10**6, max_online_backlog=10**6)

    class Replica(ModelReplica):
        def _load(self, model: str, config: PoolConfig) -> None:
            if model:
                super()._load(model, config)
                return
            limits = LaneLimits(
                max_step=MAX_STEP,
                online_step_ms=step_ms_at_most,
                max_batch_backlog=config.max_batch_backlog,
                max_online_backlog=config.max_online_backlog,
            )
            times = StepTimes(MAX_STEP, {n: setting.stretch * step_ms(n) for n in (1, MAX_STEP)})
            self._running: Any = SimpleNamespace(info=SimpleNamespace(scores_as="simulated"))
            self._classifier: Any = SimpleNamespace(check=lambda: None)
            self._dispatcher = Dispatcher(Simulated(setting.stretch), limits, times)

        async def score_online(
            self, images_NHWC: np.ndarray, top_k: int, within_s: Sequence[float], details: bool = False
        ) -> Any:
            if not fifo:
                return await super().score_online(images_NHWC, top_k, within_s, details)
            await self._dispatcher.submit(Lane.BATCH, images_NHWC, top_k)
            return None

    names = [f"{name}-{number}" for number in range(ACCELERATORS)]
    options = {"num_cpus": 0.1}
    deployment = serve.deployment(
        name=DEPLOYMENT, ray_actor_options=options, max_ongoing_requests=MAX_ONGOING_REQUESTS
    )(Replica)
    application = deployment.bind(setting.device.model or "", room)
    serve.run_many([serve.RunTarget(application, name=name, route_prefix=None) for name in names])
    try:
        yield [serve.get_deployment_handle(DEPLOYMENT, name) for name in names]
    finally:
        for name in names:
            serve.delete(name)


async def measure(arm: str, setting: Setting, handles: list[Any], seed: int) -> dict[str, Any]:
    """One arm for `setting.seconds`, of which the first are not counted."""
    online = handles[:1] if arm == "split" else handles
    batch = {"alone": [], "split": handles[1:]}.get(arm, handles)
    job = [asyncio.create_task(keep_busy(handle, setting.device)) for handle in batch for _ in range(WINDOW)]
    asking = asyncio.create_task(crowd(setting, online, seed))
    await asyncio.sleep(WARM_S)
    before, started_s = [await handle.stats.remote() for handle in handles], time.monotonic()
    await asyncio.sleep(setting.seconds - WARM_S)
    after, ended_s = [await handle.stats.remote() for handle in handles], time.monotonic()
    latencies_ms = await asking
    counted_online = len(latencies_ms) * setting.request_images if arm == "fifo" else 0  # it has one lane
    for task in job:
        task.cancel()
    await asyncio.gather(*job, return_exceptions=True)
    while any([(await handle.stats.remote())["batch"]["backlog"] for handle in handles]):
        await asyncio.sleep(0.1)  # or what is left of the job would be felt by the next arm
    images = sum(late["batch"]["scored"] - early["batch"]["scored"] for early, late in zip(before, after, strict=True))
    images -= counted_online
    capacity = ACCELERATORS * setting.device.images_per_ms * 1e3 / setting.stretch
    free = (1 - setting.load) * capacity
    busy_s = sum(late["busy_s"] - early["busy_s"] for early, late in zip(before, after, strict=True))
    watched_s = ended_s - started_s
    return {
        "requests": len(latencies_ms),
        **{f"p{name}_ms": percentile(latencies_ms, share) for name, share in SHARES.items()},
        "batch_share_of_free": round(images / watched_s / free, 3),
        "busy_share": round(busy_s / watched_s / ACCELERATORS, 4),
    }


async def crowd(setting: Setting, handles: list[Any], seed: int) -> list[float]:
    """Sends requests at random times, and gives the ms that each took from the time it was due."""
    rng, tasks, images_NHWC = random.Random(seed), [], setting.device.images(setting.request_images)
    counts_s = time.perf_counter() + WARM_S
    async for due_s in arrivals(setting.requests_per_s, setting.seconds, rng):
        tasks.append(asyncio.create_task(ask(rng.choice(handles), images_NHWC, due_s)))
    took_ms = await asyncio.gather(*tasks)
    return [one for due_s, one in took_ms if due_s >= counts_s]


async def ask(handle: Any, images_NHWC: np.ndarray, due_s: float) -> tuple[float, float]:
    """When the request was due, and the ms from then to its answer."""
    await handle.score_online.remote(images_NHWC, 1, [1e9] * len(images_NHWC))
    return due_s, (time.perf_counter() - due_s) * 1e3


async def keep_busy(handle: Any, device: Device) -> None:
    """One place in the job's window: one chunk after another."""
    import ray

    chunk = ray.put(device.images(CHUNK))
    while True:
        await handle.score_batch.remote({"chunk": chunk}, CHUNK, 1)


SHARES = {"50": 0.5, "99": 0.99, "99_9": 0.999}


def calibrated(model: str) -> Device:
    """The model's images/s on each of its replicas, with a job and nothing else."""
    from pipeline.checkpoint import find_checkpoint
    from pipeline.model import Classifier

    transform = Classifier(find_checkpoint(model)).info.transform
    device = Device(model, 1.0, transform.height, transform.width)

    async def images_per_ms(handles: list[Any]) -> float:
        job = [asyncio.create_task(keep_busy(handle, device)) for handle in handles for _ in range(WINDOW)]
        await asyncio.sleep(WARM_S)
        before = [(await handle.stats.remote())["batch"]["scored"] for handle in handles]
        started_s = time.monotonic()
        await asyncio.sleep(CALIBRATE_S)
        after = [(await handle.stats.remote())["batch"]["scored"] for handle in handles]
        passed_s = time.monotonic() - started_s
        for task in job:
            task.cancel()
        await asyncio.gather(*job, return_exceptions=True)
        return float(sum(after) - sum(before)) / passed_s / 1e3 / len(handles)

    with pools(Setting(device, 0.1, 1e6, 0.0), "calibration", fifo=False) as handles:
        return replace(device, images_per_ms=asyncio.run(images_per_ms(handles)))


def run(device: Device, load: float, steps: list[float], seconds: float, rounds: int) -> dict[str, dict[str, Any]]:
    """All arms at one load, interleaved: of each, the medians of its rounds, and the p99 of each round."""
    settings = {f"tandem {step:g}": Setting(device, load, step, seconds) for step in steps}
    plain = Setting(device, load, steps[0], seconds)
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ("alone", *settings, "fifo", "split")}
    with ExitStack() as stack:
        pool = {
            arm: stack.enter_context(pools(one, arm.replace(" ", "-"), fifo=False)) for arm, one in settings.items()
        }
        pool["fifo"] = stack.enter_context(pools(plain, "fifo", fifo=True))
        pool["alone"] = pool["split"] = next(iter(pool.values()))
        for number in range(rounds):
            for arm, results in found.items():
                kind, setting = arm.split()[0], settings.get(arm, plain)
                results.append(asyncio.run(measure(kind, setting, pool[arm], seed=number)))
    return {arm: summary(results) for arm, results in found.items()}


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    medians = {name: round(statistics.median(one[name] for one in results), 4) for name in results[0]}
    return {**medians, "p99_ms_of_rounds": [one["p99_ms"] for one in results]}


def table(load: float, stretch: float, arms: dict[str, dict[str, Any]]) -> str:
    """A few lines for people, in the model's time."""
    lines = [f"online load {load:.0%}, time stretched {stretch:.1f} times; these are ms of the model:"]
    for arm, one in arms.items():
        p50, p99, p99_9 = (one[f"p{name}_ms"] / stretch for name in SHARES)
        added = p99 - arms["alone"]["p99_ms"] / stretch
        lines.append(
            f"  {arm:9} p50 {p50:7.2f}  p99 {p99:7.2f} (added {added:7.2f})  p99.9 {p99_9:7.2f}   "
            f"batch {one['batch_share_of_free']:.3f} of free   busy {one['busy_share']:.3f}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the 10 %% load at the default step, one round")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--model", help="a folder or a hub id; without it, accelerators are simulated")
    parser.add_argument("--loads", type=float, nargs="+", default=[0.01, 0.1, 0.3, 0.6])
    parser.add_argument("--steps", type=float, nargs="+", default=[4.0, 8.0, 16.0], help="values of online_step_ms")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=40.0, help="of each arm, in each round")
    options = parser.parse_args()
    if options.quick:
        options.loads, options.steps, options.rounds, options.seconds = [0.1], [8.0], 1, 33.0
    assert all(0 < load < 1 for load in options.loads), "--loads are shares of the capacity"
    own_ray()
    results = []
    with local_ray():
        start_serve()
        device = calibrated(options.model) if options.model else SIMULATED
        for load in options.loads:
            plain = Setting(device, load, 0.0, 0.0)
            arms = run(device, load, options.steps, options.seconds, options.rounds)
            print(table(load, plain.stretch, arms), flush=True)
            told = {"stretch": round(plain.stretch, 2), "request_images": plain.request_images}
            results.append({"load": load, **told, "arms": arms})
    if not options.quick:
        name = f"coserving-{Path(options.model).name}" if options.model else "coserving"
        device_images_per_s = round(device.images_per_ms * 1e3)
        configuration = {"rounds": options.rounds, "seconds": options.seconds, "images_per_s": device_images_per_s}
        write_results(name, {**configuration, "loads": results})
        plot(results, name)
    if options.json:
        print(json.dumps(headline(results[-1], options.steps[-1])))


def headline(result: dict[str, Any], step: float) -> dict[str, Any]:
    """What is promised, at one load; times are stretched."""
    arms = result["arms"]
    tandem = arms[f"tandem {step:g}"]
    return {
        "online_load": result["load"],
        "online_step_ms": round(step * result["stretch"], 1),
        "p99_alone_ms": arms["alone"]["p99_ms"],
        "p99_under_job_ms": tandem["p99_ms"],
        "p99_fifo_ms": arms["fifo"]["p99_ms"],
        "p99_split_ms": arms["split"]["p99_ms"],
        "batch_share_of_free": tandem["batch_share_of_free"],
        "busy_share": tandem["busy_share"],
    }


def plot(results: list[dict[str, Any]], name: str) -> None:
    """Online p50, p99 and p99.9 against batch's share, in the model's time: docs/NAME.png and .svg."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(results), figsize=(4 * len(results), 4), sharey=True, squeeze=False)
    for panel, result in zip(panels[0], results, strict=True):
        arms, stretch = result["arms"], result["stretch"]
        kinds = {kind: [one for arm, one in arms.items() if arm.split()[0] == kind] for kind in ARMS}
        for number, (kind, ones) in enumerate(kinds.items()):
            shares = [one["batch_share_of_free"] for one in ones]
            for quantile, style in (("50", ":"), ("99", "-"), ("99_9", "--")):
                times_ms = [one[f"p{quantile}_ms"] / stretch for one in ones]
                label = kind if quantile == "99" else None
                panel.plot(shares, times_ms, style, marker="o^sD"[number], color=f"C{number}", label=label)
        panel.set(title=f"online load {result['load']:.0%}", xlabel="batch, of what online leaves", yscale="log")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("online ms: p50 dotted, p99, p99.9 dashed")
    panels[0][0].legend()
    figure.tight_layout()
    docs = Path(__file__).resolve().parents[1] / "docs"
    for suffix in ("png", "svg"):
        figure.savefig(docs / f"{name}.{suffix}", dpi=110, metadata={"Date": None} if suffix == "svg" else None)


if __name__ == "__main__":
    main()
