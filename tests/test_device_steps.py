"""Steps of fixed sizes, from memory that is used again and again, give what the model gives: here on a CPU.

What only a GPU does (streams, events, graphs) is checked by `benchmarks/gpu.py`, which refuses to tell speeds of steps
whose scores differ.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from jobs.models import shipped
from pipeline.checkpoint import find_checkpoint
from pipeline.device_steps import SLOTS, DeviceSteps
from pipeline.dispatcher import Scores
from pipeline.model import Classifier
from pipeline.steps import step_sizes

MAX_STEP, TOP_K = 32, 3


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return Classifier(find_checkpoint(str(shipped("digits-vit"))), device="cpu")


@pytest.fixture
def steps(classifier: Classifier) -> DeviceSteps:
    transform = classifier.info.transform
    shape = (transform.height, transform.width, 3)
    return DeviceSteps(classifier.forward, MAX_STEP, shape, torch.device("cpu"), graphs=True)


def _images(classifier: Classifier, count: int, seed: int = 0) -> np.ndarray:
    """Noise, read-only as what comes from Ray's object store is."""
    transform = classifier.info.transform
    shape = (count, transform.height, transform.width, 3)
    images_NHWC = np.random.default_rng(seed).integers(0, 256, shape, np.uint8)
    images_NHWC.flags.writeable = False
    return images_NHWC


def _assert_same(found: Scores, expected: Scores) -> None:
    assert found.top_NK.tolist() == expected.top_NK.tolist()
    assert (str(found.top_NK.dtype), str(found.scores_NK.dtype)) == ("int32", "float32")
    np.testing.assert_allclose(found.scores_NK, expected.scores_NK, atol=1e-5)
    for one, other in ((found.logits_NC, expected.logits_NC), (found.embeddings_ND, expected.embeddings_ND)):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("details", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 7, MAX_STEP - 1, MAX_STEP])
def test_a_step_gives_what_the_model_gives(
    count: int, details: bool, classifier: Classifier, steps: DeviceSteps
) -> None:
    images_NHWC = _images(classifier, count)
    parts = [images_NHWC[: count // 2], images_NHWC[count // 2 :]]
    found = steps.launch(parts, TOP_K, details=details)()
    _assert_same(found, classifier.score(images_NHWC.copy(), TOP_K, details=details))


def test_steps_that_are_launched_before_others_are_read_keep_their_own_scores(
    classifier: Classifier, steps: DeviceSteps
) -> None:
    batches = [_images(classifier, 1 + number % MAX_STEP, number) for number in range(3 * SLOTS)]
    reads: list[Callable[[], Scores]] = [steps.launch([batch], TOP_K, details=True) for batch in batches]
    for batch, read in zip(batches, reads, strict=True):
        _assert_same(read(), classifier.score(batch.copy(), TOP_K, details=True))


def test_steps_have_few_sizes_and_what_fills_them_up_is_not_scored_as_theirs(classifier: Classifier) -> None:
    seen: list[int] = []

    def forward(images_NHWC: torch.Tensor):  # type: ignore[no-untyped-def]
        seen.append(len(images_NHWC))
        return classifier.forward(images_NHWC)

    transform = classifier.info.transform
    steps = DeviceSteps(forward, MAX_STEP, (transform.height, transform.width, 3), torch.device("cpu"), graphs=True)
    full = steps.launch([_images(classifier, MAX_STEP)], TOP_K, details=False)()
    one = steps.launch([_images(classifier, MAX_STEP - 1, seed=1)], TOP_K, details=False)()
    assert len(full.top_NK) == MAX_STEP
    assert len(one.top_NK) == MAX_STEP - 1
    assert seen == [MAX_STEP, MAX_STEP]
    assert set(seen) <= set(step_sizes(MAX_STEP))
