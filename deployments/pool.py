"""The pool: a Ray Serve deployment whose replicas are the model actors.

Online requests and batch jobs call the same replicas, each by its own lane. One pool serves one model, under a name
that follows from the model's, so that whoever wants the model finds the pool that runs.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import RunTarget
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatusOverview

from deployments.config import PoolConfig
from pipeline.dispatcher import Dispatcher, Scores
from pipeline.errors import Busy, Expired, ModelError, PoolFailed
from pipeline.lanes import Lane, LaneLimits
from pipeline.model_info import ModelInfo
from pipeline.steps import StepTimes

DEPLOYMENT = "pool"
MAX_STEP = {"cuda": 128, "cpu": 32}
ONLINE_STEP_MS = {"cuda": 8.0, "cpu": 50.0}
# Serve counts both lanes' calls together and makes callers of a full replica wait with back-off, so this must never
# be what is full: the lanes have bounds of their own.
MAX_ONGOING_REQUESTS = 10_000
CONNECT_ATTEMPTS, CONNECT_TIMEOUT_S = 6, 10
POLL_S = 0.1


@dataclass(frozen=True)
class Answer:
    """Scores, and the id of the replica that computed them."""

    scores: Scores
    replica: str


class ModelReplica:
    """One model actor."""

    async def __init__(self, model: str, config: PoolConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        self.replica = serve.get_replica_context().replica_id.unique_id
        self._problem: ModelError | None = None
        try:
            await asyncio.to_thread(self._load, model, config)
        except ModelError as error:
            # Raised here, Serve would start the replica again and again; asked, it can say what is wrong.
            self._problem = error
            return
        self._loop = asyncio.create_task(self._dispatcher.run())

    def _load(self, model: str, config: PoolConfig) -> None:
        from pipeline.checkpoint import find_checkpoint
        from pipeline.model import Classifier, use_threads

        use_threads(config.threads)
        classifier = Classifier(find_checkpoint(model), device=config.device, dtype=config.dtype)
        kind = "cuda" if classifier.device.type == "cuda" else "cpu"
        max_step = config.max_step or MAX_STEP[kind]
        limits = LaneLimits(
            max_step=max_step,
            online_step_ms=ONLINE_STEP_MS[kind] if config.online_step_ms is None else config.online_step_ms,
            max_online_backlog=config.max_online_backlog,
            max_batch_backlog=config.max_batch_backlog,
        )
        times = StepTimes(max_step, classifier.warm({1, max_step}))
        self._info, self._dispatcher = classifier.info, Dispatcher(classifier, limits, times)

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if self._problem is None and self._loop.done():
            raise PoolFailed(f"the dispatcher of replica {self.replica} ended")

    async def describe(self) -> ModelInfo | ModelError:
        """The model that this replica holds, or why it holds none."""
        return self._problem or self._info

    async def score_online(self, images_NHWC: np.ndarray, top_k: int, within_s: float) -> Answer | Busy | Expired:
        """Scores uint8 images [N, H, W, 3] before any batch image that waits, within that time or not at all."""
        try:
            scores = await self._dispatcher.submit(Lane.ONLINE, images_NHWC, top_k, within_s=within_s)
        except (Busy, Expired) as error:
            return error  # an answer, not an accident: raised, Serve would log a stack trace for each
        return Answer(scores, self.replica)

    async def score_batch(self, nested: dict[str, ray.ObjectRef[np.ndarray]], images: int, top_k: int) -> Answer | Busy:
        """Scores the uint8 images [N, H, W, 3] under `chunk` when online leaves room. `images` is N.

        The reference is nested so that the data is fetched here, where there is room for it, and not by the actor's
        main loop, which must stay free to answer Serve's probes.
        """
        try:
            with self._dispatcher.expect(Lane.BATCH, images):
                images_NHWC = await nested["chunk"]
            return Answer(await self._dispatcher.submit(Lane.BATCH, images_NHWC, top_k), self.replica)
        except Busy as busy:
            return busy

    async def stats(self) -> dict[str, Any]:
        """This replica's id, the seconds that its model was busy, and for each lane the images scored and waiting."""
        dispatcher = self._dispatcher
        lanes = {str(lane): {"scored": dispatcher.images[lane], "backlog": dispatcher.backlog(lane)} for lane in Lane}
        return {"replica": self.replica, "busy_s": dispatcher.busy_s, **lanes}


