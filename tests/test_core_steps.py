"""Cores share a step, some images at a time."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.core_steps import IMAGES_AT_ONCE, CoreSteps
from pipeline.dispatcher import Scores


def _images(*values: int) -> np.ndarray:
    """An image of one pixel for each value."""
    return np.array(values, np.uint8).reshape(-1, 1, 1, 1)


def _echo(images_NHWC: np.ndarray) -> Scores:
    """Scores that are the images' values."""
    values_N1 = images_NHWC.reshape(-1, 1)
    return Scores(values_N1.astype(np.int32), values_N1.astype(np.float32))


def _values(scores: Scores) -> list[int]:
    values: list[int] = scores.top_NK[:, 0].tolist()
    return values


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 5, 16, 17, 60])
def test_scores_are_in_the_order_of_the_images(threads: int, count: int) -> None:
    assert _values(CoreSteps(threads).score(_images(*range(count)), _echo)) == [*range(count)]


@pytest.mark.parametrize("count", [4, 32, 33])
def test_cores_get_a_few_images_at_a_time_and_all_get_some(count: int) -> None:
    parts: list[int] = []

    def score(images_NHWC: np.ndarray) -> Scores:
        parts.append(len(images_NHWC))
        return _echo(images_NHWC)

    CoreSteps(4).score(_images(*range(count)), score)

    assert len(parts) % 4 == 0
    assert max(parts) <= IMAGES_AT_ONCE
