"""How long a model's steps take, by their size."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from operator import truediv

SIZES = 16  # between which steps choose: few enough to compile each one, many enough to use up a budget of time
SMOOTHING = 0.2  # weight of the newest step in the running mean of its size
RETURN = 0.01  # how far a step draws what is known of other sizes to what was measured of them at first
LEAST_MS = 1e-3
OUTLIER = 2.0  # a step counts as at most so many times its mean: a pause of the machine is no news of the model


def step_sizes(max_step: int) -> tuple[int, ...]:
    """The sizes that steps have: sixteenths of the largest one, and powers of two below them."""
    grain = max(1, max_step // SIZES)
    powers = (1 << power for power in range(grain.bit_length()) if 1 << power < grain)
    return (*powers, *range(grain, max_step, grain), max_step)


class StepTimes:
    """The expected time of a step of each size, in ms.

    It starts from what was `measured` (ms by images) for at least one image and `max_step`, with straight lines
    between, and follows what steps then take. Sizes that are not in use go back to what was measured, times the speed
    that the device has now, so that those that a slow spell has put out of use are tried again after it.
    """

    def __init__(self, max_step: int, measured: Mapping[int, float]) -> None:
        if not {1, max_step} <= measured.keys():
            raise ValueError(f"steps of 1 and of {max_step} images must be measured, not {sorted(measured)}")
        self.sizes = step_sizes(max_step)
        self._measured_ms = self._ms = [max(LEAST_MS, _between(size, sorted(measured.items()))) for size in self.sizes]
        self._find_fastest()

    def fit(self, images: int) -> int:
        """The smallest size that holds `images`, or else the largest."""
        return self.sizes[self._index(images)]

    def ms(self, images: int) -> float:
        """What a step of `images` takes."""
        return self._ms[self._index(images)]

    def largest_within(self, budget_ms: float) -> int:
        """The largest size that takes no longer, or else the smallest."""
        for size, step_ms in zip(reversed(self.sizes), reversed(self._ms), strict=True):
            if step_ms <= budget_ms:
                return size
        return self.sizes[0]

    def observe(self, images: int, step_ms: float) -> None:
        """Learns from a step that was measured."""
        index = self._index(images)
        if images != self.sizes[index]:
            return  # between two sizes: it tells the time of neither
        known_ms = self._ms[index]
        known_ms += SMOOTHING * (min(step_ms, OUTLIER * known_ms) - known_ms)
        speed = known_ms / self._measured_ms[index]
        self._ms = [
            other_ms + RETURN * (speed * measured_ms - other_ms)
            for other_ms, measured_ms in zip(self._ms, self._measured_ms, strict=True)
        ]
        self._ms[index] = max(LEAST_MS, known_ms)
        # a smaller step takes no longer: else what is wrongly known of a size that nobody runs would stay so
        self._ms[:index] = [min(smaller_ms, self._ms[index]) for smaller_ms in self._ms[:index]]
        self._find_fastest()

    def _index(self, images: int) -> int:
        return min(bisect_left(self.sizes, images), len(self.sizes) - 1)

    def _find_fastest(self) -> None:
        self.images_per_ms: float
        self.images_per_ms, self.fastest = max(zip(map(truediv, self.sizes, self._ms), self.sizes, strict=True))


def _between(size: int, known: list[tuple[int, float]]) -> float:
    place = bisect_left([images for images, _ in known], size)
    if known[place][0] == size:
        return known[place][1]
    (low, low_ms), (high, high_ms) = known[place - 1], known[place]
    return low_ms + (high_ms - low_ms) * (size - low) / (high - low)
