"""The two lanes lose nothing, double nothing, and let online go first, whatever comes in whatever order."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.lanes import ADDED_STEPS, BATCH_SHARE, ONLINE_QUIET_S, STEPS_UNDER_WAY, Lane, LaneLimits, Lanes, Slice
from pipeline.steps import StepTimes
from tests.simulation import Request, Simulation, Step, h200, percentile, poisson

_LIMITS = LaneLimits(max_step=8, online_step_ms=40.0, max_online_backlog=20, max_batch_backlog=30)
_QUIET_S = ONLINE_QUIET_S + 0.1


def _lanes(limits: LaneLimits, ms_per_image: float = 10.0) -> Lanes[str]:
    return Lanes(limits, StepTimes(limits.max_step, {1: ms_per_image, limits.max_step: ms_per_image * limits.max_step}))


@dataclass(eq=False)
class _Request:
    """A request as its caller sees it: `left` images have not come out of the lanes yet."""

    lane: Lane
    images: int
    seen: list[int] = field(default_factory=list)

    @property
    def left(self) -> int:
        return self.images - len(self.seen)


def _room(lane: Lane) -> int:
    return _LIMITS.max_online_backlog if lane is Lane.ONLINE else _LIMITS.max_batch_backlog


class _AnyOrder(RuleBasedStateMachine):
    """Offers, steps, drops, measurements and the passing of time, in any order, beside a plain account of them."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: list[_Request] = []
        self.now_s = 0.0
        self.under_way: list[int] = []

    @initialize(fixed_ms=st.floats(0.0, 100.0), image_ms=st.floats(0.0, 50.0))
    def start(self, fixed_ms: float, image_ms: float) -> None:
        times = StepTimes(_LIMITS.max_step, {size: fixed_ms + image_ms * size for size in (1, _LIMITS.max_step)})
        self.lanes: Lanes[_Request] = Lanes(_LIMITS, times)

    @rule(lane=st.sampled_from(Lane), images=st.integers(1, 40))
    def offer(self, lane: Lane, images: int) -> None:
        waits = self._waits(lane)
        request = _Request(lane, images)
        accepted = self.lanes.offer(lane, request, images, self.now_s)
        assert accepted == (waits == 0 or waits + images <= _room(lane))
        if accepted:
            self.waiting.append(request)

    @rule()
    def next_step(self) -> None:
        online, batch = self._waits(Lane.ONLINE), self._waits(Lane.BATCH)
        due_s = self.lanes.due_s(self.now_s)
        assert (due_s == math.inf) == (len(self.under_way) == STEPS_UNDER_WAY or not online + batch)
        assert self.under_way or not online + batch or due_s == self.now_s
        step = self.lanes.next_step(self.now_s)
        counts = {lane: sum(len(part) for part in step if part.lane is lane) for lane in Lane}
        size = sum(counts.values())
        assert size <= _LIMITS.max_step
        assert bool(size) == bool(online + batch)
        # all of online that fits, but for what batch is owed, and nothing left out for which there is room
        assert counts[Lane.ONLINE] >= min(online, _LIMITS.max_step - 1)
        assert counts[Lane.BATCH] == batch or counts[Lane.ONLINE] == online or size == _LIMITS.max_step
        assert [part.lane for part in step] == sorted((part.lane for part in step), key=list(Lane).index)
        for part in step:
            self._take(part)
        if step:
            self.under_way.append(size)

    @precondition(lambda self: self.under_way)
    @rule(step_ms=st.floats(0.0, 500.0), failed=st.booleans())
    def end(self, step_ms: float, failed: bool) -> None:
        images = self.under_way.pop(0)
        self.now_s += step_ms / 1e3
        self.lanes.ended(self.now_s, 0 if failed else images, step_ms)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.waiting))
        self.lanes.drop(request)
        self.waiting.remove(request)

    @rule(launch_ms=st.floats(0.0, 50.0))
    def launched(self, launch_ms: float) -> None:
        self.lanes.launched(launch_ms)

    @rule(seconds=st.floats(0.0, 3.0))
    def let_time_pass(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def backlogs_are_what_waits(self) -> None:
        assert {lane: self.lanes.backlog(lane) for lane in Lane} == {lane: self._waits(lane) for lane in Lane}

    def teardown(self) -> None:
        while self.waiting:
            self.next_step()
        assert not self.waiting
        assert not self.lanes.next_step(self.now_s)

    def _waits(self, lane: Lane) -> int:
        return sum(request.left for request in self.waiting if request.lane is lane)

    def _take(self, part: Slice[_Request]) -> None:
        """Notes a part of a step: the next images of the request at the head of its lane, and never an empty part."""
        request = part.token
        assert request is next(other for other in self.waiting if other.lane is part.lane)
        request.seen += range(part.start, part.stop)
        assert request.seen == list(range(len(request.seen)))
        assert 0 < len(part) <= request.images
        if not request.left:
            self.waiting.remove(request)


TestAnyOrder = _AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(
    ("max_step", "online", "batch"), [*itertools.product((1, 2, 7, 32), (0, 1, 5, 33), (0, 1, 9, 70))]
)
def test_every_image_leaves_once_and_in_its_order_and_steps_are_full(max_step: int, online: int, batch: int) -> None:
    times = StepTimes(max_step, {1: 1.0, max_step: max_step})
    lanes: Lanes[Lane] = Lanes(LaneLimits(max_step=max_step, online_step_ms=1e9), times)
    for lane, images in ((Lane.BATCH, batch), (Lane.ONLINE, online)):
        assert not images or lanes.offer(lane, lane, images, 0.0)
    steps = list(iter(lambda: lanes.next_step(0.0), []))
    left = [(part.token, index) for step in steps for part in step for index in range(part.start, part.stop)]
    for lane, images in ((Lane.BATCH, batch), (Lane.ONLINE, online)):
        assert [index for token, index in left if token is lane] == list(range(images))
    assert [sum(map(len, step)) for step in steps[:-1]] == [max_step] * (len(steps) - 1)


@pytest.mark.parametrize("lane", Lane)
def test_a_full_lane_refuses_and_the_other_one_does_not(lane: Lane) -> None:
    lanes = _lanes(_LIMITS)
    other = Lane.BATCH if lane is Lane.ONLINE else Lane.ONLINE
    assert lanes.offer(lane, "fills it", _room(lane), 0.0)
    assert not lanes.offer(lane, "one more", 1, 0.0)
    assert lanes.offer(other, "elsewhere", 1, 0.0)
    assert lanes.backlog(lane) == _room(lane)


def test_an_empty_lane_takes_a_request_of_any_size() -> None:
    lanes = _lanes(_LIMITS)
    assert lanes.offer(Lane.BATCH, "a chunk larger than the bound", 1000, 0.0)
    assert not lanes.offer(Lane.BATCH, "another", 1, 0.0)


def test_a_request_without_images_is_refused_as_a_mistake() -> None:
    lanes = _lanes(_LIMITS)
    with pytest.raises(ValueError, match="at least 1"):
        lanes.offer(Lane.ONLINE, "nothing", 0, 0.0)


def test_drop_removes_what_waits_of_one_request_and_nothing_else() -> None:
    lanes = _lanes(LaneLimits(max_step=4))
    for name in ("first", "gone", "last"):
        lanes.offer(Lane.BATCH, name, 3, 0.0)
    assert lanes.next_step(0.0) == [Slice("first", Lane.BATCH, 0, 3), Slice("gone", Lane.BATCH, 0, 1)]
    lanes.drop("gone")
    lanes.drop("first")
    assert lanes.backlog(Lane.BATCH) == 3
    assert lanes.next_step(0.0) == [Slice("last", Lane.BATCH, 0, 3)]


def test_room_is_kept_for_what_is_on_its_way() -> None:
    lanes = _lanes(_LIMITS)
    assert lanes.expect(Lane.BATCH, 30)
    assert not lanes.expect(Lane.BATCH, 1)
    assert not lanes.offer(Lane.BATCH, "another", 1, 0.0)
    assert lanes.offer(Lane.ONLINE, "a user", 1, 0.0)
    lanes.arrived(Lane.BATCH, 30)
    assert lanes.offer(Lane.BATCH, "what was expected", 30, 0.0)


def test_steps_are_short_while_online_is_about_and_long_again_after_it() -> None:
    lanes = _lanes(LaneLimits(max_step=32, online_step_ms=60.0))
    lanes.offer(Lane.BATCH, "a chunk", 1000, 0.0)
    assert _images(lanes.next_step(0.0)) == 32
    lanes.ended(10.0)
    lanes.offer(Lane.ONLINE, "a user", 1, 10.0)
    assert _images(lanes.next_step(10.0)) == 6
    lanes.ended(10.1)
    assert _images(lanes.next_step(10.0 + ONLINE_QUIET_S)) == 6
    lanes.ended(30.0)
    assert _images(lanes.next_step(30.0)) == 32


@pytest.mark.parametrize("waited_ms", [0.0, 20.0, 40.0, 60.0, 70.0])
def test_the_longer_a_request_has_waited_the_less_its_step_is_topped_up(waited_ms: float) -> None:
    lanes = _lanes(LaneLimits(max_step=32, online_step_ms=60.0))
    lanes.offer(Lane.BATCH, "a chunk", 1000, 0.0)
    lanes.offer(Lane.ONLINE, "a user", 1, 0.0)
    step_ms = 10.0 * _images(lanes.next_step(waited_ms / 1e3))
    assert step_ms == min(60.0, max(10.0, 20.0 * ((60.0 * ADDED_STEPS - waited_ms + 10.0) // 20.0)))


def test_online_that_needs_a_long_step_gets_it() -> None:
    lanes = _lanes(LaneLimits(max_step=32, online_step_ms=60.0))
    lanes.offer(Lane.ONLINE, "many users", 100, 0.0)
    assert _images(lanes.next_step(0.0)) == 32


def test_an_online_request_is_refused_where_it_could_not_be_scored_in_time() -> None:
    lanes = _lanes(LaneLimits(max_step=32))
    assert lanes.offer(Lane.ONLINE, "in time", 10, 0.0, deadline_s=0.11)
    assert lanes.wait_s(Lane.ONLINE, 0.0) == pytest.approx(0.1)
    assert not lanes.offer(Lane.ONLINE, "too late", 10, 0.0, deadline_s=0.19)
    assert lanes.offer(Lane.ONLINE, "patient", 10, 0.0, deadline_s=0.21)


def test_a_request_whose_deadline_has_passed_is_left_out_and_told() -> None:
    lanes = _lanes(LaneLimits(max_step=4))
    for name, deadline_s in (("late", 0.05), ("also late", 0.09), ("in time", 2.0), ("patient", math.inf)):
        assert lanes.offer(Lane.ONLINE, name, 1, 0.0, deadline_s=deadline_s)
    assert lanes.next_step(0.1) == [Slice("in time", Lane.ONLINE, 0, 1), Slice("patient", Lane.ONLINE, 0, 1)]
    assert lanes.expired == ["late", "also late"]
    assert lanes.backlog(Lane.ONLINE) == 0


def test_the_next_step_is_due_as_long_before_the_end_of_the_last_one_as_a_launch_takes() -> None:
    lanes = _lanes(LaneLimits(max_step=32))
    lanes.offer(Lane.BATCH, "a chunk", 1000, 0.0)
    assert lanes.due_s(5.0) == 5.0
    lanes.next_step(5.0)
    lanes.launched(10.0)
    assert 5.32 - 0.025 <= lanes.due_s(5.0) <= 5.32 - 0.02
    lanes.next_step(5.3)
    assert lanes.due_s(5.3) == math.inf
    lanes.ended(5.4)
    assert 5.72 - 0.025 <= lanes.due_s(5.4) <= 5.72 - 0.02


GRID = [*itertools.product((2.0, 8.0, 30.0), (0.0, 0.1, 0.5, 0.9), (0, 256), ((1,), (1, 5, 40)))]


@pytest.mark.parametrize(("online_step_ms", "load", "batch", "sizes"), GRID)
def test_invariants_under_traffic(online_step_ms: float, load: float, batch: int, sizes: tuple[int, ...]) -> None:
    limits = LaneLimits(max_step=128, online_step_ms=online_step_ms, max_online_backlog=10**6)
    simulation = Simulation(limits, batch=batch)
    arrivals = poisson(load * 128 / h200(128), 3000.0, 1, sizes) if load else []
    simulation.run(arrivals, 3000.0)
    _check_invariants(simulation, arrivals)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 300), st.integers(1, 60)), max_size=60),
    st.sampled_from([0, 7, 256]),
    st.tuples(st.floats(0.05, 5), st.floats(0.01, 2)),
    st.floats(0.5, 50),
    st.floats(0, 5),
)
def test_invariants_under_any_traffic(
    online: list[tuple[float, int]], batch: int, device: tuple[float, float], online_step_ms: float, launch_ms: float
) -> None:
    limits = LaneLimits(max_step=32, online_step_ms=online_step_ms, max_online_backlog=10**6)
    simulation = Simulation(limits, lambda images: device[0] + device[1] * images, batch=batch, launch_ms=launch_ms)
    arrivals = [Request(Lane.ONLINE, images, at_ms) for at_ms, images in sorted(online)]
    simulation.run(arrivals, 300.0)
    _check_invariants(simulation, arrivals)


