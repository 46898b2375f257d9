"""The Ray under the pool: one of our own on this machine, or the one that this process runs in."""

from __future__ import annotations

import json
import logging
import os
import secrets
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from deployments.scheduling import behind_others

# Read by Ray as it is imported and as it starts; what the user has set stays.
_QUIET = {
    "RAY_DEDUP_LOGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_USAGE_STATS_PROMPT_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "TQDM_DISABLE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
MIN_LOGICAL_CPUS = 2  # below, the pool, its endpoint, a reader, a caller and a decoder do not fit together
OBJECT_STORE_BYTES = 2 << 30


def quiet() -> None:
    """Keeps libraries off the screen. To be called before Ray is imported."""
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    logging.getLogger("ray").setLevel(logging.CRITICAL)


def own_ray() -> None:
    """Sets the environment for a Ray of this process's own. To be called before Ray is imported, which reads it."""
    # Ray starts a worker at priority 0 and lowers it to 15 once it is up: on few cores each new worker of a job would
    # stop the replicas for half a second. With all at 0 they share, and a job's workers give way by themselves.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # Where there are more workers than cores, Ray ends those that idle for a second, and each new one costs a second.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "60000")
    # Serve looks at its deployments ten times a second, which takes a twentieth of a core; one machine's change seldom.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    # Ray starts jobs with the `python` that it finds, which is this one only where its environment is activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    # Ray would write a token file into the user's home, and so change how every later Ray of this user starts.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    quiet()


@contextmanager
def local_ray(*, dashboard: bool = False) -> Iterator[str]:
    """A Ray of this process's own, on loopback, for as long as the context lasts; yields its dashboard's URL, or ""."""
    own_ray()
    import ray

    with behind_others():
        context = ray.init(
            address="local",
            num_cpus=max(MIN_LOGICAL_CPUS, os.cpu_count() or 1),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=dashboard,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
            configure_logging=True,
            _node_ip_address="127.0.0.1",
        )
    stop_on_sigterm()
    try:
        yield f"http://{context.dashboard_url}" if dashboard else ""
    finally:
        ray.shutdown()


def stop_on_sigterm() -> None:
    """Has SIGTERM end this process as Ctrl-C does, through all that cleans up. Ray's own handler does not."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)


@contextmanager
def announce(address: str) -> Iterator[None]:
    """Lets other commands of this user find the cluster with its job API at `address`, while the context lasts."""
    path = _state_file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.unlink(missing_ok=True)
    import ray

    # Ray's job API starts a driver in whichever cluster was started last on the machine, so the driver is told its own.
    gcs_address = ray.get_runtime_context().gcs_address
    token = os.environ.get("RAY_AUTH_TOKEN")
    state = {"pid": os.getpid(), "address": address, "gcs_address": gcs_address, "token": token}
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(state, file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


class Local(NamedTuple):
    """A cluster on this machine: the URL of its job API, and HOST:PORT of its GCS, which is what a driver joins."""

    address: str
    gcs_address: str


def find_local() -> Local | None:
    """The cluster that a `tandem serve` of this user keeps here, or None.

    Takes its token into the environment, which is where Ray looks for it.
    """
    try:
        state = json.loads(_state_file().read_text())
        os.kill(state["pid"], 0)
        found = Local(address=str(state["address"]), gcs_address=str(state["gcs_address"]))
    except (OSError, ValueError, KeyError):
        return None
    if state["token"]:
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": state["token"]}
    return found


def _state_file() -> Path:
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "tandem" / "cluster.json"


def join_ray(gcs_address: str | None = None, env_vars: dict[str, str] | None = None) -> None:
    """Joins the cluster at `gcs_address`; None means the one that this process was started in.

    `env_vars` are what this process's workers find in their environment, beside what is there.
    """
    quiet()
    import ray

    runtime_env = {"env_vars": env_vars} if env_vars else None
    ray.init(gcs_address, runtime_env=runtime_env, log_to_driver=False, logging_level=logging.CRITICAL)
    stop_on_sigterm()


def start_serve() -> None:
    """Starts Serve without its own HTTP side, unless it runs in this cluster already."""
    from ray import serve

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="Disabled")
