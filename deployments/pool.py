"""The pool: a Ray Serve deployment whose replicas are the model actors.

Online requests and batch jobs call the same replicas, each by its own lane. One pool serves one model, under a name
that follows from the model's, so that whoever wants the model finds the pool that runs.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import time
import warnings
from collections.abc import Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve import RunTarget
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ApplicationStatusOverview, LoggingConfig

from deployments.answer import Answer, Refusal
from deployments.autoscaling import BATCH_SHARE, BATCH_STEPS, ONLINE_SHARE
from deployments.channels.frames import Address
from deployments.channels.server import ChannelServer
from deployments.config import PoolConfig
from deployments.metrics import ReplicaMetrics
from deployments.scheduling import come_first
from pipeline.device_errors import is_device_lost
from pipeline.dispatcher import Dispatcher, Scores
from pipeline.errors import Busy, DeviceLost, Expired, ModelError, PoolFailed
from pipeline.lanes import Lane
from pipeline.model_info import ModelInfo
from pipeline.steps import StepTimes

APP, DEPLOYMENT = "tandem-pool-", "pool"
QUIET = LoggingConfig(enable_access_log=False)  # Serve's line for each call costs more than it tells
ROUTER, POLICY = "deployments.routing.LaneRouter", "deployments.autoscaling.LanePolicy"  # Serve imports them
# Serve counts both lanes' calls together and makes callers of a full replica wait with back-off, so this must never
# be what is full: the lanes have bounds of their own.
MAX_ONGOING_REQUESTS = 10_000
CONNECT_TIMEOUT_S = 10.0
POLL_S = 0.1
DRAIN_S = 60.0  # for the chunks in a replica that is to go; what is left is scored elsewhere
TELL_EVERY_S, LOOK_BACK_S = 2.0, 10.0  # of a replica's load

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Running:
    """A pool that answers: the model that it holds, how it runs, and what its replicas chose (`Choices.told`)."""

    info: ModelInfo
    config: PoolConfig
    chosen: dict[str, str]


class ModelReplica:
    """One model actor."""

    async def __init__(self, model: str, config: PoolConfig) -> None:  # type: ignore[misc]  # Serve awaits it
        come_first()
        self.replica = serve.get_replica_context().replica_id.unique_id
        self._problem: ModelError | None = None
        self._lost: DeviceLost | None = None
        self._address: Address | None = None
        self._told_s, self._told_busy_s = time.monotonic(), dict.fromkeys(Lane, 0.0)
        try:
            await asyncio.to_thread(self._load, model, config)
        except ModelError as error:
            # Raised here, Serve would start the replica again and again; asked, it can say what is wrong.
            self._problem = error
            return
        self._loop = asyncio.create_task(self._dispatcher.run())
        self._telling = asyncio.create_task(ReplicaMetrics(self._dispatcher).tell())
        self._channels = ChannelServer(self.score_online)
        self._address = await open_channels(self._channels, self.replica)

    async def __del__(self) -> None:
        """Awaited by Serve before it ends the process, once its own calls are answered."""
        if self._address:
            await self._channels.close()

    def _load(self, model: str, config: PoolConfig) -> None:
        from deployments.choices import Choices  # here, as it brings torch, which who calls the pool does without
        from pipeline.checkpoint import find_checkpoint
        from pipeline.model import Classifier

        classifier = Classifier(
            find_checkpoint(model), device=config.device, dtype=config.dtype, compile=config.compile
        )
        choices = Choices(config, classifier)
        classifier.use_threads(choices.threads)
        self._max_step = choices.limits.max_step
        times = StepTimes(self._max_step, classifier.warm(self._max_step, graphs=config.cuda_graphs))
        self._classifier, self._running = classifier, Running(classifier.info, config, choices.told)
        self._dispatcher = Dispatcher(classifier, choices.limits, times)

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises."""
        if self._problem:
            return
        if self._lost:
            raise self._lost
        if self._loop.done():
            raise PoolFailed(f"the dispatcher of replica {self.replica} ended")
        self._classifier.check()

    async def describe(self) -> Running | ModelError:
        """What this replica holds, or why it holds nothing."""
        return self._problem or self._running

    async def channel(self) -> Address | None:
        """Where it takes online calls directly, if it does."""
        return self._address

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Serve, and read by `deployments.autoscaling`: the load since the last call."""
        if self._problem:
            return {}
        now_s, busy_s = time.monotonic(), dict(self._dispatcher.lane_busy_s)
        passed_s = max(now_s - self._told_s, 1e-3)
        online, batch = ((busy_s[lane] - self._told_busy_s[lane]) / passed_s for lane in (Lane.ONLINE, Lane.BATCH))
        self._told_s, self._told_busy_s = now_s, busy_s
        return {
            ONLINE_SHARE: min(1.0, online),
            BATCH_SHARE: min(1.0, batch),
            BATCH_STEPS: self._dispatcher.backlog(Lane.BATCH) / self._max_step,
        }

    async def score_online(
        self, images_NHWC: np.ndarray, top_k: int, within_s: Sequence[float], details: bool = False
    ) -> Answer | Refusal:
        """Scores uint8 images [N, H, W, 3] before any batch image that waits, each within its time or not at all."""
        submitted = self._dispatcher.submit_each(Lane.ONLINE, images_NHWC, top_k, within_s, details=details)
        return await self._answered(submitted)

    async def score_batch(
        self, nested: dict[str, ray.ObjectRef[np.ndarray]], images: int, top_k: int
    ) -> Answer | Refusal:
        """Scores the uint8 images [N, H, W, 3] under `chunk` when online leaves room. `images` is N.

        The reference is nested so that the data is fetched here, where there is room for it, and not by the actor's
        main loop, which must stay free to answer Serve's probes.
        """
        return await self._answered(self._fetched_and_scored(nested["chunk"], images, top_k))

    async def _fetched_and_scored(self, chunk: ray.ObjectRef[np.ndarray], images: int, top_k: int) -> Scores:
        with self._dispatcher.expect(Lane.BATCH, images):
            images_NHWC = await chunk
        return await self._dispatcher.submit(Lane.BATCH, images_NHWC, top_k)

    async def _answered(self, submitted: Coroutine[Any, Any, Scores]) -> Answer | Refusal:
        try:
            scores = await submitted
        except (Busy, Expired) as refusal:
            return refusal
        except Exception as error:
            if not is_device_lost(error):
                raise
            return self._lose(error)
        return Answer(scores, self.replica, self._running.info.scores_as)

    def _lose(self, error: Exception) -> DeviceLost:
        """Has Serve replace this replica, and its callers ask another one."""
        if self._lost is None:
            _log.error("replica %s lost its device: %s", self.replica, error)
            self._lost = DeviceLost(f"replica {self.replica} lost its device: {error}")
            self._closing = asyncio.create_task(self._channels.close())
        return self._lost

    async def stats(self) -> dict[str, Any]:
        """This replica's id, the seconds that its model was busy, and for each lane the images scored and waiting."""
        dispatcher = self._dispatcher
        lanes = {str(lane): {"scored": dispatcher.images[lane], "backlog": dispatcher.backlog(lane)} for lane in Lane}
        return {"replica": self.replica, "busy_s": dispatcher.busy_s, **lanes}


