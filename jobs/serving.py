"""`tandem serve`: an endpoint on this machine until it is stopped, or in a cluster."""

from __future__ import annotations

import signal
import threading

from deployments.cluster import announce, local_ray, start_serve
from deployments.config import Config
from deployments.web.listener import check_free
from jobs.screen import Screen


def serve_here(screen: Screen, model: str, host: str, port: int, config: Config) -> None:
    """Serves until SIGINT or SIGTERM; what has been asked by then is answered.

    Jobs that are submitted on this machine meanwhile share the pool.
    """
    check_free(host, port)
    stop = threading.Event()
    screen.note("starting Ray and the pool ...")
    with local_ray(dashboard=True) as dashboard:
        from deployments.endpoint import serve_model, stop_serving

        start_serve()
        running, url = serve_model(model, host, port, config), url_of(host, port)
        for number in (signal.SIGINT, signal.SIGTERM):  # only now: `local_ray` sets its own as it starts
            signal.signal(number, lambda *_: stop.set())
        with announce(dashboard):
            screen.say(f"{running.info.model} ({running.info.revision}) answers at {url}")
            screen.say_choices(running.chosen)
            screen.say(f"  tandem score IMAGE --url {url}")
            screen.say(f"  curl --data-binary @IMAGE {url}/predict")
            screen.say("  tandem submit INPUT OUTPUT --model ... --wait   runs on the same actors")
            stop.wait()
            screen.note("stopping ...")
            stop_serving()


def serve_there(screen: Screen, model: str, host: str, port: int, config: Config, address: str) -> None:
    """Deploys into the cluster at `address`, where it stays up."""
    from jobs.driver import serve_request
    from jobs.events import follow
    from jobs.remote import Cluster

    cluster = Cluster(address)
    with screen.progress("deploying"):
        result = follow(cluster.events(cluster.start(serve_request(model, host, port, config))), lambda progress: None)
    where = "the cluster's head node" if config.endpoint.nodes == "head" else "each node that has an endpoint process"
    screen.say(f"{result['model']} ({result['revision']}) answers at {url_of(host, port)} on {where}")
    screen.say_choices(result["chosen"])


def url_of(host: str, port: int) -> str:
    """As a client writes it."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
