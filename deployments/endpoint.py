"""The endpoint as a Ray Serve deployment: decodes images, and asks the pool's replicas to score them.

Serve places its processes, looks after them and replaces them; they listen by themselves.
"""

from __future__ import annotations

import asyncio
import io
import logging
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from typing import Any

import numpy as np
import PIL.Image
from opentelemetry.trace import NoOpTracer
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve import RunTarget
from ray.serve.exceptions import RayServeException

from deployments.answer import Answer, Refusal
from deployments.board import running_jobs
from deployments.channels.client import ChannelLost
from deployments.channels.frames import Address
from deployments.channels.pool import Channels
from deployments.coalescing import Coalescer
from deployments.config import Config, EndpointConfig
from deployments.metrics import EndpointMetrics, gather_metrics
from deployments.pool import (
    CONNECT_TIMEOUT_S,
    POLL_S,
    QUIET,
    Running,
    app_name,
    deploy,
    end_unused,
    pool_handle,
    take_down,
    wait_running,
    wait_warm,
)
from deployments.scheduling import come_first
from deployments.status import Recent, Status
from deployments.traces import check_traces, traces_to
from deployments.web import access
from deployments.web.app import build_app
from deployments.web.listener import Listener, check_free
from deployments.web.scoring import Image, Scored, Wanted, check_wanted, other_function, scored_as_wanted
from pipeline.decode import decode_image, resize_pixels
from pipeline.errors import DeviceLost, ImageError, ModelError, PoolFailed, TandemError
from pipeline.model_info import ModelInfo

APP = "tandem-http"
DEPLOYMENT = "endpoint"
HEAD_NODE = "node:__internal_head__"  # a resource that Ray gives to the head alone
STATUS_TIMEOUT_S = 2.0
DRAIN_S = 15.0  # beside the time that a request may take
CALL_IMAGES = 16  # at most; those of a larger request go to several replicas
CALLS_PER_REPLICA = 2  # at once, from this process: the next one is there when one ends, and others gather meanwhile


