"""A contender of a benchmark: a process that is started once, and then does what standard input asks for.

While it is not asked, it and all that it started are stopped: an idle Ray alone takes a seventh of a core.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import psutil

from benchmarks.processes import Cpu, family, stop

# The class of each image and its score, by the name of its file
Answers: TypeAlias = dict[str, tuple[str, float]]


@dataclass
class Done:
    """One run: what came out, and what else there is to tell."""

    answers: Answers = field(default_factory=dict)
    told: dict[str, Any] = field(default_factory=dict)


def answer_runs(run: Callable[[str], Done]) -> None:
    """In the contender: does a run for each line of standard input, which names a folder."""
    # libraries print what they like, and must not be taken for an answer
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        _tell(out, {"ready": True})
        for line in sys.stdin:
            started_s = time.perf_counter()
            done = run(json.loads(line))
            _tell(out, {"seconds": time.perf_counter() - started_s, "answers": done.answers, **done.told})


def _tell(out: TextIO, content: dict[str, Any]) -> None:
    out.write(json.dumps(content) + "\n")
    out.flush()


class Contender:
    """In the benchmark: a contender that runs."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process, self._log = process, log

    def run(self, folder: str) -> dict[str, Any]:
        """What a run over the folder's images told, with its `cpu_s` in all processes."""
        self.wake()
        assert self._process.stdin is not None
        with Cpu(self._process.pid) as cpu:
            self._process.stdin.write(json.dumps(folder).encode() + b"\n")
            self._process.stdin.flush()
            told = self._told()
        self._signal(signal.SIGSTOP)
        return {**told, "cpu_s": cpu.used_s}

    def wait_ready(self) -> None:
        """Waits until it is, and stops it."""
        self._told()
        self._signal(signal.SIGSTOP)

    def wake(self) -> None:
        """Has it go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for process in family(self._process.pid):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _told(self) -> dict[str, Any]:
        """The next that it tells."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._log.stem} ended:\n{self._log.read_text()[-3000:]}")
        told: dict[str, Any] = json.loads(line)
        return told


@contextmanager
def started(name: str, command: list[str], folder: Path) -> Iterator[Contender]:
    """The contender that the command starts, once it is ready, for as long as the context lasts."""
    log = folder / f"{name}.log"
    with (
        log.open("wb") as errors,
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        ) as process,
    ):
        contender = Contender(process, log)
        try:
            contender.wait_ready()
            yield contender
        finally:
            contender.wake()
            stop(process)