def _check_invariants(simulation: Simulation, arrivals: list[Request]) -> None:
    steps, limits = simulation.steps, simulation.lanes.limits
    # every image once, in its order
    for request in arrivals:
        assert request.taken == list(range(request.images))
    for lane in Lane:
        begun = [part.token for step in steps for part in step.parts if part.lane is lane]
        assert [one.arrived_ms for one in begun] == sorted(one.arrived_ms for one in begun)
    assert all(step.images() <= limits.max_step for step in steps)
    # a step that batch is in is short where online images are in it too, but for what online needs itself
    for step in steps:
        if step.images(Lane.BATCH) and step.images(Lane.ONLINE):
            needed_ms = simulation.lanes.times.ms(step.images(Lane.ONLINE) + limits.max_step // 16 + 1)
            assert step.ended_ms - step.begun_ms <= max(limits.online_step_ms, needed_ms) * 1.001
    _check_waits(steps, arrivals, limits.max_step)
    # no device that is idle for longer than a launch takes while images wait
    for before, after in itertools.pairwise(steps):
        waiting = min(part.token.arrived_ms for part in after.parts)
        assert after.begun_ms - max(before.ended_ms, waiting) <= simulation.launch_ms + 1e-6


def _check_waits(steps: list[Step], arrivals: list[Request], max_step: int) -> None:
    """While its lane holds no more than a step, less what batch is owed, a request is in the next step."""
    formed_ms, ended_ms = [step.formed_ms for step in steps], [step.ended_ms for step in steps]
    left_ms = [request.formed_ms for request in arrivals]
    for index, request in enumerate(arrivals):
        waiting = arrivals[bisect_left(left_ms, request.arrived_ms) : index + 1]
        if sum(other.images for other in waiting) > max_step * (1 - BATCH_SHARE) - 1:
            continue
        own = bisect_left(formed_ms, request.formed_ms)
        assert own == bisect_left(formed_ms, request.arrived_ms)
        assert own - bisect_right(ended_ms, request.arrived_ms) <= STEPS_UNDER_WAY


def test_batch_is_not_starved_by_an_endless_crowd() -> None:
    simulation = Simulation(LaneLimits(max_step=128), batch=256)
    simulation.run(poisson(2 * 128 / h200(128), 3000.0, 1), 3000.0)
    crowded = [step for step in simulation.steps if step.ended_ms < 3000.0]
    batch = sum(step.images(Lane.BATCH) for step in crowded)
    assert batch >= 0.9 * BATCH_SHARE * sum(step.images() for step in crowded)
    assert simulation.refused


def test_a_model_of_one_image_at_a_time_lets_batch_in_too() -> None:
    simulation = Simulation(LaneLimits(max_step=1), lambda images: 10.0, batch=4)
    simulation.run(poisson(0.2, 3000.0, 1), 3000.0)
    steps = [step for step in simulation.steps if step.ended_ms < 3000.0]
    assert sum(step.images(Lane.BATCH) for step in steps) == pytest.approx(BATCH_SHARE * len(steps), abs=3)


@pytest.mark.parametrize("load", [0.01, 0.1, 0.3])
def test_a_saturating_job_adds_little_to_online_and_gets_what_online_leaves(load: float) -> None:
    """The goals of `benchmarks/coserving.py`, here of the rules alone: whatever is lost there beside is not theirs."""
    capacity = 128 / h200(128)
    alone, together = Simulation(LaneLimits(max_step=128)), Simulation(LaneLimits(max_step=128), batch=256)
    users, crowd = (poisson(load * capacity, 20_000.0, 1) for _ in range(2))
    alone.run(users, 20_000.0)
    together.run(crowd, 20_000.0)

    added_ms = percentile((one.took_ms for one in crowd), 0.99) - percentile((one.took_ms for one in users), 0.99)
    assert added_ms <= 1.25 * 8.0
    steps = [step for step in together.steps if step.ended_ms < 20_000.0]
    batch_per_ms = sum(step.images(Lane.BATCH) for step in steps) / 20_000.0
    assert batch_per_ms >= (0.9 if load < 0.3 else 0.88) * (1 - load) * capacity
    assert sum(step.ended_ms - step.begun_ms for step in steps) >= 0.99 * 20_000.0


def _images(step: list[Slice[str]]) -> int:
    return sum(map(len, step))


def test_an_estimate_that_is_too_long_refuses_nobody_while_the_lane_is_empty() -> None:
    lanes = Lanes[str](LaneLimits(max_step=32), StepTimes(32, {1: 1500.0, 32: 6000.0}))
    assert lanes.offer(Lane.ONLINE, "first", 1, 0.0, deadline_s=1.0)
    assert not lanes.offer(Lane.ONLINE, "behind it", 1, 0.0, deadline_s=1.0)
    lanes.next_step(0.0)
    lanes.ended(0.1, 1, 100.0)
    assert lanes.offer(Lane.ONLINE, "next", 1, 0.1, deadline_s=1.1)


@pytest.mark.parametrize("batch", [0, 256])
def test_a_slow_spell_or_a_wrong_measurement_locks_nobody_out_for_long(batch: int) -> None:
    """Beside a job the device is never idle, and steps of one image are never run."""
    known = {1: 5000.0, 128: h200(128)}
    simulation = Simulation(LaneLimits(max_step=128), batch=batch, measured=lambda images: known[images])
    requests = poisson(0.5, 5000.0, seed=1)
    for request in requests:
        request.deadline_ms = request.arrived_ms + 1000.0

    simulation.run(requests, 5000.0)

    late = [request for request in simulation.refused + simulation.expired if request.arrived_ms > 500.0]
    assert not late
    assert all(len(request.taken) == request.images for request in requests if request.arrived_ms > 500.0)


@pytest.mark.parametrize("seed", range(5))
def test_deadlines_hold_wherever_a_request_waits(seed: int) -> None:
    """Overload by requests of mixed patience, on a device that is slower than it was measured."""
    limits = LaneLimits(max_step=8, max_online_backlog=10_000)
    simulation = Simulation(limits, lambda images: 10.0 * images, measured=lambda images: 0.1 * images)
    requests = poisson(0.3, 2000.0, seed=seed, sizes=(1, 2, 5))
    for number, request in enumerate(requests):
        request.deadline_ms = request.arrived_ms + (50.0, 500.0, 5000.0, math.inf)[number % 4]

    simulation.run(requests, 2000.0)

    expired, refused = set(simulation.expired), set(simulation.refused)
    assert expired
    assert not expired & refused
    for request in requests:
        assert (len(request.taken) == request.images) == (request not in expired | refused)
        if len(request.taken) == request.images:
            assert request.formed_ms <= request.deadline_ms
