"""Who has a core first. Linux schedules threads, and what a thread starts is scheduled as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn, TypeVar

import pytest

from deployments.scheduling import LOWEST_PRIORITY, behind_others, come_first, give_way

Result = TypeVar("Result")


def test_what_gives_way_has_the_lowest_priority_and_breaks_into_nothing() -> None:
    def work() -> tuple[int, int]:
        give_way()
        return os.sched_getscheduler(0), os.getpriority(os.PRIO_PROCESS, 0)

    assert _in_thread(work) == (os.SCHED_BATCH, LOWEST_PRIORITY)


def test_what_is_started_behind_others_stays_there_and_the_one_who_starts_it_does_not() -> None:
    def work() -> tuple[int, int]:
        with behind_others():
            started = _of_a_process()
        return started, os.sched_getscheduler(0)

    assert _in_thread(work) == (os.SCHED_BATCH, os.SCHED_OTHER)


def test_who_comes_first_does_so_in_a_process_that_was_started_behind_others() -> None:
    def work() -> int:
        with behind_others():
            come_first()
            return os.sched_getscheduler(0)

    assert _in_thread(work) == os.SCHED_OTHER


def test_a_failed_start_leaves_nobody_behind() -> None:
    def work() -> int:
        with pytest.raises(RuntimeError), behind_others():
            raise RuntimeError
        return os.sched_getscheduler(0)

    assert _in_thread(work) == os.SCHED_OTHER


def test_a_sandbox_may_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> NoReturn:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    come_first()


def test_other_systems_have_no_such_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setscheduler")
    come_first()


def _in_thread(work: Callable[[], Result]) -> Result:
    """What it gives in a thread of its own, whose scheduling is nobody else's."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(work).result()


def _of_a_process() -> int:
    """How a process is scheduled that is started here."""
    code = "import os; print(os.sched_getscheduler(0))"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