def app_name(model: str) -> str:
    """The Serve application that holds the pool of `model` (a hub id, or an absolute path)."""
    slug = re.sub(r"[^a-z0-9]+", "-", os.path.basename(model.rstrip("/")).lower()).strip("-")
    return f"{APP}{slug[:40]}-{hashlib.sha256(model.encode()).hexdigest()[:8]}"


def attach(model: str) -> Running | None:
    """What the running pool of `model` holds, once it is warm, or None where no pool runs. Raises `ModelError`."""
    app = serve.status().applications.get(app_name(model))
    if app is None or app.status == "DELETING":
        return None
    return wait_warm(model, PoolConfig.startup_timeout_s)


def bring_up(model: str, config: PoolConfig) -> Running:
    """Deploys the pool of `model`, or changes a running one to `config`, and waits until it is warm.

    Raises `ModelError` for a checkpoint that does not load, `PoolFailed` for replicas that do not come up.
    """
    deploy(model, config)
    return wait_warm(model, config.startup_timeout_s)


def deploy(model: str, config: PoolConfig) -> None:
    """Has Serve start the pool, and does not wait for it."""
    scaling = _autoscaling(config) if config.ceiling > config.replicas else None
    router = RequestRouterConfig(request_router_class=ROUTER)  # type: ignore[arg-type]  # it is told wrong of itself
    deployment = serve.deployment(
        name=DEPLOYMENT,
        num_replicas=None if scaling else config.replicas,
        autoscaling_config=scaling,
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": _gpus(config)},
        max_ongoing_requests=MAX_ONGOING_REQUESTS,
        max_constructor_retry_count=3,
        graceful_shutdown_timeout_s=DRAIN_S,
        max_surge_percent=config.max_surge_percent,
        logging_config=QUIET,
        request_router_config=router,
    )(ModelReplica)
    target = RunTarget(deployment.bind(model, config), name=app_name(model), route_prefix=None)
    serve.run_many([target], wait_for_applications_running=False)


