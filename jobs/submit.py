"""`tandem submit`: to a cluster by its job API, beside `tandem serve` on this machine, or on a Ray of its own."""

from __future__ import annotations

from typing import Any

from deployments.cluster import find_local, local_ray, own_ray, start_serve, stop_on_sigterm
from deployments.config import Config
from jobs.driver import submit_request
from jobs.events import follow
from jobs.screen import Screen
from jobs.spec import JobSpec
from pipeline.errors import JobError, TandemError, UsageError
from pipeline.imports import uncollected


def submit_job(
    screen: Screen, spec: JobSpec, config: Config, *, max_error_share: float | None, address: str | None, wait: bool
) -> None:
    """Runs or sends the job, and tells what became of it. Raises `TandemError`."""
    request = submit_request(spec, config, max_error_share)
    local = None if address else find_local()
    if local:
        address = local.address
        request["join"] = {"gcs_address": local.gcs_address}
    if address is None and not wait:
        raise UsageError("no cluster: give --address http://HEAD:8265, or --wait to run the job on this machine")
    if address is None:
        _show(screen, _run_here(screen, spec, config, max_error_share))
    elif local and wait:
        _show(screen, _run_beside(screen, request))
    else:
        _send(screen, request, address, spec.output, wait)


def _send(screen: Screen, request: dict[str, Any], address: str, output: str, wait: bool) -> None:
    from jobs.remote import Cluster

    cluster = Cluster(address)
    job = cluster.start(request)
    if not wait:
        screen.result({"job": job, "address": address, "output": output})
        screen.say(f"job {job} runs at {address}; follow it with: ray job logs --address {address} --follow {job}")
        return
    with screen.progress("waiting for the cluster") as bar:
        try:
            report = follow(cluster.events(job), bar.show)
        except KeyboardInterrupt:
            stop = f"ray job stop --address {address} {job}"
            raise JobError(f"not followed any more, but job {job} goes on; to end it: {stop}") from None
    _show(screen, {"job": job, **report})


def _run_beside(screen: Screen, request: dict[str, Any]) -> dict[str, Any]:
    from jobs.beside import drive

    stop_on_sigterm()
    try:
        with screen.progress("joining the pool") as bar:
            return follow(drive(request), bar.show)
    except TandemError:
        if find_local() is None:  # what failed of it first says less
            told = "the `tandem serve` that the job ran beside was stopped; submit it again to go on with it"
            raise JobError(told) from None
        raise


def _run_here(screen: Screen, spec: JobSpec, config: Config, max_error_share: float | None) -> dict[str, Any]:
    own_ray()
    with uncollected():
        from jobs.prepare import prepare
        from jobs.run import run_job

    job = prepare(spec)  # a wrong bucket is told at once, not after Ray has started
    if job.report is not None:
        return job.report.to_dict()
    with screen.progress("starting Ray") as bar, local_ray():
        start_serve()
        return run_job(job, config, bar.show, max_error_share=max_error_share).to_dict()


def _show(screen: Screen, report: dict[str, Any]) -> None:
    screen.result(report)
    if report["resumed"] == report["shards"]:
        screen.say(
            f"{report['output']} was finished already: {report['shards']:,} shards, {report['scored']:,} images "
            f"scored, {report['errors']:,} errors"
        )
        screen.say_skipped(report["skipped"])
        return
    screen.say(
        f"{report['scored']:,} images in {report['shards']:,} shards scored, {report['errors']:,} errors, in "
        f"{report['seconds']:,.1f} s ({report['images_per_s']:,.0f} images/s)"
    )
    if report["resumed"]:
        screen.say(f"resumed: {report['resumed']:,} shards were complete; {report['run_images']:,} images in this run")
    screen.say_skipped(report["skipped"])
    screen.say_choices(report["pool"])
    screen.say(f"output: {report['output']}")
