"""The endpoint as a Ray Serve deployment: decodes images, and asks the pool's replicas to score them."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import numpy as np
from fastapi import FastAPI
from PIL import Image
from ray import serve
from ray.exceptions import RayActorError, RayError
from ray.serve import RunTarget
from ray.serve.exceptions import RayServeException

from deployments.config import Config, EndpointConfig
from deployments.pool import CONNECT_TIMEOUT_S, Answer, Running, deploy, pool_handle, wait_running, wait_warm
from deployments.web import build_app
from pipeline.decode import decode_image
from pipeline.errors import Busy, Expired, ModelError, PoolFailed, TandemError
from pipeline.model_info import ModelInfo

APP = "tandem-http"
DEPLOYMENT = "endpoint"
# Above what decode threads and lanes hold at once, so that overload is answered by the lanes, with a reason.
MAX_ONGOING_REQUESTS = 2048


@serve.ingress()
class Endpoint:
    """The `Scorer` behind the routes. It starts only once the pool is warm."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, model: str, config: EndpointConfig, startup_timeout_s: float, may_sleep: bool
    ) -> None:
        self._config, self._may_sleep = config, may_sleep
        self._threads = ThreadPoolExecutor(config.decode_threads, thread_name_prefix="tandem-decode")
        async with asyncio.timeout(startup_timeout_s):
            self._info = await self._connect(model)
        await self.score(_blank_image(), 1)  # so that no user's request is the first to take this way

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_app(self, self._config)

    async def _connect(self, model: str) -> ModelInfo:
        """What the pool holds, once it is up. Asked for by one handle after another: see `deployments.pool.connect`."""
        while True:
            self._pool = pool_handle(model)
            with suppress(TimeoutError, PoolFailed):
                return await asyncio.wait_for(self._ask(), CONNECT_TIMEOUT_S)

    async def describe(self) -> ModelInfo:
        """The model that the pool holds. A pool that may sleep is not woken to tell."""
        return self._info if self._may_sleep else await self._ask()

    async def _ask(self) -> ModelInfo:
        running: Running | ModelError = await _answer(self._pool.describe.remote)
        if isinstance(running, ModelError):
            raise running
        return running.info

    async def score(self, image: bytes, top_k: int) -> tuple[list[dict[str, Any]], str]:
        """See `Scorer`."""
        loop = asyncio.get_running_loop()
        ends_s = loop.time() + self._config.timeout_s
        image_HWC = await loop.run_in_executor(self._threads, self._decode, image)
        top_k = min(top_k, len(self._info.labels))
        answer: Answer | Busy | Expired = await _answer(
            lambda: self._pool.score_online.remote(image_HWC[None], top_k, ends_s - loop.time())
        )
        if not isinstance(answer, Answer):
            raise answer
        top_K, scores_K = answer.scores.top_NK[0].tolist(), answer.scores.scores_NK[0].tolist()
        best = [
            {"label": self._info.labels[index], "score": score} for index, score in zip(top_K, scores_K, strict=True)
        ]
        return best, answer.replica

    def _decode(self, image: bytes) -> np.ndarray:
        return decode_image(image, self._info.transform, max_pixels=self._config.max_pixels)


def _blank_image() -> bytes:
    sink = io.BytesIO()
    Image.new("RGB", (1, 1)).save(sink, "PNG")
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
