"""The endpoint as a Ray Serve deployment: decodes images, and asks the pool's replicas to score them."""

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
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve import RunTarget
from ray.serve.exceptions import RayServeException

from deployments.coalescing import Coalescer
from deployments.config import Config, EndpointConfig
from deployments.metrics import EndpointMetrics, gather_metrics
from deployments.pool import CONNECT_TIMEOUT_S, QUIET, Answer, Running, deploy, pool_handle, wait_running, wait_warm
from deployments.web import access
from deployments.web.app import build_app
from deployments.web.scoring import Image, Scored, Wanted, check_wanted, other_function, scored_as_wanted
from pipeline.decode import decode_image, resize_pixels
from pipeline.errors import Busy, Expired, ImageError, ModelError, PoolFailed, TandemError
from pipeline.model_info import ModelInfo

APP = "tandem-http"
DEPLOYMENT = "endpoint"
# Above what decode threads and lanes hold at once, so that overload is answered by the lanes, with a reason.
MAX_ONGOING_REQUESTS = 2048
CALL_IMAGES = 16  # at most; those of a larger request go to several replicas
CALLS_PER_REPLICA = 4  # at once, from this process: enough for the lane to have the next step's images


@serve.ingress()
class Endpoint:
    """The `Scorer` behind the routes. It starts only once the pool is warm."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, model: str, config: EndpointConfig, startup_timeout_s: float, may_sleep: bool
    ) -> None:
        self._config, self._may_sleep = config, may_sleep
        self._metrics = EndpointMetrics()
        _log_access()
        self._threads = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="tandem-decode")
        async with asyncio.timeout(startup_timeout_s):
            running = await self._connect(model)
        self._info = running.info
        calls = CALLS_PER_REPLICA * running.config.ceiling
        self._coalescer = Coalescer(self._call, max_images=CALL_IMAGES, max_calls=calls)
        # so that no user's request is the first to take this way
        await self.score([_blank_image()], Wanted(), startup_timeout_s)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self, self._config, observe=self._metrics.request, metrics=gather_metrics)

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
        ends_s = asyncio.get_running_loop().time() + within_s
        if len(images) == 1:
            return [await self._score(images[0], wanted, ends_s)]
        async with _together() as group:
            tasks = [group.create_task(self._score(image, wanted, ends_s)) for image in images]
        return [task.result() for task in tasks]

    async def _score(self, image: Image, wanted: Wanted, ends_s: float) -> Scored | ImageError:
        decoded = await asyncio.get_running_loop().run_in_executor(self._threads, self._decode, image)
        if isinstance(decoded, ImageError):
            return decoded
        top_k = min(wanted.top_k, len(self._info.labels))
        details = wanted.embedding or other_function(wanted, self._info)
        scores, replica = await self._coalescer.score(decoded, top_k, details, ends_s)
        (scored,) = scored_as_wanted(scores, self._info, wanted, replica)
        return scored

    async def _call(self, images_NHWC: np.ndarray, top_k: int, details: bool, ends_s: float) -> Answer:
        loop = asyncio.get_running_loop()
        answer: Answer | Busy | Expired = await _answer(
            lambda: self._pool.score_online.remote(images_NHWC, top_k, ends_s - loop.time(), details)
        )
        if isinstance(answer, Answer):
            return answer
        raise answer

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


def serve_model(model: str, config: Config) -> ModelInfo:
    """Brings up the pool of `model` with the endpoint in front of it, at `/`, and waits until both answer.

    Raises `ModelError`, `PoolFailed`.
    """
    deployment = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=config.endpoint.replicas,
        ray_actor_options={"num_cpus": config.endpoint.cpus},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        logging_config=QUIET,
    )(Endpoint)
    # of the pool's configuration what it needs alone: Serve replaces a deployment whose arguments change
    application = deployment.bind(model, config.endpoint, config.pool.startup_timeout_s, config.pool.replicas == 0)
    deploy(model, config.pool)
    serve.run_many([RunTarget(application, name=APP)], wait_for_applications_running=False)
    try:
        info = wait_warm(model, config.pool.startup_timeout_s).info
    except TandemError:
        serve.delete(APP)
        raise
    wait_running(APP, config.pool.startup_timeout_s)
    return info
