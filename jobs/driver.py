"""The program that drives a job, or deploys an endpoint, on the cluster that it runs in: `python -m jobs.driver`.

The request is in its environment; what becomes of it, it tells line by line (`jobs.events`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

from deployments.config import Config, parse_config
from jobs.events import tell
from jobs.spec import JobSpec
from pipeline.errors import TandemError
from pipeline.imports import uncollected

REQUEST = "TANDEM_REQUEST"


def submit_request(spec: JobSpec, config: Config, max_error_share: float | None) -> dict[str, Any]:
    """What to ask for a batch job."""
    settings = {"config": dataclasses.asdict(config), "max_error_share": max_error_share}
    return {"do": "submit", "spec": spec.to_json(), **settings}


def serve_request(model: str, host: str, port: int, config: Config) -> dict[str, Any]:
    """What to ask for an endpoint."""
    return {"do": "serve", "model": model, "host": host, "port": port, "config": dataclasses.asdict(config)}


def main() -> int:
    """Does what the request says, and tells of it."""
    request = json.loads(os.environ[REQUEST])
    try:
        tell("result", result=_do(request))
    except KeyboardInterrupt:
        tell("error", kind="JobError", message="the job was stopped; submit it again to go on with it")
        return 1
    except TandemError as error:
        tell("error", kind=type(error).__name__, message=str(error))
        return 1
    return 0


def _do(request: dict[str, Any]) -> dict[str, Any]:
    from deployments.cluster import join_ray, start_serve

    config = parse_config(request["config"])
    if request["do"] == "serve":
        with uncollected():
            from deployments.endpoint import serve_model

        join_ray(**request.get("join", {}))
        start_serve()
        running = serve_model(request["model"], request["host"], request["port"], config)
        return {"model": running.info.model, "revision": running.info.revision, "chosen": running.chosen}
    with uncollected():
        from jobs.prepare import prepare
        from jobs.run import run_job

    job = prepare(JobSpec.from_json(request["spec"]))
    join_ray(**request.get("join", {}))
    start_serve()
    report = run_job(
        job,
        config,
        lambda progress: tell("progress", progress=progress.__dict__),
        max_error_share=request["max_error_share"],
    )
    return report.to_dict()


if __name__ == "__main__":
    sys.exit(main())
