"""A remote object as a seekable file, fetched in windows.

Tar shards are read from front to back and Parquet files by parts; both are served by ranged requests of a few MiB.
While a sequential reader works on one window the next is fetched, so that it waits for the store only at the start.
A window that fails is fetched again by itself: a connection that breaks at 900 MB of 1 GB costs one window.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, cast

from pipeline.patience import patiently

WINDOW_BYTES = 8 << 20

Fetch = Callable[[int, int], bytes]


def open_ranged(fetch: Fetch, size: int, *, window_bytes: int = WINDOW_BYTES) -> BinaryIO:
    """A buffered file over `fetch(start, stop) -> bytes [start, stop)` of an object of `size` bytes.

    Where `fetch` raises `Unavailable`, it is called again for that window; what it raises in the end, reads raise.
    """
    return cast(BinaryIO, io.BufferedReader(RangedFile(fetch, size, window_bytes), buffer_size=1 << 16))


class RangedFile(io.RawIOBase):
    """See `open_ranged`. Not thread safe, like any file."""

    def __init__(self, fetch: Fetch, size: int, window_bytes: int) -> None:
        self._fetch, self._size, self._window_bytes = fetch, size, window_bytes
        self._position = 0
        self._window, self._window_start = b"", 0
        self._ahead: tuple[int, Future[bytes]] | None = None
        self._closing = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tandem-read-ahead")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if position < 0:
            raise ValueError(f"seek to {position}")
        self._position = position
        return position

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
        self._closing.set()
        self._thread.shutdown(wait=False, cancel_futures=True)
        super().close()

    def _load(self, start: int) -> None:
        sequential = start == self._window_start + len(self._window)
        # forgotten first, so that a window that failed is fetched anew if it is wanted again
        ahead, self._ahead = self._ahead, None
        if ahead and ahead[0] == start:
            window = ahead[1].result()
        else:
            if ahead:
                ahead[1].cancel()
            window = self._fetch_window(start)
        self._window, self._window_start = window, start
        following = start + len(window)
        if sequential and following < self._size:
            self._ahead = following, self._thread.submit(self._fetch_window, following)

    def _fetch_window(self, start: int) -> bytes:
        stop = min(start + self._window_bytes, self._size)
        return patiently(lambda: self._fetch(start, stop), sleep=self._closing.wait)