def _autoscaling(config: PoolConfig) -> AutoscalingConfig:
    ceilings = {
        "max_replicas": config.online_ceiling,
        "batch_max_replicas": config.batch_ceiling,
        "online_share": config.online_share,
    }
    policy = AutoscalingPolicy(policy_function=POLICY, policy_kwargs=ceilings)  # type: ignore[no-untyped-call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # what is to replace the interval is every deployment's
        return AutoscalingConfig(
            min_replicas=config.replicas,
            max_replicas=config.ceiling,
            upscale_delay_s=config.upscale_delay_s,
            downscale_delay_s=config.downscale_delay_s,
            metrics_interval_s=TELL_EVERY_S,
            look_back_period_s=LOOK_BACK_S,
            policy=policy,
        )


def wait_warm(model: str, timeout_s: float) -> Running:
    """Waits until the pool of `model` answers. A pool that could not load the model is taken down again."""
    ends_s = time.monotonic() + timeout_s
    wait_running(app_name(model), timeout_s)
    _, running = connect(model, ends_s - time.monotonic())
    if isinstance(running, ModelError):
        take_down(model)
        raise running
    return running


def connect(model: str, timeout_s: float) -> tuple[DeploymentHandle[Any], Running | ModelError]:
    """A handle to the pool of `model` that has been answered, and the answer. Raises `PoolFailed`.

    It wakes a pool without replicas. A new handle has been seen to find no replica for as long as it was asked, beside
    others that did; so an answer that does not come is waited for with another handle.
    """
    ends_s = time.monotonic() + timeout_s
    while True:
        handle = pool_handle(model)
        with suppress(TimeoutError, RayError, RayServeException):
            running: Running | ModelError = handle.describe.remote().result(timeout_s=CONNECT_TIMEOUT_S)
            return handle, running
        if time.monotonic() > ends_s:
            raise PoolFailed(f"the pool of {model} runs, but did not answer in {timeout_s:.0f} s")


def cpus_to_come(model: str, config: PoolConfig) -> float:
    """CPUs that replicas of the pool which do not run yet may want of the nodes that there are now."""
    states = serve.status().applications[app_name(model)].deployments[DEPLOYMENT].replica_states
    running = sum(count for state, count in states.items() if state == "RUNNING")
    to_come, gpus = max(0, config.ceiling - running), _gpus(config)
    if gpus:  # where no GPU is free, a replica comes with a node of its own
        resources: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
        to_come = min(to_come, int(resources.get("GPU", 0.0) / gpus))
    return to_come * config.cpus


def take_down(model: str) -> None:
    """Ends the pool of `model`, if there is one."""
    serve.delete(app_name(model))


def end_unused(used: Iterable[str]) -> None:
    """Ends the pools of all models but these."""
    kept = {app_name(model) for model in used}
    for app in serve.status().applications:
        if app.startswith(APP) and app not in kept:
            serve.delete(app)


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


async def open_channels(server: ChannelServer, replica: str) -> Address | None:
    """Has the server listen where Ray has this node, or nowhere: where Ray encrypts, Ray alone may carry images."""
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return None
    host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    try:
        return await server.open(replica, host)
    except OSError as error:
        _log.warning("replica %s takes calls through Serve alone, at a higher cost: %s: %s", replica, host, error)
        return None


def _gpus(config: PoolConfig) -> float:
    if config.gpus is not None:
        return config.gpus
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return 1.0 if resources.get("GPU", 0) >= 1 else 0.0
