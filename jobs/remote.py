"""Jobs and endpoints on a cluster that runs elsewhere, by Ray's job API.

The command on the user's machine ships Tandem's own code along and follows the log; the same program, started by Ray
on the cluster as `python -m jobs.remote`, does the work. The request travels in an environment variable and events
come back as lines of JSON, so nothing of the user's input is ever part of a shell command.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import sys
import uuid
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from deployments.config import Config, parse_config
from jobs.receipts import Progress
from jobs.spec import JobSpec
from pipeline import errors
from pipeline.errors import JobError, TandemError, UsageError
from pipeline.imports import uncollected

REQUEST = "TANDEM_REQUEST"
EVENT = "TANDEM_EVENT "
PACKAGES = ("pipeline", "deployments", "jobs")
# What tells where the store is goes along; what opens it (keys, tokens) is the cluster's own, and stays out of Ray's
# job table, which anyone who sees the dashboard can read.
FORWARDED = (
    "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION",
    "AWS_REQUEST_CHECKSUM_CALCULATION", "AWS_RESPONSE_CHECKSUM_VALIDATION", "HF_ENDPOINT", "HF_HUB_OFFLINE",
)  # fmt: skip


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
            reason = str(error).strip().splitlines()[0]
            raise JobError(f"--address {address}: no cluster answers there ({reason})") from error

    def start(self, request: dict[str, Any]) -> str:
        """Starts the work that `request` describes, and returns the job's id. Raises `JobError`."""
        environment = {name: os.environ[name] for name in FORWARDED if name in os.environ}
        root = Path(__file__).resolve().parent.parent
        try:
            job: str = self._client.submit_job(
                entrypoint="python -m jobs.remote",
                submission_id=f"tandem-{uuid.uuid4().hex[:12]}",
                runtime_env={
                    "py_modules": [str(root / package) for package in PACKAGES],
                    "excludes": ["__pycache__"],
                    "env_vars": {**environment, REQUEST: json.dumps(request)},
                },
            )
        except (ConnectionError, RuntimeError) as error:  # as while the cluster comes up
            reason = str(error).strip().splitlines()[0]
            raise JobError(f"the cluster at {self.address} takes no job, try again later: {reason}") from error
        return job

    def events(self, job: str) -> Generator[dict[str, Any], None, None]:
        """What the job tells, the last of it a `result` or an `error`. Raises `JobError` where it ends without."""
        last: list[str] = []
        with closing(self._lines(job)) as lines:
            for line in lines:
                if line.startswith(EVENT):
                    yield json.loads(line.removeprefix(EVENT))
                elif line.strip():
                    last = [*last[-4:], line.strip()]
        info = self._client.get_job_info(job)
        reason = last[-1] if last else info.message or "it left no log"
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


def submit_request(spec: JobSpec, config: Config, max_error_share: float | None) -> dict[str, Any]:
    """What to send for a batch job."""
    settings = {"config": dataclasses.asdict(config), "max_error_share": max_error_share}
    return {"do": "submit", "spec": spec.to_json(), **settings}


def serve_request(model: str, host: str, port: int, config: Config) -> dict[str, Any]:
    """What to send for an endpoint."""
    return {"do": "serve", "model": model, "host": host, "port": port, "config": dataclasses.asdict(config)}


def follow(events: Generator[dict[str, Any], None, None], on_progress: Callable[[Progress], None]) -> dict[str, Any]:
    """The result that the events end with. Raises the error that they tell of."""
    with closing(events):  # Ray takes seconds more to end the job's process and its log
        for event in events:
            if event["event"] == "progress":
                on_progress(Progress(**event["progress"]))
            elif event["event"] == "error":
                raise getattr(errors, event["kind"])(event["message"])
            else:
                result: dict[str, Any] = event["result"]
                return result
    raise JobError("the job told nothing of its end")


def main() -> int:
    """On the cluster: does what the request says, and tells of it line by line."""
    request = json.loads(os.environ[REQUEST])
    try:
        _tell("result", result=_do(request))
    except KeyboardInterrupt:
        _tell("error", kind="JobError", message="the job was stopped; submit it again to go on with it")
        return 1
    except TandemError as error:
        _tell("error", kind=type(error).__name__, message=str(error))
        return 1
    return 0


def _do(request: dict[str, Any]) -> dict[str, Any]:
    from deployments.cluster import join_ray, start_serve

    config = parse_config(request["config"])
    if request["do"] == "serve":
        with uncollected():
            from deployments.endpoint import serve_model

        join_ray(request.get("gcs_address"))
        start_serve()
        running = serve_model(request["model"], request["host"], request["port"], config)
        return {"model": running.info.model, "revision": running.info.revision, "chosen": running.chosen}
    with uncollected():
        from jobs.run import prepare, run_job

    job = prepare(JobSpec.from_json(request["spec"]))
    join_ray(request.get("gcs_address"))
    start_serve()
    report = run_job(
        job,
        config,
        lambda progress: _tell("progress", progress=progress.__dict__),
        max_error_share=request["max_error_share"],
    )
    return report.to_dict()


def _tell(event: str, **content: Any) -> None:
    print(EVENT + json.dumps({"event": event, **content}), flush=True)


if __name__ == "__main__":
    sys.exit(main())
