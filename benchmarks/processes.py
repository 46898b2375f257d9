"""Processes that a benchmark starts: what they and their children use, and their end."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

PATIENCE_S = 30.0


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all that it started: by the end of what it reads from here, or by an interrupt."""
    tree = [*family(process.pid)]
    if process.stdin:
        process.stdin.close()
    else:
        process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE_S)
    for pid in tree:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def family(pid: int) -> Iterator[int]:
    """The process, and all that it and they started."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):
            for child in task.read_text().split():
                yield from family(int(child))


def cpu_s(root: int) -> float:
    """CPU seconds that the process and all that it started have used; also those that have ended since."""
    ticks = 0
    for pid in family(root):
        with suppress(FileNotFoundError, ProcessLookupError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")