class Endpoint:
    """The `Scorer` behind the routes. It listens only once the pool is warm."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, model: str, host: str, port: int, config: EndpointConfig, startup_timeout_s: float, may_sleep: bool
    ) -> None:
        come_first()
        self._config, self._may_sleep = config, may_sleep
        self._metrics, self._recent = EndpointMetrics(), Recent()
        self._traces = traces_to(config.traces_to) if config.traces_to else None
        self._tracer = self._traces.get_tracer("tandem") if self._traces else NoOpTracer()
        _log_access()
        self._threads = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="tandem-decode")
        self._channels = Channels(self._find)
        async with asyncio.timeout(startup_timeout_s):
            running = await self._connect(model)
        self._info = running.info
        calls = CALLS_PER_REPLICA * running.config.ceiling
        self._coalescer = Coalescer(self._call, max_images=CALL_IMAGES, max_calls=calls)
        # so that no user's request is the first to take this way
        await self.score([_blank_image()], Wanted(), startup_timeout_s)
        status = Status(self._info, self._recent, self._replicas)
        app = build_app(
            self,
            config,
            observe=self._metrics.request,
            metrics=gather_metrics,
            status=status,
            jobs=_running_jobs,
            tracer=self._tracer,
        )
        self._listener = Listener(app, host, port)
        await self._listener.open()

    async def __del__(self) -> None:
        """Awaited by Serve before it ends the process: what has been asked is answered."""
        if hasattr(self, "_listener"):
            await self._listener.close()
        if hasattr(self, "_channels"):
            await self._channels.close()
        if self._traces:
            await asyncio.to_thread(self._traces.shutdown)  # sends what it has

    async def check_health(self) -> None:
        """Serve replaces an endpoint for which this raises."""
        if not self._listener.listens:
            raise PoolFailed("the endpoint does not listen any more")

    async def _connect(self, model: str) -> Running:
        """What the pool holds, once it is up. Asked for by one handle after another: see `deployments.pool.connect`."""
        while True:
            self._pool = pool_handle(model)
            with suppress(TimeoutError, PoolFailed):
                return await asyncio.wait_for(self._ask(), CONNECT_TIMEOUT_S)

    async def describe(self) -> ModelInfo:
        """The model that the pool holds. A pool that may sleep is not woken to tell."""
        return self._info if self._may_sleep else (await self._ask()).info

    async def _ask(self) -> Running:
        running: Running | ModelError = await _answer(self._pool.describe.remote)
        if isinstance(running, ModelError):
            raise running
        return running

    @property
    def info(self) -> ModelInfo:
        """See `Scorer`."""
        return self._info

    async def score(self, images: Sequence[Image], wanted: Wanted, within_s: float) -> list[Scored | ImageError]:
        """See `Scorer`."""
        check_wanted(wanted, self._info)
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        ends_s = started_s + within_s
        if len(images) == 1:
            scored = [await self._score(images[0], wanted, ends_s)]
        else:
            async with _together() as group:
                tasks = [group.create_task(self._score(image, wanted, ends_s)) for image in images]
            scored = [task.result() for task in tasks]
        self._recent.add(loop.time() - started_s)
        return scored

    async def _score(self, image: Image, wanted: Wanted, ends_s: float) -> Scored | ImageError:
        with self._tracer.start_as_current_span("decode"):
            decoded = await asyncio.get_running_loop().run_in_executor(self._threads, self._decode, image)
        if isinstance(decoded, ImageError):
            return decoded
        top_k = min(wanted.top_k, len(self._info.labels))
        details = wanted.embedding or other_function(wanted, self._info)
        with self._tracer.start_as_current_span("score") as span:
            scores, replica = await self._coalescer.score(decoded, top_k, details, ends_s)
            span.set_attribute("tandem.replica", replica)
        (scored,) = scored_as_wanted(scores, self._info, wanted, replica)
        return scored

    async def _call(self, images_NHWC: np.ndarray, top_k: int, details: bool, ends_s: Sequence[float]) -> Answer:
        with suppress(DeviceLost):
            return await self._call_once(images_NHWC, top_k, details, ends_s)
        return await self._call_once(images_NHWC, top_k, details, ends_s)  # by another replica

    async def _call_once(self, images_NHWC: np.ndarray, top_k: int, details: bool, ends_s: Sequence[float]) -> Answer:
        loop = asyncio.get_running_loop()

        def within_s() -> list[float]:
            return [one_s - loop.time() for one_s in ends_s]

        with suppress(ChannelLost):
            answer = await self._channels.call(images_NHWC, top_k, within_s(), details)
            self._metrics.called("channel")
            return answer
        found: Answer | Refusal = await _answer(
            lambda: self._pool.score_online.remote(images_NHWC, top_k, within_s(), details)
        )
        if not isinstance(found, Answer):
            raise found
        self._metrics.called("serve")
        return found

    async def _find(self) -> Address | None:
        """Where one of the replicas takes calls directly: that which was not asked for the longest time."""
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                address: Address | None = await _answer(self._pool.channel.remote)
        except TimeoutError as error:
            raise PoolFailed(f"no replica told its address in {CONNECT_TIMEOUT_S:g} s") from error
        return address

    async def _replicas(self) -> list[dict[str, Any]]:
        """The statistics of the replicas that answer soon."""
        with suppress(TimeoutError, RayError, RayServeException):
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                answers = await self._pool.broadcast("stats").results_async(return_exceptions=True)
                return [answer for answer in answers if isinstance(answer, dict)]
        return []

    def _decode(self, image: Image) -> np.ndarray | ImageError:
        transform, max_pixels = self._info.transform, self._config.max_pixels
        started_s = time.perf_counter()
        try:
            if isinstance(image, np.ndarray):
                return resize_pixels(image, transform, max_pixels=max_pixels)
            return decode_image(image, transform, max_pixels=max_pixels)
        except ImageError as error:
            return error
        finally:
            self._metrics.decoded(time.perf_counter() - started_s)


@asynccontextmanager
async def _together() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group whose first failure is raised as what it is, once the others are cancelled."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from errors


def _log_access() -> None:
    """Sends the lines of requests to this process's standard error, which Ray keeps among its logs.

    To that which the process was started with: Serve's own puts words of its log before each line.
    """
    if not access.log.handlers:
        access.log.addHandler(logging.StreamHandler(sys.__stderr__))
        access.log.setLevel(logging.INFO)
        access.log.propagate = False


async def _running_jobs() -> list[dict[str, Any]]:
    return await asyncio.to_thread(running_jobs)


def _blank_image() -> bytes:
    sink = io.BytesIO()
    PIL.Image.new("RGB", (1, 1)).save(sink, "PNG")
    return sink.getvalue()


async def _answer(ask: Callable[[], Any]) -> Any:
    """What the pool answers, also where the replica that was asked first dies: to score twice harms nobody.

    Raises `PoolFailed` where no replica answers. A caller that leaves takes its call along.
    """
    tries = 2
    while True:
        tries -= 1
        call = ask()
        try:
            return await call
        except asyncio.CancelledError:
            call.cancel()  # the await alone leaves it in the lane
            raise
        except (RayError, RayServeException) as error:
            if not (tries and isinstance(error, RayActorError)):
                raise PoolFailed("the pool does not answer; try again later") from error


def serve_model(model: str, host: str, port: int, config: Config) -> Running:
    """Brings up the pool of `model` with the endpoint in front of it, and waits until both answer.

    An endpoint that runs is replaced once that pool is warm, so that one that does not come up costs no request. Then
    pools that nobody uses any more are ended: the former model's, and what a job's driver left that was killed.

    Raises `ModelError`, `PoolFailed`, and `UsageError` where another listens at that address, or traces cannot be sent.
    """
    if config.endpoint.traces_to:
        check_traces()
    running_apps, timeout_s = serve.status().applications, config.pool.startup_timeout_s
    first = APP not in running_apps
    if first:
        check_free(host, port)
    deploy(model, config.pool)
    try:
        if first:  # the pool and its endpoint load at the same time
            _deploy_endpoint(model, host, port, config)
        running = wait_warm(model, timeout_s)
    except TandemError:
        if first:
            serve.delete(APP)
        if app_name(model) not in running_apps:
            take_down(model)
        raise
    if not first:
        _deploy_endpoint(model, host, port, config)
    wait_running(APP, timeout_s)
    _wait_drained(timeout_s)
    end_unused([model, *(job["model"] for job in running_jobs())])
    return running


def _deploy_endpoint(model: str, host: str, port: int, config: Config) -> None:
    """Has Serve start the endpoint, and does not wait for it."""
    where = {} if config.endpoint.nodes == "any" else {HEAD_NODE: 0.001}
    deployment = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=config.endpoint.replicas,
        ray_actor_options={"num_cpus": config.endpoint.cpus, "resources": where},
        max_constructor_retry_count=3,
        max_surge_percent=100,  # the new ones listen before the former stop
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=config.endpoint.timeout_s + DRAIN_S,
        logging_config=QUIET,
    )(Endpoint)
    # of the pool's configuration what it needs alone: Serve replaces a deployment whose arguments change
    pool = config.pool
    application = deployment.bind(model, host, port, config.endpoint, pool.startup_timeout_s, pool.replicas == 0)
    serve.run_many([RunTarget(application, name=APP, route_prefix=None)], wait_for_applications_running=False)


def _wait_drained(timeout_s: float) -> None:
    """Waits until the endpoint's former processes, whose pool may be another, have answered what they were asked."""
    ends_s = time.monotonic() + timeout_s
    while "STOPPING" in serve.status().applications[APP].deployments[DEPLOYMENT].replica_states:
        if time.monotonic() > ends_s:
            raise PoolFailed(f"the former endpoint has not stopped after {timeout_s:.0f} s")
        time.sleep(POLL_S)


def stop_serving() -> None:
    """Ends the endpoint, once it has answered what it has been asked."""
    serve.delete(APP)
