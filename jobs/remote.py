"""Jobs and endpoints on a cluster that runs elsewhere, by Ray's job API.

The command on the user's machine ships Tandem's own code along, has Ray start `jobs.driver` on the cluster and follows
its log. The request travels in an environment variable, so nothing of the user's input is ever part of a shell command.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import AsyncGenerator, Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from jobs.driver import REQUEST
from jobs.events import events_in
from pipeline.errors import JobError, UsageError
from pipeline.imports import uncollected

PACKAGES = ("pipeline", "deployments", "jobs")
# What tells where the store is goes along; what opens it (keys, tokens) is the cluster's own, and stays out of Ray's
# job table, which anyone who sees the dashboard can read.
FORWARDED = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION", "HF_ENDPOINT", "HF_HUB_OFFLINE",
)  # fmt: skip


def forwarded() -> dict[str, str]:
    """What of this environment goes along with a job."""
    return {name: os.environ[name] for name in FORWARDED if name in os.environ}


class Cluster:
    """A cluster's job API."""

    def __init__(self, address: str) -> None:
        """`address` is `http://HEAD:8265`. Raises `UsageError` for another form, `JobError` where nothing answers."""
        if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
            raise UsageError(f"--address {address!r}: give the cluster's job API, such as http://HEAD:8265")
        with uncollected():
            from ray.job_submission import JobSubmissionClient

        self.address = address
        try:
            self._client = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError) as error:
            raise JobError(f"--address {address}: no cluster answers there ({_first_line(error)})") from error

    def start(self, request: dict[str, Any]) -> str:
        """Starts the work that `request` describes, and returns the job's id. Raises `JobError`."""
        root = Path(__file__).resolve().parent.parent
        try:
            job: str = self._client.submit_job(
                entrypoint="python -m jobs.driver",
                submission_id=f"tandem-{uuid.uuid4().hex[:12]}",
                runtime_env={
                    "py_modules": [str(root / package) for package in PACKAGES],
                    "excludes": ["__pycache__"],
                    "env_vars": forwarded() | {REQUEST: json.dumps(request)},
                },
            )
        except (ConnectionError, RuntimeError) as error:  # as while the cluster comes up
            told = f"the cluster at {self.address} takes no job, try again later: {_first_line(error)}"
            raise JobError(told) from error
        return job

    def events(self, job: str) -> Generator[dict[str, Any], None, None]:
        """What the job tells, the last of it a `result` or an `error`. Raises `JobError` where it ends without."""
        with closing(self._lines(job)) as lines:
            said = yield from events_in(lines)
        info = self._client.get_job_info(job)
        reason = said or info.message or "it left no log"
        raise JobError(f"job {job} is {info.status.value.lower()}: {reason} (see `ray job logs {job}`)")

    def _lines(self, job: str) -> Generator[str, None, None]:
        log = cast(AsyncGenerator[str, None], self._client.tail_job_logs(job))
        rest = ""
        with asyncio.Runner() as runner:
            try:
                while True:
                    *lines, rest = (rest + runner.run(_next(log))).split("\n")
                    yield from lines
            except StopAsyncIteration:
                yield rest
            finally:
                with suppress(RuntimeError):  # it does not take being closed half-way
                    runner.run(log.aclose())


async def _next(log: AsyncGenerator[str, None]) -> str:
    return await anext(log)


def _first_line(error: Exception) -> str:
    """What Ray says, without the server's traceback."""
    return str(error).strip().splitlines()[0]
