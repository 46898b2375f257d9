"""How many replicas the pool should have.

Serve runs the policy in its controller, which takes it from here by value: this module imports nothing of ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ray.serve.config import AutoscalingContext

ONLINE_SHARE = "tandem_online_share"
BATCH_SHARE = "tandem_batch_share"
BATCH_STEPS = "tandem_batch_steps"

BATCH_FILL = 0.9  # of a replica's time that a job takes, before it could use another one
KEEP = 0.9  # of what would call for another replica, below which that one is not kept


@dataclass(frozen=True)
class Load:
    """What replicas do: the time that they spend on each lane, in replicas, and the steps that a job has waiting.

    `replicas` are those that told; `batch_steps` is the mean of theirs.
    """

    replicas: int
    online: float
    batch: float
    batch_steps: float


@dataclass(frozen=True)
class LanePolicy:
    """Online load sets the floor, up to `max_replicas`; a job may raise the pool up to `batch_max_replicas`.

    Online requests should take `online_share` of the replicas' time, so that they find one free. A job that keeps steps
    waiting at all replicas gets twice as many; one that waits for its own decoders does not.
    """

    max_replicas: int
    batch_max_replicas: int
    online_share: float

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """For Serve, which applies the bounds and the delays, and wakes a pool of no replicas by itself."""
        wanted = self.replicas(load_of(context.aggregated_metrics or {}), context.target_num_replicas)
        if context.total_num_requests > 0:
            wanted = max(wanted, 1)
        return wanted, context.policy_state

    def replicas(self, load: Load, target: int) -> int:
        """The replicas for that load, where `target` is how many there are to be now."""
        if not load.replicas:  # they start, or have just been told to: nothing is known yet
            return target
        online = min(_held(load.online / self.online_share, target), self.max_replicas)
        if load.batch_steps >= 1:
            batch = max(target, 2 * load.replicas)
        elif load.batch > 0:
            batch = _held((load.online + load.batch) / BATCH_FILL, target)
        else:
            batch = 0
        return max(online, min(batch, self.batch_max_replicas))


def load_of(metrics: dict[str, dict[Any, float]]) -> Load:
    """The load that the replicas' own numbers tell, each by the replica's id."""
    told = metrics.get(BATCH_STEPS, {})
    return Load(
        replicas=len(told),
        online=sum(metrics.get(ONLINE_SHARE, {}).values()),
        batch=sum(metrics.get(BATCH_SHARE, {}).values()),
        batch_steps=sum(told.values()) / len(told) if told else 0.0,
    )


def _held(needed: float, target: int) -> int:
    """`needed` replicas in whole ones; one less than `target` only where it would not be wanted back at once."""
    up, down = math.ceil(round(needed, 6)), math.ceil(round(needed / KEEP, 6))
    return up if up > target else min(down, target)
