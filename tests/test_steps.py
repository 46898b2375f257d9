"""What is known of a model's steps, and how it is learned."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.steps import OUTLIER, StepTimes, step_sizes


@given(st.integers(1, 4096))
def test_sizes_rise_from_one_to_the_largest_in_few_and_small_strides(max_step: int) -> None:
    sizes = step_sizes(max_step)
    assert (sizes[0], sizes[-1]) == (1, max_step)
    assert list(sizes) == sorted(set(sizes))
    assert len(sizes) <= 32
    for low, high in itertools.pairwise(sizes):
        assert high <= 2 * low or high - low <= max(1, max_step // 16)


@pytest.mark.parametrize("measured", [{}, {1: 2.0}, {32: 9.0}, {2: 2.0, 32: 9.0}, {1: 2.0, 64: 9.0}])
def test_the_ends_must_be_measured(measured: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="steps of 1 and of 32 images must be measured"):
        StepTimes(32, measured)


def test_between_measured_sizes_times_are_on_a_line() -> None:
    times = StepTimes(32, {1: 3.0, 16: 18.0, 32: 50.0})
    assert [times.ms(images) for images in (1, 2, 16, 24, 32)] == [3.0, 4.0, 18.0, 34.0, 50.0]


def test_a_step_between_two_sizes_takes_what_the_larger_one_does_and_none_is_larger_than_the_largest() -> None:
    times = StepTimes(32, {1: 1.0, 32: 32.0})
    assert [times.fit(images) for images in (1, 3, 4, 31, 32, 99)] == [1, 4, 4, 32, 32, 32]
    assert [times.ms(images) for images in (3, 99)] == [4.0, 32.0]


def test_a_budget_buys_the_largest_size_within_it_and_always_one_image() -> None:
    times = StepTimes(32, {1: 5.0, 32: 36.0})
    assert [times.largest_within(budget_ms) for budget_ms in (-1, 0, 5, 6, 7.9, 8, 36, 1e9)] == [
        1,
        1,
        1,
        2,
        2,
        4,
        32,
        32,
    ]


def test_the_fastest_size_need_not_be_the_largest() -> None:
    assert StepTimes(32, {1: 2.0, 16: 16.0, 32: 64.0}).fastest == 16
    assert StepTimes(32, {1: 2.0, 32: 33.0}).fastest == 32
    assert StepTimes(32, {1: 2.0, 32: 33.0}).images_per_ms == pytest.approx(32 / 33)


def test_what_steps_take_is_followed_at_once_at_their_size_and_in_time_at_the_others() -> None:
    times = StepTimes(32, {1: 2.0, 32: 33.0})
    for _ in range(20):
        times.observe(32, 66.0)
    assert times.ms(32) == pytest.approx(66.0, rel=0.02)
    assert 2.0 < times.ms(1) < 3.0
    for _ in range(500):
        times.observe(32, 66.0)
    assert times.ms(1) == pytest.approx(4.0, rel=0.02)


def test_a_size_that_is_slower_than_was_measured_is_learned_and_others_keep_their_own() -> None:
    times = StepTimes(32, {1: 2.0, 32: 33.0})
    for _ in range(100):
        times.observe(32, 99.0)
        times.observe(16, 17.0)
    assert times.ms(32) == pytest.approx(99.0, rel=0.1)
    assert times.ms(16) == pytest.approx(17.0, rel=0.25)
    assert times.fastest < 32


def test_sizes_that_a_slow_spell_has_put_out_of_use_come_back() -> None:
    times = StepTimes(32, {1: 2.0, 32: 33.0})
    for _ in range(100):
        times.observe(32, 330.0)
    assert times.largest_within(40.0) < 32
    for _ in range(500):
        images = times.largest_within(40.0)
        times.observe(images, 1.0 + images)
    assert times.largest_within(40.0) == 32


def test_one_pause_of_the_machine_does_not_count_as_the_models() -> None:
    times = StepTimes(32, {1: 2.0, 32: 33.0})
    times.observe(32, 33_000.0)
    assert times.ms(32) <= 33.0 * OUTLIER


def test_a_step_between_two_sizes_teaches_nothing() -> None:
    times = StepTimes(32, {1: 2.0, 32: 33.0})
    times.observe(31, 1000.0)
    assert times.ms(32) == 33.0


@given(st.lists(st.tuples(st.integers(1, 40), st.floats(0, 1e6)), max_size=60))
def test_whatever_is_observed_times_stay_finite_and_sizes_usable(seen: list[tuple[int, float]]) -> None:
    times = StepTimes(32, {1: 0.0, 32: 33.0})
    for images, step_ms in seen:
        times.observe(images, step_ms)
    assert all(0 <= times.ms(size) < 1e12 for size in times.sizes)
    assert times.fastest in times.sizes
    assert times.largest_within(8.0) in times.sizes


def test_a_smaller_step_is_never_expected_to_take_longer() -> None:
    times = StepTimes(32, {1: 1500.0, 32: 320.0})
    times.observe(8, 80.0)
    assert times.ms(1) <= times.ms(8)