def app_name(model: str) -> str:
    """The Serve application that holds the pool of `model` (a hub id, or an absolute path)."""
    slug = re.sub(r"[^a-z0-9]+", "-", os.path.basename(model.rstrip("/")).lower()).strip("-")
    return f"tandem-pool-{slug[:40]}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def attach(model: str) -> ModelInfo | None:
    """What the running pool of `model` holds, once it is warm, or None where no pool runs. Raises `ModelError`."""
    app = serve.status().applications.get(app_name(model))
    if app is None or app.status == "DELETING":
        return None
    return wait_warm(model, PoolConfig.startup_timeout_s)


def bring_up(model: str, config: PoolConfig) -> ModelInfo:
    """Deploys the pool of `model`, or changes a running one to `config`, and waits until it is warm.

    Raises `ModelError` for a checkpoint that does not load, `PoolFailed` for replicas that do not come up.
    """
    deploy(model, config)
    return wait_warm(model, config.startup_timeout_s)


def deploy(model: str, config: PoolConfig) -> None:
    """Has Serve start the pool, and does not wait for it."""
    deployment = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": _gpus(config)},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_constructor_retry_count=3,
    )(ModelReplica)
    target = RunTarget(deployment.bind(model, config), name=app_name(model), route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)


def wait_warm(model: str, timeout_s: float) -> ModelInfo:
    """Waits until the pool of `model` answers. A pool that could not load the model is taken down again."""
    wait_running(app_name(model), timeout_s)
    _, info = connect(model)
    if isinstance(info, ModelError):
        take_down(model)
        raise info
    return info


def connect(model: str) -> tuple[DeploymentHandle[Any], ModelInfo | ModelError]:
    """A handle to the running pool of `model` that has been answered, and the answer. Raises `PoolFailed`.

    A new handle has been seen to find no replica for as long as it was asked, beside others that did; so an answer that
    does not come is waited for with another handle.
    """
    for _ in range(CONNECT_ATTEMPTS):
        handle = pool_handle(model)
        with suppress(TimeoutError, RayError, RayServeException):
            info: ModelInfo | ModelError = handle.describe.remote().result(timeout_s=CONNECT_TIMEOUT_S)
            return handle, info
    raise PoolFailed(f"the pool of {model} runs, but did not answer {CONNECT_ATTEMPTS} times in {CONNECT_TIMEOUT_S} s")


def take_down(model: str) -> None:
    """Ends the pool of `model`, if there is one."""
    serve.delete(app_name(model))


def pool_handle(model: str) -> DeploymentHandle[Any]:
    """A handle to the pool of `model`, for the process that asks: handles lose their router when they travel."""
    return serve.get_deployment_handle(DEPLOYMENT, app_name(model))


def wait_running(app: str, timeout_s: float) -> None:
    """Waits until the Serve application runs, also again: one that lost a replica is unhealthy for a while.

    Raises `PoolFailed` with Serve's own reason.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        status = serve.status().applications.get(app)
        if status is not None and status.status == "RUNNING":
            return
        if status is not None and status.status == "DEPLOY_FAILED":
            raise PoolFailed(f"{app} does not come up: {_reason(status)}")
        if time.monotonic() > deadline:
            waiting = _reason(status) if status else "it was deleted meanwhile"
            raise PoolFailed(f"{app} is not up after {timeout_s:.0f} s: {waiting}")
        time.sleep(POLL_S)


def _reason(status: ApplicationStatusOverview) -> str:
    messages = [status.message, *(deployment.message for deployment in status.deployments.values())]
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else f"its status is {status.status}"


def _gpus(config: PoolConfig) -> float:
    if config.gpus is not None:
        return config.gpus
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return 1.0 if resources.get("GPU", 0) >= 1 else 0.0
