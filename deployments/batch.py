"""The batch side's call to the pool: one chunk in, its scores out, whatever replicas do meanwhile."""

from __future__ import annotations

import random
import time
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deployments.answer import Answer
from pipeline.errors import Busy, PoolFailed

ATTEMPTS = 8  # of a chunk whose replica died or was not there
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 10.0
# Before a full pool is asked again. The callers of a pool that is to grow are many more than it has room for.
LONGEST_BUSY_S = 5.0
CALL_TIMEOUT_S = 600.0


def score_chunk(pool: DeploymentHandle[Any], images_NHWC: np.ndarray, top_k: int) -> Answer:
    """The scores of uint8 images [N, H, W, 3], N > 0.

    Waits while the lanes are full, and tries again where a replica dies. Raises `PoolFailed` for a step that fails on
    the model itself, and for a pool that is not back after `ATTEMPTS` tries.
    """
    chunk = ray.put(images_NHWC)
    failures, patience_s = 0, FIRST_PAUSE_S
    while True:
        try:
            answer = pool.score_batch.remote({"chunk": chunk}, len(images_NHWC), top_k).result(timeout_s=CALL_TIMEOUT_S)
        except RayTaskError as error:
            raise PoolFailed(f"the model failed on a chunk of {len(images_NHWC)} images: {error.cause}") from error
        except (RayError, RayServeException, TimeoutError) as error:
            failures += 1
            if failures == ATTEMPTS:
                raise PoolFailed(f"the pool did not answer {ATTEMPTS} times: {error}") from error
            pause_s = min(FIRST_PAUSE_S * 2**failures, LONGEST_PAUSE_S)
        else:
            if isinstance(answer, Answer):
                return answer
            assert isinstance(answer, Busy)
            pause_s = min(max(patience_s, answer.retry_after_s), LONGEST_BUSY_S)
            patience_s = min(2 * patience_s, LONGEST_BUSY_S)
        time.sleep(pause_s * random.uniform(0.5, 1.0))
