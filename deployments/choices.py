"""What a replica does where its configuration says nothing: chosen from the machine, and told with the reason."""

from __future__ import annotations

from typing import TypeVar

from deployments.config import PoolConfig
from pipeline.lanes import LaneLimits
from pipeline.model import MIN_WEIGHTS_FOR_THREADS, Classifier

Value = TypeVar("Value")

MAX_STEP = {"cuda": 128, "cpu": 32}
ONLINE_STEP_MS = {"cuda": 8.0, "cpu": 50.0}


class Choices:
    """The settings of one replica. `told` has each by its name in the configuration, with why it is what it is."""

    def __init__(self, config: PoolConfig, classifier: Classifier) -> None:
        self.told: dict[str, str] = {}
        on_gpu = classifier.device.type == "cuda"
        kind, place = ("cuda", "on a GPU") if on_gpu else ("cpu", "on a CPU")
        found = "one is here" if on_gpu else "no GPU is here"
        self._choose("device", None if config.device == "auto" else config.device, str(classifier.device), found)
        self._tell("dtype", config.dtype, "the notebook's" if config.dtype == "float32" else "faster and less exact")
        threads = classifier.suitable_threads
        why = f"fewer than {MIN_WEIGHTS_FOR_THREADS:,} weights" if threads == 1 else "one for each core"
        self.threads = self._choose("threads", config.threads, threads, why)
        step = self._choose("max_step", config.max_step, MAX_STEP[kind], place)
        online_step_ms = self._choose("online_step_ms", config.online_step_ms, ONLINE_STEP_MS[kind], place)
        if config.compile:
            self._tell("compile", True, "as configured")
        if on_gpu:
            self._tell(
                "cuda_graphs", config.cuda_graphs, "launches cost less" if config.cuda_graphs else "as configured"
            )
        self.limits = LaneLimits(
            max_step=step,
            online_step_ms=online_step_ms,
            max_online_backlog=config.max_online_backlog,
            max_batch_backlog=config.max_batch_backlog,
        )

    def _choose(self, name: str, configured: Value | None, suitable: Value, why: str) -> Value:
        value = suitable if configured is None else configured
        self._tell(name, value, why if configured is None else "as configured")
        return value

    def _tell(self, name: str, value: object, why: str) -> None:
        self.told[name] = f"{value} ({why})"
