"""The two lanes lose nothing, double nothing, and let online go first, whatever comes in whatever order."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pipeline.lanes import ONLINE_QUIET_S, Lane, LaneLimits, Lanes, Slice

_LIMITS = LaneLimits(max_step=8, online_step_ms=40.0, max_online_backlog=20, max_batch_backlog=30)
_QUIET_S = ONLINE_QUIET_S + 0.1


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
        self.lanes: Lanes[_Request] = Lanes(_LIMITS)
        self.waiting: list[_Request] = []
        self.now_s = 0.0

    @initialize(step_ms=st.none() | st.floats(0.0, 200.0))
    def start(self, step_ms: float | None) -> None:
        if step_ms is not None:
            self.lanes.observe(8, step_ms)

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
        size = self.lanes.step_size(self.now_s)
        step = self.lanes.next_step(self.now_s)
        counts = {lane: sum(len(part) for part in step if part.lane is lane) for lane in Lane}
        assert 1 <= size <= _LIMITS.max_step
        assert counts[Lane.ONLINE] == min(online, size)
        assert counts[Lane.BATCH] == min(batch, size - counts[Lane.ONLINE])
        assert [part.lane for part in step] == sorted((part.lane for part in step), key=list(Lane).index)
        for part in step:
            self._take(part)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.waiting))
        self.lanes.drop(request)
        self.waiting.remove(request)

    @rule(images=st.integers(1, 8), step_ms=st.floats(0.0, 500.0))
    def observe(self, images: int, step_ms: float) -> None:
        self.lanes.observe(images, step_ms)

    @rule(seconds=st.floats(0.0, 3.0))
    def let_time_pass(self, seconds: float) -> None:
        self.now_s += seconds

    @invariant()
    def backlogs_are_what_waits(self) -> None:
        assert {lane: self.lanes.backlog(lane) for lane in Lane} == {lane: self._waits(lane) for lane in Lane}

    def teardown(self) -> None:
        for _ in range(sum(request.left for request in self.waiting)):
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
def test_every_image_leaves_once_and_online_first(max_step: int, online: int, batch: int) -> None:
    lanes: Lanes[Lane] = Lanes(LaneLimits(max_step=max_step))
    for lane, images in ((Lane.BATCH, batch), (Lane.ONLINE, online)):
        assert not images or lanes.offer(lane, lane, images, 0.0)
    steps = list(iter(lambda: lanes.next_step(0.0), []))
    left = [(part.token, index) for step in steps for part in step for index in range(part.start, part.stop)]
    assert left == [(Lane.ONLINE, index) for index in range(online)] + [(Lane.BATCH, index) for index in range(batch)]
    assert [sum(map(len, step)) for step in steps[:-1]] == [max_step] * (len(steps) - 1)


@pytest.mark.parametrize("lane", Lane)
def test_a_full_lane_refuses_and_the_other_one_does_not(lane: Lane) -> None:
    lanes: Lanes[str] = Lanes(_LIMITS)
    other = Lane.BATCH if lane is Lane.ONLINE else Lane.ONLINE
    assert lanes.offer(lane, "fills it", _room(lane), 0.0)
    assert not lanes.offer(lane, "one more", 1, 0.0)
    assert lanes.offer(other, "elsewhere", 1, 0.0)
    assert lanes.backlog(lane) == _room(lane)


def test_an_empty_lane_takes_a_request_of_any_size() -> None:
    lanes: Lanes[str] = Lanes(_LIMITS)
    assert lanes.offer(Lane.BATCH, "a chunk larger than the bound", 1000, 0.0)
    assert not lanes.offer(Lane.BATCH, "another", 1, 0.0)


def test_a_request_without_images_is_refused_as_a_mistake() -> None:
    lanes: Lanes[str] = Lanes(_LIMITS)
    with pytest.raises(ValueError, match="at least 1"):
        lanes.offer(Lane.ONLINE, "nothing", 0, 0.0)


def test_drop_removes_what_waits_of_one_request_and_nothing_else() -> None:
    lanes: Lanes[str] = Lanes(LaneLimits(max_step=4))
    for name in ("first", "gone", "last"):
        lanes.offer(Lane.BATCH, name, 3, 0.0)
    assert lanes.next_step(0.0) == [Slice("first", Lane.BATCH, 0, 3), Slice("gone", Lane.BATCH, 0, 1)]
    lanes.drop("gone")
    lanes.drop("first")
    assert lanes.backlog(Lane.BATCH) == 3
    assert lanes.next_step(0.0) == [Slice("last", Lane.BATCH, 0, 3)]


def test_steps_are_short_while_online_is_about_and_long_again_after_it() -> None:
    lanes: Lanes[str] = Lanes(LaneLimits(max_step=32, online_step_ms=50.0))
    lanes.observe(32, 320.0)
    assert lanes.step_size(0.0) == 32
    lanes.offer(Lane.ONLINE, "a user", 1, 10.0)
    assert lanes.step_size(10.0) == 5
    lanes.next_step(10.0)
    assert lanes.step_size(10.0 + ONLINE_QUIET_S) == 5
    assert lanes.step_size(10.0 + _QUIET_S) == 32


def test_batch_alone_does_not_shorten_steps() -> None:
    lanes: Lanes[str] = Lanes(LaneLimits(max_step=32, online_step_ms=50.0))
    lanes.observe(32, 320.0)
    lanes.offer(Lane.BATCH, "a chunk", 100, 10.0)
    assert lanes.step_size(10.0) == 32


def test_steps_stay_short_while_online_images_wait_however_long() -> None:
    lanes: Lanes[str] = Lanes(LaneLimits(max_step=32, online_step_ms=50.0))
    lanes.observe(32, 320.0)
    lanes.offer(Lane.ONLINE, "a user", 9, 0.0)
    assert lanes.step_size(60.0) == 5


@pytest.mark.parametrize(("ms_per_image", "size"), [(0.0, 32), (0.001, 32), (3.0, 17), (49.0, 2), (50.0, 1), (9e9, 1)])
def test_a_short_step_is_what_the_budget_allows_within_one_image(ms_per_image: float, size: int) -> None:
    lanes: Lanes[str] = Lanes(LaneLimits(max_step=32, online_step_ms=50.0))
    lanes.offer(Lane.ONLINE, "a user", 1, 0.0)
    lanes.observe(1, ms_per_image)
    assert lanes.step_size(0.0) == size


@pytest.mark.parametrize("fixed_ms", [0.0, 1.0, 20.0, 30.0, 45.0])
def test_short_steps_come_to_fill_the_budget_whatever_part_of_a_step_is_fixed(fixed_ms: float) -> None:
    lanes: Lanes[str] = Lanes(LaneLimits(max_step=1000, online_step_ms=50.0))
    lanes.offer(Lane.ONLINE, "a user", 1, 0.0)
    lanes.observe(1, fixed_ms + 1.0)
    for _ in range(300):
        size = lanes.step_size(0.0)
        lanes.observe(size, fixed_ms + 1.0 * size)
    assert 48.0 <= fixed_ms + lanes.step_size(0.0) <= 52.0
