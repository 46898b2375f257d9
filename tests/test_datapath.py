"""How many decoders a job has, and what its caller makes of the pool's answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deployments.answer import Answer
from jobs.datapath import DECODE_CPUS, READ_CPUS, _Caller, decoders_for
from pipeline.dispatcher import Scores
from pipeline.errors import JobError, OutputConflict

IMAGES_NHWC = np.zeros((2, 8, 8, 3), np.uint8)


def _caller(answers: str) -> _Caller:
    """A caller of a job that was planned with revision a, beside a pool that answers as it is told."""

    def score_chunk(images_NHWC: np.ndarray, top_k: int) -> Answer:
        count = len(images_NHWC)
        return Answer(Scores(np.zeros((count, top_k), np.int32), np.zeros((count, top_k), np.float32)), "r", answers)

    caller: Any = _Caller.__new__(_Caller)  # its constructor wants a cluster
    caller._path = SimpleNamespace(model="m", top_k=1, scores_as="revision a in float32")
    caller._score_chunk = score_chunk
    made: _Caller = caller
    return made


def test_scores_of_the_planned_model_are_taken() -> None:
    scores, replica, _ = _caller("revision a in float32")._score(IMAGES_NHWC)
    assert (scores.top_NK.shape, replica) == ((2, 1), "r")


@pytest.mark.parametrize("other", ["revision b in float32", "revision a in bfloat16"])
def test_scores_of_a_pool_that_changed_under_the_job_are_not_mixed_with_the_others(other: str) -> None:
    with pytest.raises(OutputConflict, match=f"changed from revision a in float32 to {other} while the job ran"):
        _caller(other)._score(IMAGES_NHWC)


def test_a_chunk_without_an_image_that_decodes_asks_nobody() -> None:
    scores, replica, _ = _caller("never asked")._score(IMAGES_NHWC[:0])
    assert (scores.top_NK.shape, replica) == ((0, 1), "")


@pytest.mark.parametrize("free_cpus", [0.2, 0.5, 0.9, 1.0, 1.4, 2.0, 3.5, 16.0, 1000.0])
@pytest.mark.parametrize("kept_cpus", [0.0, 0.5, 1.5, 8.0, 2000.0])
def test_decoders_and_a_reader_fit_beside_what_replicas_may_still_want(free_cpus: float, kept_cpus: float) -> None:
    decoders, cpus = decoders_for(free_cpus, kept_cpus)

    assert decoders >= 1
    assert 0 < cpus <= DECODE_CPUS
    assert decoders * cpus + READ_CPUS <= free_cpus + 1e-9
    if decoders > 1:  # a job has one in any case
        assert decoders * cpus + READ_CPUS + kept_cpus <= free_cpus + 1e-9
    assert (decoders + 1) * cpus + READ_CPUS + kept_cpus > free_cpus


def test_a_cluster_without_room_for_a_decoder_is_told_what_is_missing() -> None:
    with pytest.raises(
        JobError, match=r"the cluster has 0\.1 free CPUs, and a job needs more than 0\.1 beside the pool"
    ):
        decoders_for(0.1, 0.0)
