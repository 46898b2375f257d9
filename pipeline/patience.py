"""How long Tandem waits for a store that does not answer: long enough for it to restart, short enough to be told."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from pipeline.errors import Unavailable

# Before each further try, on average. botocore's own waits between tries end after less than a second in all.
PAUSES_S = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0)

T = TypeVar("T")


def patiently(call: Callable[[], T], *, sleep: Callable[[float], bool | None] = time.sleep) -> T:
    """What `call` returns, called again while it raises `Unavailable`: `len(PAUSES_S)` times more.

    A `sleep` that returns True ends the waiting.
    """
    for pause_s in PAUSES_S:
        try:
            return call()
        except Unavailable:
            if sleep(pause_s * random.uniform(0.5, 1.5)):
                raise
    return call()
