"""The batch side's call to the pool: one chunk in, its scores out, whatever replicas do meanwhile."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.answer import Answer, Refusal
from pipeline.errors import Busy, PoolFailed

ATTEMPTS = 8  # of a chunk whose replica died or was not there
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
# Before a full pool is asked again. The callers of a pool that is to grow are many more than it has room for.
LONGEST_BUSY_S = 5.0
CALL_TIMEOUT_S = 600.0


def score_chunk(pool: DeploymentHandle[Any], images_NHWC: np.ndarray, top_k: int) -> Answer:
    """The scores of uint8 images [N, H, W, 3], N > 0.

    Waits while the lanes are full, and retries where a replica dies, loses its device or cannot fetch the chunk. Raises
    `PoolFailed` for a step that fails on the model itself, and after `ATTEMPTS` failures.
    """
    chunk = ray.put(images_NHWC)
    failures, busy_pause_s = 0, FIRST_PAUSE_S
    while True:
        answer = _call(pool, chunk, len(images_NHWC), top_k)
        if isinstance(answer, Answer):
            return answer
        if isinstance(answer, Busy):
            pause_s = min(max(busy_pause_s, answer.retry_after_s), LONGEST_BUSY_S)
            busy_pause_s = min(2 * busy_pause_s, LONGEST_BUSY_S)
        else:
            failures += 1
            if failures == ATTEMPTS:
                raise PoolFailed(f"the pool did not score a chunk in {ATTEMPTS} attempts: {answer}") from answer
            pause_s = min(FIRST_PAUSE_S * 2**failures, LONGEST_PAUSE_S)
            if isinstance(answer, ObjectLostError):
                chunk = ray.put(images_NHWC)
        time.sleep(pause_s * random.uniform(0.5, 1.0))


def _call(
    pool: DeploymentHandle[Any], chunk: ray.ObjectRef[np.ndarray], images: int, top_k: int
) -> Answer | Refusal | Exception:
    """What a replica answers, or an error that is worth a retry. Raises `PoolFailed` for one that is not."""
    response = pool.score_batch.remote({"chunk": chunk}, images, top_k)
    try:
        answer: Answer | Refusal = response.result(timeout_s=CALL_TIMEOUT_S)
    except TimeoutError:
        response.cancel()  # type: ignore[no-untyped-call]  # or it would be scored beside the next attempt
        return TimeoutError(f"no answer within {CALL_TIMEOUT_S:g} s")
    except RayTaskError as error:
        cause = error.cause
        if not isinstance(cause, RayError):
            raise PoolFailed(f"the model failed on a chunk of {images} images: {cause}") from error
        return cause  # the replica could not fetch the chunk
    except (RayError, RayServeException) as error:
        return error
    return answer
