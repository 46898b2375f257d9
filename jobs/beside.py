"""A job beside `tandem serve` on this machine, driven by a process of the command that follows it.

Ray's job API would take seconds to start that process. It is one of its own, as Ray ends whoever drives a job at once
and without a word when its cluster stops.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Generator
from typing import Any

from jobs.driver import REQUEST
from jobs.events import events_in
from jobs.remote import forwarded
from pipeline.errors import JobError

END_WITHIN_S = 30.0  # of a driver that is told to stop: it gives OUTPUT back, and a pool of its own


def drive(request: dict[str, Any]) -> Generator[dict[str, Any], None, None]:
    """What the job tells, the last of it a `result` or an `error`. Raises `JobError` where it ends without.

    Closed before, it ends the job.
    """
    # what the cluster's own environment says is `tandem serve`'s, not this command's
    join = request["join"] | {"env_vars": forwarded()}
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "jobs.driver"],  # -P: modules in the user's folder are not Tandem's
        env=os.environ | {REQUEST: json.dumps(request | {"join": join})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",  # a library may print what is no text
        start_new_session=True,  # Ctrl-C reaches the command alone, which tells the driver once
    ) as driver:
        assert driver.stdout
        try:
            said = yield from events_in(driver.stdout)
        except BaseException:  # a result that was read, too: the process has nothing more to do
            _end(driver)
            raise
    raise JobError(f"the job's driver ended with {driver.returncode}: {said or 'it left no word'}")


def _end(driver: subprocess.Popen[str]) -> None:
    driver.terminate()
    try:
        driver.communicate(timeout=END_WITHIN_S)
    except subprocess.TimeoutExpired:
        driver.kill()
