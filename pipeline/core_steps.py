"""Steps on CPU cores: each takes its share of a step's images, and runs them by itself.

To share each matrix between cores instead, as torch does, has them meet hundreds of times in a step, and all wait for
one that something else holds up. A ViT of 5.5 million weights scored steps of 32 images 1.3 times as fast this way.
A few images at a time stay in the core's cache, and a core that is held up leaves what it has not begun to the others.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from pipeline.dispatcher import Scores

IMAGES_AT_ONCE = 8  # of that ViT: by 16 an image took a twentieth longer, by 2 a tenth


class CoreSteps:
    """Scores steps on so many threads."""

    def __init__(self, threads: int) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "tandem-core", torch.set_num_threads, (1,))

    def score(self, images_NHWC: np.ndarray, score: Callable[[np.ndarray], Scores]) -> Scores:
        """What `score` gives of uint8 images [N, H, W, 3], which it gets some of at a time.

        A step of fewer images than threads is not divided: its matrices are shared.
        """
        if len(images_NHWC) < self._threads or self._threads == 1:
            torch.set_num_threads(self._threads)  # in this thread; a new one takes what was set last, in whichever
            return score(images_NHWC)
        turns = -(-len(images_NHWC) // (self._threads * IMAGES_AT_ONCE))
        return Scores.joined(list(self._pool.map(score, np.array_split(images_NHWC, turns * self._threads))))
