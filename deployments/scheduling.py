"""Who has a core first: the endpoint and the replicas, before a job's work and before Ray's own processes.

A process that wakes up takes the core from one that computes, and with it what the core's caches held, unless the
kernel schedules it as a batch process. Ray's processes wake some 1,500 times a second when they have nothing to do, as
each worker polls. On two cores that cost a job a twentieth of its speed, beside the tenth that is their own CPU time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

LOWEST_PRIORITY = 19


def give_way() -> None:
    """For what is a job's: has this thread, and those that it starts, take what nobody else wants.

    Ray starts workers at 15, so that a job's driver, at 0, would hold the replicas up for as long as it computes.
    """
    os.setpriority(os.PRIO_PROCESS, 0, LOWEST_PRIORITY)
    _schedule("SCHED_BATCH")


def come_first() -> None:
    """For replicas and endpoints: has this thread, and those that it starts, run as soon as there is something to do.

    Ray's threads of the same process stay as they were started.
    """
    _schedule("SCHED_OTHER")


@contextmanager
def behind_others() -> Iterator[None]:
    """Processes that are started meanwhile, and those that they start, take nobody's core as they wake up."""
    _schedule("SCHED_BATCH")
    try:
        yield
    finally:
        _schedule("SCHED_OTHER")


def _schedule(policy: str) -> None:
    """Of this thread; where there are no such policies, or none may be chosen, it stays as it is."""
    with suppress(AttributeError, OSError):  # macOS has none, and a sandbox may refuse
        os.sched_setscheduler(0, getattr(os, policy), os.sched_param(0))
