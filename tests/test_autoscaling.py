"""The pool follows its load without flapping: traces of load, replayed through Serve's own loop in simulated time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingContext

from deployments.autoscaling import BATCH_SHARE, BATCH_STEPS, ONLINE_SHARE, LanePolicy, Load, load_of
from deployments.config import PoolConfig
from deployments.pool import LOOK_BACK_S

EVERY_S = 2  # between looks at the load; Serve's own loop is faster
STARTS_S = 60  # until a new replica is there: a node, and the model
HOUR = 3600
POOL = PoolConfig(replicas=1, max_replicas=8, batch_max_replicas=12)


@dataclass
class Demand:
    """What comes at one moment, in the replicas that it keeps busy. A job's decoders are able to feed `limit`."""

    online: float = 0.0
    job: bool = False
    limit: float = math.inf


def replay(
    demand: Callable[[int], Demand], seconds: int, config: PoolConfig = POOL, *, every_s: int = EVERY_S
) -> list[int]:
    """The pool's target, second by second, where each replica tells its load as the real one does."""
    policy = _apply_autoscaling_config(LanePolicy(config.online_ceiling, config.batch_ceiling, config.online_share))
    settings = SimpleNamespace(
        upscale_delay_s=config.upscale_delay_s,
        downscale_delay_s=config.downscale_delay_s,
        downscale_to_zero_delay_s=None,
        get_upscaling_factor=lambda: 1.0,
        get_downscaling_factor=lambda: 1.0,
    )
    target, starts = config.replicas, [0] * config.replicas
    state: dict[str, Any] = {}
    targets: list[int] = []
    replicas = [ReplicaID(str(number), DeploymentID("pool")) for number in range(config.ceiling)]
    seen = [(0.0, 0.0, 0.0)] * max(1, int(LOOK_BACK_S / every_s))
    for now_s in range(0, seconds, every_s):
        running = sum(start <= now_s for start in starts)
        now = demand(now_s)
        online = min(now.online, running)
        batch = min(running - online, now.limit) if now.job else 0.0
        waits = 6.0 if now.job and now.limit > running - online else 0.0
        seen = [*seen[1:], (online, batch, waits)]
        means = [sum(values) / len(seen) for values in zip(*seen, strict=True)]
        each = [means[0] / max(running, 1), means[1] / max(running, 1), means[2]]
        context = AutoscalingContext(
            deployment_id=DeploymentID("pool"),
            deployment_name="pool",
            app_name=None,
            current_num_replicas=running,
            target_num_replicas=target,
            running_replicas=replicas[:running],
            total_num_requests=float(math.ceil(now.online) + now.job),
            total_queued_requests=0.0,
            aggregated_metrics={
                name: dict.fromkeys(replicas[:running], value)
                for name, value in zip((ONLINE_SHARE, BATCH_SHARE, BATCH_STEPS), each, strict=True)
            },
            raw_metrics={},
            capacity_adjusted_min_replicas=config.replicas,
            capacity_adjusted_max_replicas=config.ceiling,
            policy_state=state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now_s,
            config=settings,
        )
        with mock.patch("ray.serve.autoscaling_policy.time", SimpleNamespace(time=lambda now_s=now_s: float(now_s))):
            wanted, state = policy(context)
        target = max(config.replicas, min(config.ceiling, wanted))
        starts = starts[:target] + [now_s + STARTS_S] * (target - len(starts))
        targets += [target] * every_s
    return targets


def changes(targets: list[int]) -> list[int]:
    """The targets, each as long as it lasts once."""
    return [target for target, _ in itertools.groupby(targets)]


@pytest.mark.parametrize(("online", "expected"), [(0.01, 1), (0.5, 1), (1.0, 2), (2.3, 4), (4.0, 7), (40.0, 8)])
def test_steady_online_load_gets_its_share_of_replicas_once(online: float, expected: int) -> None:
    found = changes(replay(lambda _: Demand(online), 2 * HOUR))
    assert found[-1] == expected
    assert found == sorted(found), "it went up and down"
    assert len(found) <= 1 + math.ceil(math.log(8, 1 / POOL.online_share))


@pytest.mark.parametrize("around", [0.6, 1.2, 1.8])
def test_a_load_at_the_edge_of_a_replica_does_not_flap(around: float) -> None:
    # each half wave is longer than any delay
    found = changes(replay(lambda second: Demand(around + 0.03 * math.sin(second / 200)), 4 * HOUR))
    assert len(found) <= 3


def test_bursts_shorter_than_replicas_take_to_come_up_are_left_alone() -> None:
    found = changes(replay(lambda second: Demand(1.0 if second % 120 < 5 else 0.05), 2 * HOUR))
    assert found == [1]


