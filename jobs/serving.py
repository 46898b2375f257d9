"""`tandem serve`: an endpoint on this machine until it is stopped, or in a cluster."""

from __future__ import annotations

import signal
import threading

from deployments.cluster import announce, local_ray, serve_at
from deployments.config import Config
from jobs.screen import Screen


def serve_here(screen: Screen, model: str, host: str, port: int, config: Config) -> None:
    """Serves until SIGINT or SIGTERM. Jobs that are submitted on this machine meanwhile share the pool."""
    stop = threading.Event()
    screen.note("starting Ray and the pool ...")
    with local_ray(dashboard=True) as dashboard:
        from deployments.endpoint import serve_model

        url = serve_at(host, port)
        info = serve_model(model, config)
        for number in (signal.SIGINT, signal.SIGTERM):  # only now: `local_ray` sets its own as it starts
            signal.signal(number, lambda *_: stop.set())
        with announce(dashboard):
            screen.say(f"{info.model} ({info.revision}) answers at {url}")
            screen.say(f"  tandem score IMAGE --url {url}")
            screen.say(f"  curl --data-binary @IMAGE {url}/predict")
            screen.say("  tandem submit INPUT OUTPUT --model ... --wait   runs on the same actors")
            stop.wait()
            screen.note("stopping ...")


def serve_there(screen: Screen, model: str, host: str, port: int, config: Config, address: str) -> None:
    """Deploys into the cluster at `address`, where it stays up."""
    from jobs.remote import Cluster, follow, serve_request

    cluster = Cluster(address)
    with screen.progress("deploying"):
        result = follow(cluster.events(cluster.start(serve_request(model, host, port, config))), lambda progress: None)
    screen.say(f"{result['model']} ({result['revision']}) answers at {result['url']} on the cluster's head node")
