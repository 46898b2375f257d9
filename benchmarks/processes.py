"""Processes that a benchmark starts: what they and their children use, and their end."""

from __future__ import annotations

import signal
import subprocess
import threading
from contextlib import suppress

import psutil

PATIENCE_S = 30.0
LOOK_EVERY_S = 0.5


def family(pid: int) -> list[psutil.Process]:
    """The process, and all that it and they started; nobody once it has ended."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all that it started: by the end of what it reads from here, or by an interrupt."""
    tree = family(process.pid)
    if process.stdin:
        process.stdin.close()
    else:
        process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE_S)
    for one in tree:
        with suppress(psutil.NoSuchProcess):
            one.kill()


class Cpu:
    """CPU seconds that a process and all that it started use within the context.

    To look before and after is not enough: Ray does not wait for workers that end, and the kernel then adds their time
    to nobody's. So it looks every half second, and a process that ends is counted up to the last look.
    """

    def __init__(self, root: int) -> None:
        self._root, self._ended = root, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._seen: dict[psutil.Process, float] = {}
        self._before_s = 0.0

    def __enter__(self) -> Cpu:
        self._look()
        self._before_s = sum(self._seen.values())
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    @property
    def used_s(self) -> float:
        """Until the last look."""
        return sum(self._seen.values()) - self._before_s

    def _watch(self) -> None:
        while not self._ended.wait(LOOK_EVERY_S):
            self._look()

    def _look(self) -> None:
        for process in family(self._root):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                self._seen[process] = times.user + times.system