def test_bursts_in_quick_succession_keep_their_replicas() -> None:
    found = changes(replay(lambda second: Demand(1.5 if second % 240 < 60 else 0.2), 2 * HOUR))
    assert max(found) <= 3
    assert found == sorted(found), "it went up and down"


def test_day_and_night_are_followed_and_nothing_else() -> None:
    demand = [2.0 - 1.8 * math.cos(2 * math.pi * second / (24 * HOUR)) for second in range(48 * HOUR)]
    targets = replay(lambda second: Demand(demand[second]), 48 * HOUR, every_s=20)
    assert max(targets) == 7
    assert min(targets) == 1
    assert len(changes(targets)) <= 1 + 4 * 6  # up to 7 and down again, twice
    assert all(target > needed for target, needed in zip(targets, demand, strict=True)), "it did not keep up"


def test_a_job_takes_the_pool_to_its_own_ceiling_and_back() -> None:
    job = range(HOUR, 2 * HOUR)
    targets = replay(lambda second: Demand(1.0, job=second in job), 3 * HOUR)
    before, during, after = targets[:HOUR], targets[HOUR : 2 * HOUR], targets[2 * HOUR :]
    assert before[-1] == 2
    assert during[10 * 60] == 12
    assert changes(during) == [2, 4, 8, 12]
    assert changes(after) == [12, 2]
    assert after.index(2) <= POOL.downscale_delay_s + 2 * LOOK_BACK_S


def test_a_job_that_waits_for_its_decoders_gets_the_replicas_that_it_fills() -> None:
    found = changes(replay(lambda _: Demand(job=True, limit=2.1), 2 * HOUR))
    assert found[-1] == 3
    assert len(found) <= 5


def test_a_burst_of_online_requests_beside_a_job_gets_replicas_beyond_the_jobs() -> None:
    config = replace(POOL, batch_max_replicas=2)
    burst = range(HOUR, HOUR + 900)
    targets = replay(lambda second: Demand(3.0 if second in burst else 0.1, job=True), 2 * HOUR, config)
    assert targets[HOUR - 1] == 2
    assert max(targets[HOUR:]) >= 5
    assert targets[-1] == 2


def test_an_idle_pool_goes_to_zero_and_a_request_or_a_job_wakes_it() -> None:
    config = replace(POOL, replicas=0)

    def demand(second: int) -> Demand:
        return Demand(0.2 if 100 <= second < 200 else 0.0, job=HOUR <= second < HOUR + 600)

    targets = replay(demand, 2 * HOUR, config)
    assert targets[:100] == [0] * 100
    assert targets[100] == 1
    assert targets[HOUR - 1] == 0
    assert targets[HOUR] == 1
    assert max(targets) == 12
    assert targets[-1] == 0
    assert changes(targets) == [0, 1, 0, 1, 2, 4, 8, 12, 1, 0]


def test_a_pool_that_works_never_goes_to_zero() -> None:
    targets = replay(lambda second: Demand(0.001 if second > 100 else 0.0), 2 * HOUR, replace(POOL, replicas=0))
    assert set(targets[200:]) == {1}


loads = st.builds(
    Load,
    replicas=st.integers(0, 64),
    online=st.floats(0, 64),
    batch=st.floats(0, 64),
    batch_steps=st.floats(0, 10),
)


@given(loads, st.integers(0, 64), st.integers(1, 64), st.integers(1, 64))
def test_no_load_passes_the_ceilings_or_falls_below_what_online_needs(
    load: Load, target: int, ceiling: int, batch_ceiling: int
) -> None:
    wanted = LanePolicy(ceiling, batch_ceiling, 0.6).replicas(load, target)
    if load.replicas:
        assert wanted <= max(ceiling, batch_ceiling)
        assert wanted >= min(ceiling, load.online / 0.6) - 1e-5
        without = LanePolicy(ceiling, batch_ceiling, 0.6).replicas(replace(load, batch=0.0, batch_steps=0.0), target)
        assert wanted >= without, "a job took replicas away"
    else:
        assert wanted == target


def test_a_replica_that_has_not_told_yet_is_not_counted() -> None:
    assert load_of({}) == Load(0, 0.0, 0.0, 0.0)
    told: dict[str, dict[Any, float]] = {ONLINE_SHARE: {"a": 0.5}, BATCH_SHARE: {"a": 0.25}, BATCH_STEPS: {"a": 3.0}}
    assert load_of(told) == Load(1, 0.5, 0.25, 3.0)
