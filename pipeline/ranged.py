"""A remote object as a seekable file, fetched in windows.

Tar shards are read from front to back and Parquet files by parts; both are served by ranged requests of a few MiB.
While a sequential reader works on one window the next is fetched, so that it waits for the store only at the start.
A window that fails is fetched again by itself: a connection that breaks at 900 MB of 1 GB costs one window.
"""

from __future__ import annotations

import io
import random
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, cast

from pipeline.errors import Unavailable

WINDOW_BYTES = 8 << 20
ATTEMPTS = 5
FIRST_PAUSE_S = 0.2

Fetch = Callable[[int, int], bytes]


def open_ranged(fetch: Fetch, size: int, *, window_bytes: int = WINDOW_BYTES) -> BinaryIO:
    """A buffered file over `fetch(start, stop) -> bytes [start, stop)` of an object of `size` bytes.

    Raises `Unavailable` from reads, after `ATTEMPTS` tries of one window.
    """
    return cast(BinaryIO, io.BufferedReader(RangedFile(fetch, size, window_bytes), buffer_size=1 << 16))


class RangedFile(io.RawIOBase):
    """See `open_ranged`. Not thread safe, like any file."""

    def __init__(self, fetch: Fetch, size: int, window_bytes: int) -> None:
        self._fetch, self._size, self._window_bytes = fetch, size, window_bytes
        self._position = 0
        self._window, self._window_start = b"", 0
        self._ahead: tuple[int, Future[bytes]] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tandem-read-ahead")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if self._position >= self._size:
            return 0
        if not self._window_start <= self._position < self._window_start + len(self._window):
            self._load(self._position)
        start = self._position - self._window_start
        part = self._window[start : start + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _load(self, start: int) -> None:
        sequential = start == self._window_start + len(self._window)
        if self._ahead and self._ahead[0] == start:
            window = self._ahead[1].result()
        else:
            window = self._fetch_window(start)
        self._ahead = None
        self._window, self._window_start = window, start
        following = start + len(window)
        if sequential and following < self._size:
            self._ahead = following, self._thread.submit(self._fetch_window, following)

    def _fetch_window(self, start: int) -> bytes:
        stop = min(start + self._window_bytes, self._size)
        for attempt in range(ATTEMPTS):
            try:
                return self._fetch(start, stop)
            except Unavailable:
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(FIRST_PAUSE_S * 2**attempt * random.uniform(0.5, 1.5))
        raise AssertionError("unreachable")
